/* Model: loading, single weights, the forward pass. */
#include "engine.h"

#include <stdlib.h>
#include <unistd.h>

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
    } else if (f && model_facts_read(facts, f) == 0 &&
               model_ropes_read(facts, f, tables, factors) == 0) {
        self->owner = (struct device_object *)Py_NewRef(device);
        engine_lock(self->owner);
        failed = gpu_device_check(self->owner->device, &error) ||
                 model_create(&self->model, self->owner->device, f, (const double *const *)tables,
                              factors, &error);
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
    /* with the lock taken: in this very thread */
    int busy = self->owner->busy && self->owner->owner == getpid();
    if (!busy)
        model_free(self);
    engine_unlock(self->owner);
    if (busy)
        return PyErr_Format(
            PyExc_RuntimeError,
            "the device is inside a call of this thread: a signal handler cannot close the model");
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

/* For calls that only read facts: valid while the GIL is held. */
static int model_check(struct model_object *self) {
    if (self->model)
        return 0;
    engine_lock(self->owner); /* a daemon thread while the interpreter ends stops here */
    engine_unlock(self->owner);
    PyErr_SetString(PyExc_ValueError, "the model is closed");
    return -1;
}

/* --- loading ---------------------------------------------------------------------------------- */

#define SOURCES_MAX 4

/* A source is (type, rows, columns, buffer) or (type, rows, columns, MappedFile, offset): type 0
 * float32, 1 bfloat16, 2 float16. */
static int source_read(struct model_object *self, PyObject *item, struct weight_source *source,
                       Py_buffer *view) {
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
        if (mapped_file_range(&((struct file_object *)data)->file, offset, bytes, &pointer,
                              &error)) {
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
        PyErr_Format(PyExc_ValueError, "a tensor of %u x %u has %zd bytes, not %llu", rows, columns,
                     view->len, (unsigned long long)bytes);
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
    while (read < n &&
           source_read(self, PyList_GetItem(list, read), &sources[read], &views[read]) == 0)
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
    failed = model_load_finish(self->model, &error) ||
             (!self->work &&
              run_work_create(&self->work, self->model, run_sizes_of(self->model).chunk,
                              run_sizes_of(self->model).readback, &error));
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
    struct run_sizes sizes = run_sizes_of(self->model);
    uint64_t work = run_work_bytes(f, sizes.scratch, sizes.chunk, sizes.chunk, sizes.readback, 0);
    return Py_BuildValue(
        "{s:K,s:K,s:K,s:I,s:K,s:K,s:K}", "weights", (unsigned long long)model_weight_bytes(f),
        "work", (unsigned long long)work, "cache_per_token",
        (unsigned long long)run_cache_bytes(f, 1, 0), "chunk", sizes.chunk, "scratch",
        (unsigned long long)sizes.scratch, "readback", (unsigned long long)sizes.readback, "split",
        (unsigned long long)run_split_bytes(f, sizes.chunk, 0));
}

/* --- single weights --------------------------------------------------------------------------- */

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
        ENGINE_WORK(self, failed,
                    run_apply(self->work, name, layer, x, (uint32_t)dims[0], y, &error));
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

/* A new array for the logits, or None. */
static PyObject *logits_array(const struct model *model, struct batch_arguments *a) {
    Py_ssize_t rows = a->n_out_rows, columns = a->batch.n_columns, width = model->facts.d_vocab;
    if (a->batch.logits_mode == RUN_LOGITS_ALL)
        return array_zeros(3, (Py_ssize_t[]){rows, columns, width}, &a->batch.logits);
    if (a->batch.logits_mode == RUN_LOGITS_LAST)
        return array_zeros(2, (Py_ssize_t[]){rows, width}, &a->batch.logits);
    return Py_NewRef(Py_None);
}

/* forward(cache, rows, captures [(site, layer)], logits) -> (logits or None, {(site, layer):
 * array}) */
static PyObject *model_forward(PyObject *object, PyObject *args, PyObject *keywords) {
    static char *names[] = {"cache", "rows", "captures", "logits", NULL};
    struct model_object *self = (struct model_object *)object;
    PyObject *cache, *rows, *list, *captured, *logits = NULL, *result = NULL;
    struct batch_arguments a = {0};
    struct error error = {0};
    int mode, failed = 1, begun = 1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO!i", names, &cache, &rows, &PyList_Type,
                                     &list, &mode) ||
        engine_begin(self, 1))
        return NULL;
    captured = PyDict_New();
    if (!captured || batch_read(&a, self, cache, rows) ||
        batch_captures_read(self->model, &a, list, captured, &a.captures, &a.batch.n_captures))
        goto done;
    a.batch.captures = a.captures;
    a.batch.logits_mode = (enum run_logits)mode;
    if (!(logits = logits_array(self->model, &a)))
        goto done;
    ENGINE_WORK(self, failed, run_forward(self->work, a.cache, &a.batch, &error));
    begun = 0;
done:
    if (engine_finish(self, begun, failed, &error))
        result = Py_BuildValue("(OO)", logits, captured);
    batch_release(&a);
    Py_XDECREF(logits);
    Py_XDECREF(captured);
    return result;
}

