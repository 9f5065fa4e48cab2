/* Model, Cache and Edits. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- facts out of a dict -------------------------------------------------------------------------------------------------------------- */

static double fact(PyObject *facts, const char *name) {
    PyObject *value = PyDict_GetItemString(facts, name);
    if (!value) {
        PyErr_Format(PyExc_KeyError, "fact %s is missing", name);
        return -1;
    }
    return PyFloat_AsDouble(value);
}

static int fact_list(PyObject *facts, const char *name, uint32_t *out, uint32_t n) {
    PyObject *list = PyDict_GetItemString(facts, name);
    if (!list || !PyList_Check(list) || PyList_Size(list) != (Py_ssize_t)n) {
        PyErr_Format(PyExc_ValueError, "fact %s must be a list of %u", name, n);
        return -1;
    }
    for (uint32_t i = 0; i < n; i++) {
        unsigned long value = PyLong_AsUnsignedLong(PyList_GetItem(list, i));
        if (PyErr_Occurred())
            return -1;
        out[i] = (uint32_t)value;
    }
    return 0;
}

static int facts_read(PyObject *dict, struct model_facts *f) {
    const struct { const char *name; uint32_t *to; } integers[] = {
        {"n_layers", &f->n_layers}, {"d_model", &f->d_model}, {"n_heads", &f->n_heads}, {"n_kv_heads", &f->n_kv_heads}, {"d_head", &f->d_head},
        {"d_mlp", &f->d_mlp}, {"d_vocab", &f->d_vocab}, {"n_ctx", &f->n_ctx}, {"act", &f->act}, {"weight_type", &f->weight_type}};
    const struct { const char *name; float *to; } numbers[] = {
        {"norm_eps", &f->norm_eps}, {"norm_offset", &f->norm_offset}, {"embed_scale", &f->embed_scale}, {"attn_scale", &f->attn_scale},
        {"attn_softcap", &f->attn_softcap}, {"final_softcap", &f->final_softcap}};
    const struct { const char *name; int *to; } flags[] = {
        {"post_norms", &f->post_norms}, {"qk_norm", &f->qk_norm}, {"qkv_bias", &f->qkv_bias}, {"o_bias", &f->o_bias}, {"mlp_bias", &f->mlp_bias},
        {"tied", &f->tied}};
    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++) {
        double value = fact(dict, integers[i].name);
        if (PyErr_Occurred())
            return -1;
        *integers[i].to = value >= 0 && value < 4e9 ? (uint32_t)value : UINT32_MAX; /* out of range: refused by the check of facts */
    }
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        *numbers[i].to = (float)fact(dict, numbers[i].name);
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++)
        *flags[i].to = fact(dict, flags[i].name) != 0;
    if (PyErr_Occurred())
        return -1;
    if (f->n_layers > MODEL_LAYERS_MAX) {
        PyErr_Format(PyExc_ValueError, "%u layers are too many", f->n_layers);
        return -1;
    }
    return fact_list(dict, "window", f->window, f->n_layers) || fact_list(dict, "rope_table", f->rope_table, f->n_layers);
}

