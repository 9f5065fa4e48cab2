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

static PyMethodDef cache_methods[] = {
    {"copy", cache_copy, METH_VARARGS,
     "copy(from, to uint32 [places], n, first_layer=0): copies n slots to every place."},
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
