/* Tape: memory for the backward pass, and the gradients that they give. */
#include "engine.h"

#include <stdlib.h>

static PyObject *tape_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"model", "capacity", "first_layer", "keep_inside", NULL};
    PyObject *model;
    unsigned int capacity, first_layer;
    int keep_inside = 1, failed;
    struct error error = {0};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OII|p", names, &model, &capacity,
                                     &first_layer, &keep_inside))
        return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct tape_object *self = (struct tape_object *)allocate(type, 0);
    if (!self)
        return NULL;
    if ((PyObject *)Py_TYPE(model) != engine_state_of((PyObject *)self)->model_type ||
        capacity == 0 || capacity > 1u << 20) {
        PyErr_SetString(PyExc_TypeError, "Tape(model, capacity, first_layer) needs a Model and a "
                                         "capacity of 1 to 1,048,576 tokens");
        Py_CLEAR(self);
        return NULL;
    }
    if (engine_begin((struct model_object *)model, 1)) {
        Py_CLEAR(self);
        return NULL;
    }
    self->owner = (struct model_object *)Py_NewRef(model);
    if (first_layer >= self->owner->model->facts.n_layers)
        failed = error_set(&error, ERROR_VALUE, "layer %u of %u", first_layer,
                           self->owner->model->facts.n_layers);
    else
        failed = run_work_create(&self->work, self->owner->model, capacity, RUN_READBACK, &error) ||
                 run_tape_create(&self->tape, self->work, capacity, first_layer, keep_inside,
                                 &error);
    engine_end(self->owner);
    if (failed) {
        engine_raise((PyObject *)self, &error);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void tape_dealloc(PyObject *object) {
    struct tape_object *self = (struct tape_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->owner)
        engine_lock(self->owner->owner);
    if (self->work && self->owner && !self->owner->model)
        self->work->model = NULL; /* closed meanwhile: its queue is idle and gone */
    if (self->work && self->work->model)
        gpu_queue_wait(self->work->model->ops.queue, NULL);
    run_tape_destroy(self->tape);
    run_work_destroy(self->work);
    if (self->owner)
        engine_unlock(self->owner->owner);
    Py_XDECREF((PyObject *)self->owner);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* The scalar: metric = (kind, capped, tokens, a, b, weights, reference, other, reference_logits).
 * Makes the array of its values. */
PyObject *batch_metric_read(struct batch_arguments *a, const struct model *model, PyObject *tuple,
                            struct run_metric *metric) {
    PyObject *in[7];
    int kind;
    if (!PyArg_ParseTuple(tuple, "ipOOOOOOO", &kind, &metric->capped, &in[0], &in[1], &in[2],
                          &in[3], &in[4], &in[5], &in[6]))
        return NULL;
    if (kind < METRIC_PAIR || kind > METRIC_DIRECTIONAL_KL ||
        !PyObject_HasAttrString(in[0], "__len__") || PyObject_Length(in[0]) < 1)
        return PyErr_Format(PyExc_ValueError, "a metric of kind %d needs tokens", kind);
    Py_ssize_t n = PyObject_Length(in[0]), d = (Py_ssize_t)model->facts.d_model;
    metric->kind = (enum run_metric_kind)kind;
    metric->n = (uint32_t)n;
    if (batch_borrow(a, in[0], 'I', "metric tokens", n, (const void **)&metric->tokens) ||
        batch_borrow(a, in[1], 'I', "a", n, (const void **)&metric->a) ||
        batch_borrow(a, in[2], 'I', "b", n, (const void **)&metric->b) ||
        batch_borrow(a, in[3], 'f', "weights", n, (const void **)&metric->weights) ||
        batch_borrow(a, in[4], 'f', "reference", n * d, (const void **)&metric->reference) ||
        batch_borrow(a, in[5], 'f', "other", n * d, (const void **)&metric->other) ||
        batch_borrow(a, in[6], 'f', "reference_logits", n * (Py_ssize_t)model->facts.d_vocab,
                     (const void **)&metric->reference_logits))
        return NULL;
    int pair = kind == METRIC_PAIR, log_prob = kind == METRIC_LOG_PROB;
    if (!metric->weights || (pair && (!metric->a || !metric->b)) || (log_prob && !metric->a) ||
        (!pair && !log_prob && !metric->reference &&
         !(kind == METRIC_KL && metric->reference_logits)) ||
        (kind == METRIC_DIRECTIONAL_KL && !metric->other))
        return PyErr_Format(PyExc_ValueError, "a metric of kind %d lacks an array", kind);
    uint64_t total = 0;
    for (uint32_t r = 0; r < a->batch.n_rows; r++)
        total += a->batch.n_tokens[r];
    for (uint32_t i = 0; i < metric->n; i++)
        if (metric->tokens[i] >= total || (i && metric->tokens[i] <= metric->tokens[i - 1]) ||
            (metric->a && metric->a[i] >= model->facts.d_vocab) ||
            (metric->b && metric->b[i] >= model->facts.d_vocab))
            return PyErr_Format(
                PyExc_ValueError,
                "metric token %u: tokens must ascend and lie in the batch, ids in the vocabulary",
                i);
    Py_ssize_t dims[2] = {n, 2};
    return array_zeros(pair ? 2 : 1, dims, &metric->values);
}

/* differentiate(cache, rows (tuple of 9 arrays: tokens, n_tokens, start, slot, group,
 *               edit_row, out_row, column, key_column), n_out_rows, n_columns, n_keys,
 *               gradients [(site, layer)], metric, edits, first_layer, inputs, stop_layer) ->
 *               (values, {(site, layer): gradient}) */
static PyObject *tape_differentiate(PyObject *object, PyObject *args, PyObject *keywords) {
    static char *names[] = {"cache",       "rows",      "n_out_rows", "n_columns",
                            "n_keys",      "gradients", "metric",     "edits",
                            "first_layer", "inputs",    "stop_layer", NULL};
    struct tape_object *self = (struct tape_object *)object;
    struct model_object *owner = self->owner;
    PyObject *cache, *rows, *list, *tuple, *edits = Py_None, *inputs = Py_None, *in[13] = {NULL},
                                           *dict = NULL, *values = NULL, *result = NULL;
    unsigned int stop_layer = 0;
    struct batch_arguments a = {0};
    struct run_metric metric = {0};
    struct run_backward backward = {.metric = &metric};
    struct run_capture *gradients = NULL;
    struct error error = {0};
    int failed = 1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO!IIIO!O!|OIOI", names, &cache,
                                     &PyTuple_Type, &rows, &a.n_out_rows, &a.batch.n_columns,
                                     &a.batch.n_keys, &PyList_Type, &list, &PyTuple_Type, &tuple,
                                     &edits, &a.batch.first_layer, &inputs, &stop_layer))
        return NULL;
    if (PyTuple_Size(rows) != 9)
        return PyErr_Format(PyExc_TypeError, "rows must be nine arrays");
    for (Py_ssize_t i = 0; i < 9; i++)
        in[i] = PyTuple_GetItem(rows, i);
    if (batch_owners_read(&a, owner, cache, edits) || engine_begin(owner, 1))
        return NULL;
    int begun = 1;
    dict = PyDict_New();
    if (!dict || batch_rows_read(&a, owner->model, in) || batch_places_check(&a) ||
        batch_inputs_read(&a, owner->model, inputs) ||
        batch_captures_read(owner->model, &a, list, dict, &gradients, &backward.n_captures) ||
        !(values = batch_metric_read(&a, owner->model, tuple, &metric)))
        goto done;
    backward.captures = gradients;
    backward.stop_layer = stop_layer;
    ENGINE_WORK(owner, failed,
                run_differentiate(self->work, self->tape, a.cache, &a.batch, &backward, &error));
    begun = 0;
    if (failed)
        engine_fail(owner, &error);
    else
        result = Py_BuildValue("(OO)", values, dict);
done:
    if (begun)
        engine_end(owner);
    batch_release(&a);
    free(gradients);
    Py_XDECREF(values);
    Py_XDECREF(dict);
    return result;
}