/* facts["rope"]: list of (list of d_head / 2 floats, factor). Fills malloc'ed tables. */
static int ropes_read(PyObject *dict, struct model_facts *f, double **tables, double *factors) {
    PyObject *list = PyDict_GetItemString(dict, "rope");
    Py_ssize_t n = list && PyList_Check(list) ? PyList_Size(list) : 0;
    if (n < 1 || n > MODEL_ROPES_MAX) {
        PyErr_SetString(PyExc_ValueError, "fact rope must be a list of one or two tables");
        return -1;
    }
    f->n_ropes = (uint32_t)n;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *frequencies;
        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "Od", &frequencies, &factors[i]))
            return -1;
        if (!PyList_Check(frequencies) || PyList_Size(frequencies) != (Py_ssize_t)f->d_head / 2) {
            PyErr_SetString(PyExc_ValueError, "a rotation table must have d_head / 2 frequencies");
            return -1;
        }
        tables[i] = malloc((f->d_head / 2 + 1) * sizeof(double));
        if (!tables[i]) {
            PyErr_NoMemory();
            return -1;
        }
        for (uint32_t j = 0; j < f->d_head / 2; j++)
            tables[i][j] = PyFloat_AsDouble(PyList_GetItem(frequencies, j));
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"device", "facts", NULL};
    PyObject *device, *facts;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO!", names, &device, &PyDict_Type, &facts))
        return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct model_object *self = (struct model_object *)allocate(type, 0);
    if (!self)
        return NULL;
    struct model_facts *f = calloc(1, sizeof *f);
    double *tables[MODEL_ROPES_MAX] = {NULL}, factors[MODEL_ROPES_MAX];
    struct error error = {0};
    int failed = 1;
    if ((PyObject *)Py_TYPE(device) != engine_state_of((PyObject *)self)->device_type) {
        PyErr_SetString(PyExc_TypeError, "device must be a Device");
    } else if (f && facts_read(facts, f) == 0 && ropes_read(facts, f, tables, factors) == 0) {
        self->owner = (struct device_object *)Py_NewRef(device);
        engine_lock(self->owner);
        failed = gpu_device_check(self->owner->device, &error) ||
                 model_create(&self->model, self->owner->device, f, (const double *const *)tables, factors, &error);
        engine_unlock(self->owner);
        if (failed)
            engine_raise((PyObject *)self, &error);
    }
    for (int i = 0; i < MODEL_ROPES_MAX; i++)
        free(tables[i]);
    free(f);
    if (failed)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void model_free(struct model_object *self) {
    if (!self->model)
        return;
    engine_lock(self->owner);
    run_work_destroy(self->work);
    self->work = NULL;
    model_destroy(self->model);
    self->model = NULL;
    engine_unlock(self->owner);
}

static PyObject *model_close(PyObject *object, PyObject *unused) {
    (void)unused;
    struct model_object *self = (struct model_object *)object;
    if (!self->model)
        Py_RETURN_NONE;
    engine_lock(self->owner);
    int busy = self->owner->busy && self->owner->owner == getpid(); /* with the lock taken: in this very thread */
    if (!busy)
        model_free(self);
    engine_unlock(self->owner);
    if (busy)
        return PyErr_Format(PyExc_RuntimeError, "the device is inside a call of this thread: a signal handler cannot close the model");
    Py_RETURN_NONE;
}

