/* Cache: keys and values of a model. */
#include "engine.h"

static PyObject *cache_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"model", "n_slots", "first_layer", NULL};
    PyObject *model;
    unsigned int n_slots, first_layer = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OI|I", names, &model, &n_slots, &first_layer))
        return NULL;
    struct error error = {0};
    PyObject *object = engine_owned_new(
        type, model, n_slots > 0, "Cache(model, n_slots) needs a Model and at least one slot");
    if (!object)
        return NULL;
    struct cache_object *self = (struct cache_object *)object;
    int failed = run_cache_create(&self->cache, self->owner->model, n_slots, first_layer, &error);
    return engine_owned_made(object, failed, &error);
}

static void cache_destroy(PyObject *object) {
    struct cache_object *self = (struct cache_object *)object;
    if (self->owner->model) /* copies may be recorded that no call has waited for */
        gpu_queue_wait(self->owner->model->ops.queue, NULL);
    run_cache_destroy(self->cache);
}

static void cache_dealloc(PyObject *object) { engine_owned_free(object, cache_destroy); }

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
        failed = run_cache_copy(self->owner->work, self->cache, from, to, (uint32_t)n_to, n,
                                first_layer, &error);
        engine_end(self->owner);
        if (failed)
            engine_fail(self->owner, &error);
    }
    Py_DECREF(view);
    return failed ? NULL : Py_NewRef(Py_None);
}

static PyObject *cache_add(PyObject *object, PyObject *args) {
    struct cache_object *self = (struct cache_object *)object;
    PyObject *arrays[3], *views[3] = {NULL};
    const void *slots, *which, *values;
    Py_ssize_t n, n_which, n_values;
    struct error error = {0};
    int failed = 1, begun = 1, done = 0;
    if (!PyArg_ParseTuple(args, "OOO", &arrays[0], &arrays[1], &arrays[2]) ||
        engine_begin(self->owner, 1))
        return NULL;
    const struct model_facts *f = &self->owner->model->facts;
    Py_ssize_t each = 2 * (Py_ssize_t)f->n_layers * f->n_kv_heads * f->d_head;
    if (!(views[0] = array_view(arrays[0], 'I', "slots", &slots, &n)) ||
        !(views[1] = array_view(arrays[1], 'I', "which", &which, &n_which)) ||
        !(views[2] = array_view(arrays[2], 'f', "values", &values, &n_values)))
        goto done;
    if (n == 0 || n != n_which || n_values == 0 || n_values % each) {
        PyErr_Format(PyExc_ValueError,
                     "add(slots [n], which [n], values [m, 2, layers, G * dh]): got %zd, %zd and "
                     "%zd numbers; one addition has %zd",
                     n, n_which, n_values, each);
        goto done;
    }
    struct run_cache_additions add = {
        .slots = slots,
        .which = which,
        .n = (uint32_t)n,
        .n_values = (uint32_t)(n_values / each),
        .values = values,
    };
    ENGINE_WORK(self->owner, failed, run_cache_add(self->owner->work, self->cache, &add, &error));
    begun = 0;
done:
    done = engine_finish(self->owner, begun, failed, &error);
    for (int i = 0; i < 3; i++)
        Py_XDECREF(views[i]);
    return done ? Py_NewRef(Py_None) : NULL;
}

static PyObject *cache_read(PyObject *object, PyObject *array) {
    struct cache_object *self = (struct cache_object *)object;
    PyObject *view, *result = NULL;
    const void *slots;
    Py_ssize_t n;
    float *to;
    struct error error = {0};
    int failed = 1, begun = 1;
    if (engine_begin(self->owner, 1))
        return NULL;
    const struct model_facts *f = &self->owner->model->facts;
    if (!(view = array_view(array, 'I', "slots", &slots, &n)))
        goto done;
    Py_ssize_t dims[] = {2, f->n_layers, n, (Py_ssize_t)f->n_kv_heads * f->d_head};
    if (!(result = array_zeros(4, dims, &to)))
        goto done;
    ENGINE_WORK(self->owner, failed,
                run_cache_read(self->owner->work, self->cache, slots, (uint32_t)n, to, &error));
    begun = 0;
done:
    if (!engine_finish(self->owner, begun, failed, &error))
        Py_CLEAR(result);
    Py_XDECREF(view);
    return result;
}

static PyObject *cache_edited(PyObject *object, PyObject *args) {
    struct cache_object *self = (struct cache_object *)object;
    unsigned int slot;
    if (!PyArg_ParseTuple(args, "I", &slot))
        return NULL;
    if (slot >= self->cache->n_slots)
        return PyErr_Format(PyExc_ValueError, "slot %u of a cache of %u", slot,
                            self->cache->n_slots);
    return PyBool_FromLong(self->cache->state[slot] & RUN_CACHE_EDITED);
}

static PyMethodDef cache_methods[] = {
    {"copy", cache_copy, METH_VARARGS,
     "copy(from, to uint32 [places], n, first_layer=0): copies n slots to every place."},
    {"add", cache_add, METH_VARARGS,
     "add(slots uint32 [n], which uint32 [n], values float32 [m, 2, layers, G * dh]): adds "
     "values[which[i]] to the keys and values of slots[i], once."},
    {"read", cache_read, METH_O,
     "read(slots uint32 [n]): keys and values, float32 [2, layers, n, G * dh]."},
    {"edited", cache_edited, METH_VARARGS, "edited(slot): whether `add` changed it."},
    {NULL, NULL, 0, NULL}};

static PyType_Slot cache_slots[] = {{Py_tp_new, cache_new},
                                    {Py_tp_methods, cache_methods},
                                    {Py_tp_dealloc, cache_dealloc},
                                    {Py_tp_doc, "Cache(model, n_slots): keys and values."},
                                    {0, NULL}};
PyType_Spec cache_spec = {
    .name = "vksteer._engine.Cache",
    .basicsize = sizeof(struct cache_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = cache_slots,
};