static PyMethodDef tape_methods[] = {
    {"differentiate", (PyCFunction)(void (*)(void))tape_differentiate, METH_VARARGS | METH_KEYWORDS,
     "differentiate(...): a batch's forward and backward pass; see csrc/run/tape.h."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot tape_slots[] = {
    {Py_tp_new, tape_new},
    {Py_tp_dealloc, tape_dealloc},
    {Py_tp_methods, tape_methods},
    {Py_tp_doc, "Tape(model, capacity, first_layer, keep_inside=True): memory for gradients "
                "through layers >= first_layer."},
    {0, NULL}};
PyType_Spec tape_spec = {
    .name = "vksteer._engine.Tape",
    .basicsize = sizeof(struct tape_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = tape_slots,
};

/* tape_bytes(model, capacity, first_layer, keep_inside) -> int: device bytes that
 * such a Tape would take. */
PyObject *engine_tape_bytes(PyObject *module, PyObject *args) {
    PyObject *model;
    unsigned int capacity, first_layer;
    int keep_inside;
    if (!PyArg_ParseTuple(args, "OIIp", &model, &capacity, &first_layer, &keep_inside))
        return NULL;
    struct engine_state *state = PyModule_GetState(module);
    if ((PyObject *)Py_TYPE(model) != state->model_type || !((struct model_object *)model)->model)
        return PyErr_Format(PyExc_TypeError, "tape_bytes needs an open Model");
    const struct model_facts *f = &((struct model_object *)model)->model->facts;
    if (first_layer >= f->n_layers)
        return PyErr_Format(PyExc_ValueError, "layer %u of %u", first_layer, f->n_layers);
    return PyLong_FromUnsignedLongLong(run_tape_bytes(f, capacity, first_layer, keep_inside) +
                                       run_work_bytes(f, capacity, RUN_READBACK));
}