/* decode_block(cache, rows, n_steps, share, empty, near) -> float32 [n_steps, rows] */
static PyObject *model_decode_block(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    PyObject *cache, *rows, *picked = NULL;
    struct batch_arguments a = {0};
    struct run_block block = {0};
    struct error error = {0};
    float *to;
    int failed = 1, begun = 1;
    if (!PyArg_ParseTuple(args, "OOIIff", &cache, &rows, &block.n_steps, &block.share, &block.empty,
                          &block.near) ||
        engine_begin(self, 1))
        return NULL;
    if (batch_read(&a, self, cache, rows) == 0 &&
        (picked = array_zeros(2, (Py_ssize_t[]){block.n_steps, a.batch.n_rows}, &to))) {
        a.batch.logits_mode = RUN_LOGITS_LAST;
        ENGINE_WORK(self, failed,
                    run_decode_block(self->work, a.cache, &a.batch, &block, to, &error));
        begun = 0;
    }
    if (!engine_finish(self, begun, failed, &error))
        Py_CLEAR(picked);
    batch_release(&a);
    return picked;
}

static PyObject *model_get_dispatches(PyObject *object, void *unused) {
    (void)unused;
    struct model_object *self = (struct model_object *)object;
    return model_check(self)
               ? NULL
               : PyLong_FromUnsignedLongLong(gpu_queue_dispatches(self->model->ops.queue));
}

static PyMethodDef model_methods[] = {
    {"load_matrix", model_load_matrix, METH_VARARGS,
     "load_matrix(name, layer, sources): stacks the sources' rows into one of the model's "
     "matrices."},
    {"load_vector", model_load_vector, METH_VARARGS,
     "load_vector(name, layer, sources): a gain or a bias."},
    {"finish", model_finish, METH_NOARGS,
     "finish(): checks that nothing is missing; the model can run from now on."},
    {"plan", model_plan, METH_NOARGS,
     "plan() -> dict: bytes of weights, work memory, and of cache per token; tokens that one pass "
     "takes (chunk), bytes of scratch and readback memory and "
     "of split rows."},
    {"apply", model_apply, METH_VARARGS,
     "apply(matrix, layer, x float32 [n, columns]) -> float32 [n, rows]."},
    {"vector", model_vector, METH_VARARGS,
     "vector(name, layer) -> float32: a gain with its offset, or a bias."},
    {"rows", model_rows, METH_VARARGS,
     "rows(matrix, layer, first, n) -> float32 [n, columns]: weights as the device holds them."},
    {"value_vectors", model_value_vectors, METH_VARARGS,
     "value_vectors(direction float32 [D], first_layer, post=True) -> float32 [n, H, D]; see "
     "csrc/analysis/ov.h."},
    {"lens", model_lens, METH_VARARGS,
     "lens(vectors float32 [n, D], k, cosine=False) -> (values, tokens), float32 [n, k]; see "
     "csrc/analysis/ov.h."},
    {"forward", (PyCFunction)(void (*)(void))model_forward, METH_VARARGS | METH_KEYWORDS,
     "forward(cache, rows, captures, logits) -> (logits, captured): one batch; see "
     "csrc/run/run.h."},
    {"decode_block", model_decode_block, METH_VARARGS,
     "decode_block(cache, rows, n_steps, share, empty, near) -> float32 [n_steps, rows]: tokens of "
     "several steps of greedy decoding; see csrc/run/run.h."},
    {"measure_linear", model_measure_linear, METH_VARARGS,
     "measure_linear(m, n, k, decode=False, backward=False) -> (flop/s, weight bytes/s)."},
    {"measure_read", model_measure_read, METH_VARARGS,
     "measure_read(bytes) -> bytes/s that a kernel that only reads reaches."},
    {"prepare", model_prepare, METH_NOARGS,
     "prepare(): compiles the kernels that this model will use, in parallel."},
    {"profile_start", model_profile_start, METH_NOARGS,
     "profile_start(): begins to profile, or goes on; see csrc/gpu/gpu.h."},
    {"profile_stop", model_profile_stop, METH_NOARGS,
     "profile_stop(): ends the profile that was started last."},
    {"profile_read", model_profile_read, METH_NOARGS,
     "profile_read() -> (rows, dispatches, barriers, submissions, host seconds); rows: (kernel, "
     "calls, seconds, bytes read, bytes written, flops)."},
    {"close", model_close, METH_NOARGS, "close(): frees the device memory; idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef model_getset[] = {
    {"kernels", model_get_family, model_set_family, "The kernel family in use: one of `families`.",
     NULL},
    {"fast", model_get_fast, model_set_fast,
     "Whether products on matrix units are one product in float16.", NULL},
    {"families", model_get_families, NULL, "Kernel families that this device can run.", NULL},
    {"dispatches", model_get_dispatches, NULL, "Dispatches recorded since the model was made.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot model_slots[] = {{Py_tp_new, model_new},
                                    {Py_tp_dealloc, model_dealloc},
                                    {Py_tp_methods, model_methods},
                                    {Py_tp_getset, model_getset},
                                    {Py_tp_doc, "Model(device, facts): weights on a device."},
                                    {0, NULL}};
PyType_Spec model_spec = {
    .name = "vksteer._engine.Model",
    .basicsize = sizeof(struct model_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = model_slots,
};
