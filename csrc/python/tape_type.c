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
    PyObject *object = engine_owned_new(type, model, capacity > 0 && capacity <= 1u << 20,
                                        "Tape(model, capacity, first_layer) needs a Model and a "
                                        "capacity of 1 to 1,048,576 tokens");
    if (!object)
        return NULL;
    struct tape_object *self = (struct tape_object *)object;
    struct model *m = self->owner->model;
    if (first_layer >= m->facts.n_layers)
        failed = error_set(&error, ERROR_VALUE, "layer %u of %u", first_layer, m->facts.n_layers);
    else
        failed = run_work_create(&self->work, m, capacity, run_sizes_of(m).readback, &error) ||
                 run_tape_create(&self->tape, self->work, capacity, first_layer, keep_inside,
                                 &error);
    return engine_owned_made(object, failed, &error);
}

static void tape_destroy(PyObject *object) {
    struct tape_object *self = (struct tape_object *)object;
    if (self->work && !self->owner->model)
        self->work->model = NULL;
    if (self->work && self->work->model)
        gpu_queue_wait(self->work->model->ops.queue, NULL);
    run_tape_destroy(self->tape);
    run_work_destroy(self->work);
}

static void tape_dealloc(PyObject *object) { engine_owned_free(object, tape_destroy); }

/* The scalar: metric = (kind, capped, tokens, a, b, weights, reference, other, reference_logits,
 * margin, faith), the last two for a choice alone. Makes the array of its values. */
PyObject *batch_metric_read(struct batch_arguments *a, const struct model *model, PyObject *tuple,
                            struct run_metric *metric) {
    PyObject *in[7];
    int kind;
    if (!PyArg_ParseTuple(tuple, "ipOOOOOOO|ff", &kind, &metric->capped, &in[0], &in[1], &in[2],
                          &in[3], &in[4], &in[5], &in[6], &metric->margin, &metric->faith))
        return NULL;
    if (kind < METRIC_PAIR || kind > METRIC_CHOICE || !PyObject_HasAttrString(in[0], "__len__") ||
        PyObject_Length(in[0]) < 1)
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
    int log_prob = kind == METRIC_LOG_PROB, choice = kind == METRIC_CHOICE,
        pair = kind == METRIC_PAIR || choice;
    if (!metric->weights || (pair && (!metric->a || !metric->b)) || (log_prob && !metric->a) ||
        (kind != METRIC_PAIR && !log_prob && !metric->reference &&
         !((kind == METRIC_KL || choice) && metric->reference_logits)) ||
        (kind == METRIC_DIRECTIONAL_KL && !metric->other))
        return PyErr_Format(PyExc_ValueError, "a metric of kind %d lacks an array", kind);
    for (uint32_t i = 0; i < metric->n; i++)
        if (metric->tokens[i] >= a->n_tokens || (i && metric->tokens[i] <= metric->tokens[i - 1]) ||
            (metric->a && metric->a[i] >= model->facts.d_vocab) ||
            (metric->b && metric->b[i] >= model->facts.d_vocab))
            return PyErr_Format(
                PyExc_ValueError,
                "metric token %u: tokens must ascend and lie in the batch, ids in the vocabulary",
                i);
    Py_ssize_t dims[2] = {n, 2};
    return array_zeros(pair ? 2 : 1, dims, &metric->values);
}

/* scalings = [(site, layer)], sites of width D. Makes *out (free it) and puts the arrays into
 * `dict` under their pair. */