static void model_dealloc(PyObject *object) {
    struct model_object *self = (struct model_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    model_free(self);
    Py_XDECREF((PyObject *)self->owner);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* For calls that only look at facts: valid while the GIL is held. */
static int model_check(struct model_object *self) {
    if (self->model)
        return 0;
    engine_lock(self->owner); /* a daemon thread while the interpreter ends stops here */
    engine_unlock(self->owner);
    PyErr_SetString(PyExc_ValueError, "the model is closed");
    return -1;
}

/* --- loading -------------------------------------------------------------------------------------------------------------------------- */

#define SOURCES_MAX 4

/* A source is (type, rows, columns, buffer) or (type, rows, columns, MappedFile, offset): type 0 float32, 1 bfloat16, 2 float16. */
static int source_read(struct model_object *self, PyObject *item, struct weight_source *source, Py_buffer *view) {
    unsigned int type, rows, columns;
    PyObject *data;
    unsigned long long offset = 0;
    if (!PyArg_ParseTuple(item, "IIIO|K", &type, &rows, &columns, &data, &offset))
        return -1;
    uint64_t bytes = (uint64_t)rows * columns * (type == WEIGHT_F32 ? 4 : 2);
    if (type > WEIGHT_F16) {
        PyErr_Format(PyExc_ValueError, "weight type %u", type);
        return -1;
    }
    *source = (struct weight_source){.type = type, .rows = rows, .columns = columns};
    if ((PyObject *)Py_TYPE(data) == engine_state_of((PyObject *)self)->file_type) {
        struct error error = {0};
        const uint8_t *pointer;
        if (mapped_file_range(&((struct file_object *)data)->file, offset, bytes, &pointer, &error)) {
            engine_raise((PyObject *)self, &error);
            return -1;
        }
        source->data = pointer;
        return 0;
    }
    if (PyObject_GetBuffer(data, view, PyBUF_C_CONTIGUOUS))
        return -1;
    source->data = view->buf;
    if ((uint64_t)view->len != bytes) {
        PyErr_Format(PyExc_ValueError, "a tensor of %u x %u has %zd bytes, not %llu", rows, columns, view->len, (unsigned long long)bytes);
        return -1;
    }
    return 0;
}

static PyObject *load(PyObject *object, PyObject *args, int vector) {
    struct model_object *self = (struct model_object *)object;
    const char *name;
    int layer, failed = 1;
    PyObject *list;
    if (!PyArg_ParseTuple(args, "siO!", &name, &layer, &PyList_Type, &list))
        return NULL;
    Py_ssize_t n = PyList_Size(list), read = 0;
    if (n < 1 || n > SOURCES_MAX)
        return PyErr_Format(PyExc_ValueError, "%zd sources", n);
    struct weight_source sources[SOURCES_MAX];
    Py_buffer views[SOURCES_MAX] = {{0}};
    struct error error = {0};
    while (read < n && source_read(self, PyList_GetItem(list, read), &sources[read], &views[read]) == 0)
        read++;
    if (read == n && engine_begin(self, 0) == 0) {
        Py_BEGIN_ALLOW_THREADS
        failed = vector ? model_vector_load(self->model, name, layer, sources, (int)n, &error)
                        : model_matrix_load(self->model, name, layer, sources, (int)n, &error);
        engine_end(self);
        Py_END_ALLOW_THREADS
        if (failed)
            engine_fail(self, &error);
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (views[i].obj)
            PyBuffer_Release(&views[i]);
    return failed ? NULL : Py_NewRef(Py_None);
}

static PyObject *model_load_matrix(PyObject *object, PyObject *args) {
    return load(object, args, 0);
}

static PyObject *model_load_vector(PyObject *object, PyObject *args) {
    return load(object, args, 1);
}

static PyObject *model_finish(PyObject *object, PyObject *unused) {
    (void)unused;
    struct model_object *self = (struct model_object *)object;
    struct error error = {0};
    int failed;
    if (engine_begin(self, 0))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = model_load_finish(self->model, &error) || (!self->work && run_work_create(&self->work, self->model, run_chunk(self->model->ops.device), RUN_READBACK, &error));
    engine_end(self);
    Py_END_ALLOW_THREADS
    return failed ? engine_fail(self, &error) : Py_NewRef(Py_None);
}

static PyObject *model_plan(PyObject *object, PyObject *unused) {
    (void)unused;
    struct model_object *self = (struct model_object *)object;
    if (model_check(self))
        return NULL;
    const struct model_facts *f = &self->model->facts;
    uint32_t chunk = run_chunk(self->model->ops.device);
    return Py_BuildValue("{s:K,s:K,s:K,s:I}", "weights", (unsigned long long)model_weight_bytes(f), "work", (unsigned long long)run_work_bytes(f, chunk, RUN_READBACK),
                         "cache_per_token", (unsigned long long)run_cache_bytes(f, 1, 0), "chunk", chunk);
}

/* --- single weights ------------------------------------------------------------------------------------------------------------------- */

static PyObject *model_apply(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    const char *name;
    int layer, failed;
    PyObject *array, *result = NULL;
    const void *x;
    Py_ssize_t n;
    uint32_t rows, columns;
    if (!PyArg_ParseTuple(args, "siO", &name, &layer, &array) || model_check(self))
        return NULL;
    if (!model_matrix_find(self->model, name, layer, &rows, &columns))
        return PyErr_Format(PyExc_KeyError, "no matrix %s in layer %d", name, layer);
    PyObject *view = array_view(array, 'f', "x", &x, &n);
    if (!view)
        return NULL;
    float *y;
    Py_ssize_t dims[2] = {n / columns, rows};
    if (n % columns || n / columns > UINT32_MAX)
        PyErr_Format(PyExc_ValueError, "x must have rows of %u", columns);
    else
        result = array_zeros(2, dims, &y);
    if (result && dims[0] && engine_begin(self, 1)) {
        Py_CLEAR(result);
    } else if (result && dims[0]) {
        struct error error = {0};
        ENGINE_WORK(self, failed, run_apply(self->work, name, layer, x, (uint32_t)dims[0], y, &error));
        if (failed) {
            Py_CLEAR(result);
            engine_fail(self, &error);
        }
    }
    Py_DECREF(view);
    return result;
}

static PyObject *model_vector(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    const char *name;
    int layer, failed;
    uint32_t n;
    if (!PyArg_ParseTuple(args, "si", &name, &layer) || model_check(self))
        return NULL;
    if (!model_vector_find(self->model, name, layer, &n))
        return PyErr_Format(PyExc_KeyError, "no vector %s in layer %d", name, layer);
    float *out;
    Py_ssize_t dims[1] = {n};
    PyObject *result = array_zeros(1, dims, &out);
    if (result && engine_begin(self, 1))
        Py_CLEAR(result);
    if (!result)
        return NULL;
    struct error error = {0};
    Py_BEGIN_ALLOW_THREADS
    failed = run_vector_read(self->work, name, layer, out, &error);
    engine_end(self);
    Py_END_ALLOW_THREADS
    if (failed) {
        Py_CLEAR(result);
        engine_fail(self, &error);
    }
    return result;
}

static PyObject *model_get_dispatches(PyObject *object, void *unused) {
    (void)unused;
    struct model_object *self = (struct model_object *)object;
    return model_check(self) ? NULL : PyLong_FromUnsignedLongLong(gpu_stream_dispatches(self->model->ops.stream));
}

static PyMethodDef model_methods[] = {
    {"load_matrix", model_load_matrix, METH_VARARGS, "load_matrix(name, layer, sources): stacks the sources' rows into one of the model's matrices."},
    {"load_vector", model_load_vector, METH_VARARGS, "load_vector(name, layer, sources): a gain or a bias."},
    {"finish", model_finish, METH_NOARGS, "finish(): checks that nothing is missing; the model can run from now on."},
    {"plan", model_plan, METH_NOARGS, "plan() -> dict: bytes of weights, work memory, and of cache per token; tokens that one pass takes (chunk)."},
    {"apply", model_apply, METH_VARARGS, "apply(matrix, layer, x float32 [n, columns]) -> float32 [n, rows]."},
    {"vector", model_vector, METH_VARARGS, "vector(name, layer) -> float32: a gain with its offset, or a bias."},
    {"rows", model_rows, METH_VARARGS, "rows(matrix, layer, first, n) -> float32 [n, columns]: weights as the device holds them."},
    {"value_vectors", model_value_vectors, METH_VARARGS, "value_vectors(direction float32 [D], first_layer, post=True) -> float32 [n, H, D]; see csrc/analysis/ov.h."},
    {"lens", model_lens, METH_VARARGS, "lens(vectors float32 [n, D], k, cosine=False) -> (values, tokens), float32 [n, k]; see csrc/analysis/ov.h."},
    {"forward", (PyCFunction)(void (*)(void))model_forward, METH_VARARGS | METH_KEYWORDS, "forward(...): one batch; see csrc/run/run.h."},
    {"measure_linear", model_measure_linear, METH_VARARGS, "measure_linear(m, n, k, decode=False, backward=False) -> (flop/s, weight bytes/s)."},
    {"measure_read", model_measure_read, METH_VARARGS, "measure_read(bytes) -> bytes/s that a kernel that only reads reaches."},
    {"prepare", model_prepare, METH_NOARGS, "prepare(): compiles the kernels that this model will use, in parallel."},
    {"close", model_close, METH_NOARGS, "close(): frees the device memory; legal twice."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef model_getset[] = {
    {"kernels", model_get_family, model_set_family, "The matrix kernels in use: one of `families`.", NULL},
    {"families", model_get_families, NULL, "Matrix kernels that this device can run.", NULL},
    {"dispatches", model_get_dispatches, NULL, "Dispatches recorded since the model was made.", NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot model_slots[] = {
    {Py_tp_new, model_new}, {Py_tp_dealloc, model_dealloc}, {Py_tp_methods, model_methods}, {Py_tp_getset, model_getset},
    {Py_tp_doc, "Model(device, facts): weights on a device."}, {0, NULL}};
PyType_Spec model_spec = {.name = "vksteer._engine.Model", .basicsize = sizeof(struct model_object), .flags = Py_TPFLAGS_DEFAULT, .slots = model_slots};

/* --- Cache ---------------------------------------------------------------------------------------------------------------------------- */

static PyObject *cache_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"model", "n_slots", "first_layer", NULL};
    PyObject *model;
    unsigned int n_slots, first_layer = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OI|I", names, &model, &n_slots, &first_layer))
        return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct cache_object *self = (struct cache_object *)allocate(type, 0);
    struct error error = {0};
    if (!self)
        return NULL;
    if ((PyObject *)Py_TYPE(model) != engine_state_of((PyObject *)self)->model_type || n_slots == 0) {
        PyErr_SetString(PyExc_TypeError, "Cache(model, n_slots) needs a Model and at least one slot");
        Py_CLEAR(self);
    } else if (engine_begin((struct model_object *)model, 1)) {
        Py_CLEAR(self);
    } else {
        self->owner = (struct model_object *)Py_NewRef(model);
        int failed = run_cache_create(&self->cache, self->owner->model, n_slots, first_layer, &error);
        engine_end(self->owner);
        if (failed) {
            engine_raise((PyObject *)self, &error);
            Py_CLEAR(self);
        }
    }
    return (PyObject *)self;
}

static void cache_dealloc(PyObject *object) {
    struct cache_object *self = (struct cache_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->owner)
        engine_lock(self->owner->owner);
    if (self->owner && self->owner->model) /* copies may be recorded that nobody has waited for */
        gpu_stream_wait(self->owner->model->ops.stream, NULL);
    run_cache_destroy(self->cache);
    if (self->owner)
        engine_unlock(self->owner->owner);
    Py_XDECREF((PyObject *)self->owner);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *cache_copy(PyObject *object, PyObject *args) {
    struct cache_object *self = (struct cache_object *)object;
    unsigned int from, n, first_layer = 0;
    PyObject *array;
    const void *to;
    Py_ssize_t n_to;
    struct error error = {0};
    if (!PyArg_ParseTuple(args, "IOI|I", &from, &array, &n, &first_layer))
        return NULL;
    PyObject *view = array_view(array, 'I', "to", &to, &n_to);
    if (!view)
        return NULL;
    int failed = 1;
    if (engine_begin(self->owner, 1) == 0) {
        failed = run_cache_copy(self->owner->work, self->cache, from, to, (uint32_t)n_to, n, first_layer, &error);
        engine_end(self->owner);
        if (failed)
            engine_fail(self->owner, &error);
    }
    Py_DECREF(view);
    return failed ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef cache_methods[] = {
    {"copy", cache_copy, METH_VARARGS, "copy(from, to uint32 [places], n, first_layer=0): copies n slots to every place."}, {NULL, NULL, 0, NULL}};

static PyType_Slot cache_slots[] = {{Py_tp_new, cache_new}, {Py_tp_methods, cache_methods}, {Py_tp_dealloc, cache_dealloc}, {Py_tp_doc, "Cache(model, n_slots): keys and values."}, {0, NULL}};
PyType_Spec cache_spec = {.name = "vksteer._engine.Cache", .basicsize = sizeof(struct cache_object), .flags = Py_TPFLAGS_DEFAULT, .slots = cache_slots};

/* --- Edits ---------------------------------------------------------------------------------------------------------------------------- */

#define EDIT_FIELDS 15 /* site, layer, row, kind, start, stop, step, first_position, n_positions, first_head, n_heads, operand, pos_step, head_step, step */

static void edit_unpack(struct edit *edit, const int64_t *from, float coefficient) {
    *edit = (struct edit){.site = (int32_t)from[0], .layer = (int32_t)from[1], .row = (int32_t)from[2], .kind = (uint32_t)from[3],
                          .start = (uint32_t)from[4], .stop = (uint32_t)from[5], .step_pos = (uint32_t)from[6], .first_position = (uint32_t)from[7],
                          .n_positions = (uint32_t)from[8], .first_head = (uint32_t)from[9], .n_heads = (uint32_t)from[10],
                          .operand = (uint64_t)from[11], .pos_step = (uint32_t)from[12], .head_step = (uint32_t)from[13], .step = (uint32_t)from[14],
                          .coefficient = coefficient};
}

static int edits_fill(struct edits_object *self, const int64_t *records, Py_ssize_t n, const float *coefficients, const uint32_t *positions,
                      Py_ssize_t n_positions, const uint32_t *heads, Py_ssize_t n_heads, const float *operands, Py_ssize_t n_operands,
                      uint32_t n_rows, struct error *error) {
    struct edit_list *list = &self->list;
    struct model *model = self->owner->model;
    list->edits = calloc((size_t)n + 1, sizeof *list->edits);
    self->positions = malloc(4 * (size_t)n_positions + 4);
    self->heads = malloc(4 * (size_t)n_heads + 4);
    if (!list->edits || !self->positions || !self->heads)
        return error_set(error, ERROR_MEMORY, "out of memory for edits");
    memcpy(self->positions, positions, 4 * (size_t)n_positions);
    memcpy(self->heads, heads, 4 * (size_t)n_heads);
    for (Py_ssize_t i = 0; i < n; i++)
        edit_unpack(&list->edits[i], records + i * EDIT_FIELDS, coefficients[i]);
    list->n_edits = (uint32_t)n;
    list->positions = self->positions;
    list->heads = self->heads;
    list->n_positions = (uint32_t)n_positions;
    list->n_heads = (uint32_t)n_heads;
    list->n_operands = (uint64_t)n_operands;
    for (Py_ssize_t i = 0; i < n; i++) {
        const struct edit *edit = &list->edits[i];
        if (edit->kind > EDIT_ADD_SCALED)
            return error_set(error, ERROR_VALUE, "edit %zd: no kind %u", i, edit->kind);
        uint32_t site_heads, width;
        if (edit->site < 0 || edit->site >= SITE_COUNT)
            continue; /* refused below */
        site_shape(edit->site, &model->facts, &site_heads, &width);
        for (uint32_t h = 0; h < edit->n_heads && (uint64_t)edit->first_head + h < (uint64_t)n_heads; h++)
            if (heads[edit->first_head + h] >= site_heads)
                return error_set(error, ERROR_VALUE, "edit %zd: head %u of %s, which has %u", i, heads[edit->first_head + h], site_name(edit->site),
                                 site_heads);
    }
    if (edit_list_index(list, SITE_COUNT, model->facts.n_layers, n_rows, error))
        return -1;
    if (gpu_buffer_create(&self->operands, model->ops.device, 4 * (uint64_t)n_operands, GPU_UPLOAD, "edit values", error))
        return -1;
    memcpy(gpu_buffer_map(self->operands), operands, 4 * (size_t)n_operands);
    list->operand_address = gpu_buffer_address(self->operands);
    return 0;
}

static PyObject *edits_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"model", "records", "coefficients", "positions", "heads", "operands", "n_rows", NULL};
    PyObject *model, *arrays[5], *views[5] = {NULL};
    unsigned int n_rows;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOOOI", names, &model, &arrays[0], &arrays[1], &arrays[2], &arrays[3], &arrays[4], &n_rows))
        return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct edits_object *self = (struct edits_object *)allocate(type, 0);
    if (!self)
        return NULL;
    const void *data[5];
    Py_ssize_t n[5];
    const char types[5] = {'q', 'f', 'I', 'I', 'f'};
    struct error error = {0};
    int ok = (PyObject *)Py_TYPE(model) == engine_state_of((PyObject *)self)->model_type;
    if (!ok)
        PyErr_SetString(PyExc_TypeError, "Edits needs a Model");
    for (int i = 0; ok && i < 5; i++)
        ok = (views[i] = array_view(arrays[i], types[i], names[i + 1], &data[i], &n[i])) != NULL;
    if (ok && (n[0] != n[1] * EDIT_FIELDS || n[4] == 0 || n[1] > INT32_MAX)) {
        PyErr_SetString(PyExc_ValueError, "edit records, coefficients and operands do not fit together");
        ok = 0;
    }
    if (ok && engine_begin((struct model_object *)model, 1))
        ok = 0;
    else if (ok) {
        self->owner = (struct model_object *)Py_NewRef(model);
        ok = edits_fill(self, data[0], n[1], data[1], data[2], n[2], data[3], n[3], data[4], n[4], n_rows, &error) == 0;
        engine_end(self->owner);
        if (!ok)
            engine_raise((PyObject *)self, &error);
    }
    for (int i = 0; i < 5; i++)
        Py_XDECREF(views[i]);
    if (!ok)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void edits_dealloc(PyObject *object) {
    struct edits_object *self = (struct edits_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->owner)
        engine_lock(self->owner->owner);
    gpu_buffer_destroy(self->operands);
    if (self->owner)
        engine_unlock(self->owner->owner);
    edit_list_clear(&self->list);
    free(self->list.edits);
    free(self->positions);
    free(self->heads);
    Py_XDECREF((PyObject *)self->owner);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyType_Slot edits_slots[] = {{Py_tp_new, edits_new}, {Py_tp_dealloc, edits_dealloc}, {Py_tp_doc, "Edits(...): edits of one batch as plain data."}, {0, NULL}};
PyType_Spec edits_spec = {.name = "vksteer._engine.Edits", .basicsize = sizeof(struct edits_object), .flags = Py_TPFLAGS_DEFAULT, .slots = edits_slots};