static int scalings_read(const struct model *model, const struct batch_arguments *a, PyObject *list,
                         int sums, unsigned int skip, PyObject *dict, struct run_scaling **out,
                         uint32_t *n_out) {
    Py_ssize_t n = list ? PyList_Size(list) : 0;
    *out = calloc((size_t)n + 1, sizeof **out);
    if (!*out)
        return PyErr_NoMemory(), -1;
    for (Py_ssize_t i = 0; i < n; i++) {
        struct run_scaling *scaling = &(*out)[i];
        PyObject *pair = PyList_GetItem(list, i);
        if (!PyArg_ParseTuple(pair, "ii", &scaling->site, &scaling->layer))
            return -1;
        if (scaling->site < 0 || scaling->site >= SITE_COUNT ||
            !site_exists(scaling->site, scaling->layer, &model->facts) ||
            site_kind(scaling->site) != SITE_KIND_WIDTH) {
            PyErr_Format(PyExc_KeyError, "no site %d of the model's width in layer %d",
                         scaling->site, scaling->layer);
            return -1;
        }
        scaling->sums = sums;
        scaling->skip = skip;
        Py_ssize_t shape[2] = {sums ? (Py_ssize_t)a->batch.n_rows : (Py_ssize_t)a->n_out_rows,
                               sums ? (Py_ssize_t)model->facts.d_model
                                    : (Py_ssize_t)a->batch.n_columns};
        PyObject *array = array_zeros(2, shape, &scaling->to);
        int failed = !array || PyDict_SetItem(dict, pair, array);
        Py_XDECREF(array);
        if (failed)
            return -1;
    }
    *n_out = (uint32_t)n;
    return 0;
}

/* differentiate(cache, rows, gradients [(site, layer)], metric, stop_layer, scalings=[],
 * sums=False, skip=0) -> (values, {(site, layer): gradient}, {(site, layer): scaling gradient}) */
static PyObject *tape_differentiate(PyObject *object, PyObject *args, PyObject *keywords) {
    static char *names[] = {"cache",    "rows", "gradients", "metric", "stop_layer",
                            "scalings", "sums", "skip",      NULL};
    struct tape_object *self = (struct tape_object *)object;
    struct model_object *owner = self->owner;
    PyObject *cache, *rows, *list, *tuple, *dict = NULL, *values = NULL, *result = NULL;
    PyObject *scalings = NULL, *scaled = NULL;
    struct run_scaling *asked = NULL;
    unsigned int skip = 0;
    struct batch_arguments a = {0};
    struct run_metric metric = {0};
    struct run_backward backward = {.metric = &metric};
    struct error error = {0};
    int failed = 1, begun = 1, sums = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO!O!I|O!pI", names, &cache, &rows,
                                     &PyList_Type, &list, &PyTuple_Type, &tuple,
                                     &backward.stop_layer, &PyList_Type, &scalings, &sums, &skip) ||
        engine_begin(owner, 1))
        return NULL;
    dict = PyDict_New();
    scaled = PyDict_New();
    if (!dict || !scaled || batch_read(&a, owner, cache, rows) ||
        batch_captures_read(owner->model, &a, list, dict, &a.captures, &backward.n_captures) ||
        scalings_read(owner->model, &a, scalings, sums, skip, scaled, &asked,
                      &backward.n_scalings) ||
        !(values = batch_metric_read(&a, owner->model, tuple, &metric)))
        goto done;
    backward.captures = a.captures;
    backward.scalings = asked;
    ENGINE_WORK(owner, failed,
                run_differentiate(self->work, self->tape, a.cache, &a.batch, &backward, &error));
    begun = 0;
done:
    if (engine_finish(owner, begun, failed, &error))
        result = Py_BuildValue("(OOO)", values, dict, scaled);
    batch_release(&a);
    free(asked);
    Py_XDECREF(values);
    Py_XDECREF(dict);
    Py_XDECREF(scaled);
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
    struct run_sizes sizes = run_sizes_of(((struct model_object *)model)->model);
    if (first_layer >= f->n_layers)
        return PyErr_Format(PyExc_ValueError, "layer %u of %u", first_layer, f->n_layers);
    return PyLong_FromUnsignedLongLong(
        run_tape_bytes(f, sizes.scratch, capacity, capacity, first_layer, keep_inside) +
        run_work_bytes(f, sizes.scratch, capacity, capacity, sizes.readback, 1));
}
