/* Attribution: the engine's side of vs.patching.attribute; see csrc/analysis/attribution.h. */
#include "engine.h"

#include <stdlib.h>

static PyObject *attribution_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {
        "model",           "capacity", "step_capacity", "longest",     "first_layer",
        "n_sample_tokens", "n_steps",  "normed",        "keep_inside", NULL};
    PyObject *model;
    struct attribution_sizes s = {.keep_inside = 1};
    int failed;
    struct error error = {0};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OIIIIII|pp", names, &model, &s.capacity,
                                     &s.step_capacity, &s.longest, &s.first_layer,
                                     &s.n_sample_tokens, &s.n_steps, &s.normed, &s.keep_inside))
        return NULL;
    int valid = s.step_capacity && s.capacity >= s.step_capacity && s.capacity <= 1u << 20 &&
                s.longest && s.longest <= s.capacity && s.n_sample_tokens &&
                s.n_sample_tokens <= 1u << 20 && s.n_steps && s.n_steps <= 1u << 16;
    PyObject *object =
        engine_owned_new(type, model, valid,
                         "Attribution(model, capacity, step_capacity, longest, first_layer, "
                         "n_sample_tokens, n_steps) needs a Model and sizes from 1 on");
    if (!object)
        return NULL;
    struct attribution_object *self = (struct attribution_object *)object;
    struct model *m = self->owner->model;
    failed = s.first_layer >= m->facts.n_layers
                 ? error_set(&error, ERROR_VALUE, "layer %u of %u", s.first_layer,
                             m->facts.n_layers)
                 : attribution_create(&self->attribution, m, &s, &error);
    return engine_owned_made(object, failed, &error);
}

static void attribution_destroy_object(PyObject *object) {
    struct attribution_object *self = (struct attribution_object *)object;
    if (self->attribution && !self->owner->model)
        self->attribution->work->model = NULL;
    attribution_destroy(self->attribution);
}

static void attribution_dealloc(PyObject *object) {
    engine_owned_free(object, attribution_destroy_object);
}

/* forward(cache, rows, sample_token, pairs uint32 [n, 2], picks uint32 [m, 2], capped, kl) -> (top
 * int32 [m, 2], margin float32 [m, 2], kl float32 [m], normed float32 [m, 2, D]) */
static PyObject *attribution_forward_method(PyObject *object, PyObject *args) {
    struct attribution_object *self = (struct attribution_object *)object;
    struct model_object *owner = self->owner;
    PyObject *cache, *rows, *pairs, *tokens, *out[4] = {NULL}, *result = NULL;
    struct batch_arguments a = {0};
    struct attribution_picks picks = {0};
    struct error error = {0};
    const uint32_t *items;
    Py_ssize_t n, m;
    unsigned int sample_token;
    int failed = 1, begun = 1, kl;
    if (!PyArg_ParseTuple(args, "OOIOOpp", &cache, &rows, &sample_token, &pairs, &tokens,
                          &picks.capped, &kl) ||
        engine_begin(owner, 1))
        return NULL;
    if (batch_read(&a, owner, cache, rows) || batch_list(&a, pairs, "pairs", &items, &n) ||
        batch_list(&a, tokens, "picks", &picks.tokens, &m))
        goto done;
    for (Py_ssize_t i = 0; i < m; i++)
        if (picks.tokens[i] >= a.n_tokens) {
            PyErr_Format(PyExc_ValueError, "a pick of token %u of %llu", picks.tokens[i],
                         (unsigned long long)a.n_tokens);
            goto done;
        }
    Py_ssize_t dims[3] = {m / 2, 2, owner->model->facts.d_model};
    picks.m = (uint32_t)(m / 2);
    out[0] = array_zeros_int(2, dims, &picks.top);
    out[1] = array_zeros(2, dims, &picks.margin);
    out[2] = array_zeros(1, dims, &picks.kl);
    out[3] = array_zeros(3, dims, &picks.normed);
    if (!out[0] || !out[1] || !out[2] || !out[3])
        goto done;
    if (!kl)
        picks.kl = NULL;
    ENGINE_WORK(owner, failed,
                attribution_forward(self->attribution, a.cache, &a.batch, sample_token,
                                    (uint32_t)(n / 2), items, &picks, &error));
    begun = 0;
done:
    if (engine_finish(owner, begun, failed, &error))
        result = PyTuple_Pack(4, out[0], out[1], out[2], out[3]);
    batch_release(&a);
    for (int i = 0; i < 4; i++)
        Py_XDECREF(out[i]);
    return result;
}

/* step(cache, rows, metric, sample_token, sources uint32 [n, k], k, first_step) -> values of the
 * metric */
static PyObject *attribution_step_method(PyObject *object, PyObject *args) {
    struct attribution_object *self = (struct attribution_object *)object;
    struct model_object *owner = self->owner;
    PyObject *cache, *rows, *tuple, *sources, *values = NULL, *result = NULL;
    struct batch_arguments a = {0};
    struct run_metric metric = {0};
    struct error error = {0};
    const uint32_t *items;
    Py_ssize_t n;
    unsigned int sample_token, n_sources, first_step;
    int failed = 1, begun = 1;
    if (!PyArg_ParseTuple(args, "OOO!IOII", &cache, &rows, &PyTuple_Type, &tuple, &sample_token,
                          &sources, &n_sources, &first_step))
        return NULL;
    if (n_sources == 0)
        return PyErr_Format(PyExc_ValueError, "no steps");
    if (engine_begin(owner, 1))
        return NULL;
    if (batch_read(&a, owner, cache, rows) ||
        !(values = batch_metric_read(&a, owner->model, tuple, &metric)) ||
        batch_list(&a, sources, "sources", &items, &n))
        goto done;
    ENGINE_WORK(owner, failed,
                attribution_step(self->attribution, a.cache, &a.batch, &metric, sample_token,
                                 (uint32_t)(n / n_sources), items, n_sources, first_step, &error));
    begun = 0;
done:
    if (engine_finish(owner, begun, failed, &error))
        result = Py_NewRef(values);
    batch_release(&a);
    Py_XDECREF(values);
    return result;
}

static PyObject *attribution_reset_method(PyObject *object, PyObject *unused) {
    (void)unused;
    struct attribution_object *self = (struct attribution_object *)object;
    struct error error = {0};
    if (engine_begin(self->owner, 1))
        return NULL;
    int failed = attribution_reset(self->attribution, &error);
    engine_end(self->owner);
    return failed ? engine_fail(self->owner, &error) : Py_NewRef(Py_None);
}

static int contract_tiles(struct attribution *a, const uint32_t *tiles, uint32_t n,
                          const float *steer, double *const to[3], uint32_t dims_rows,
                          struct error *error) {
    for (uint32_t i = 0; i < n; i++)
        if (attribution_contract(a, tiles[2 * i], tiles[2 * i + 1], steer, to[0], to[1], to[2],
                                 dims_rows, error))
            return -1;
    return 0;
}

/* contract(tiles uint32 [n, 2] (first sample token, count), steer float32 [D], dims_rows) -> (edges
 * float64 [nodes, inputs], nodes float64 [nodes], dims float64 [dims_rows, D]): the sums over the
 * tiles, in their order. */
static PyObject *attribution_contract_method(PyObject *object, PyObject *args) {
    struct attribution_object *self = (struct attribution_object *)object;
    struct model_object *owner = self->owner;
    PyObject *tiles, *steer, *views[2] = {NULL}, *out[3] = {NULL}, *result = NULL;
    unsigned int dims_rows;
    const void *items, *vector;
    Py_ssize_t n, width;
    double *to[3];
    struct error error = {0};
    int failed = 0;
    if (!PyArg_ParseTuple(args, "OOI", &tiles, &steer, &dims_rows) || engine_begin(owner, 1))
        return NULL;
    int begun = 1;
    uint32_t nodes = attribution_nodes(self->attribution),
             inputs = attribution_inputs(self->attribution), d = owner->model->facts.d_model;
    views[0] = array_view(tiles, 'I', "tiles", &items, &n);
    views[1] = views[0] ? array_view(steer, 'f', "steer", &vector, &width) : NULL;
    if (!views[1])
        goto done;
    if (width != (Py_ssize_t)d || dims_rows > nodes || n % 2) {
        PyErr_Format(PyExc_ValueError, "steer must have %u values, dims_rows be at most %u", d,
                     nodes);
        goto done;
    }
    out[0] = array_zeros_double(2, (Py_ssize_t[]){nodes, inputs}, &to[0]);
    out[1] = array_zeros_double(1, (Py_ssize_t[]){nodes}, &to[1]);
    out[2] = array_zeros_double(2, (Py_ssize_t[]){dims_rows, d}, &to[2]);
    if (!out[0] || !out[1] || !out[2])
        goto done;
    ENGINE_WORK(
        owner, failed,
        contract_tiles(self->attribution, items, (uint32_t)(n / 2), vector, to, dims_rows, &error));
    begun = 0;
done:
    if (engine_finish(owner, begun, failed, &error))
        result = PyTuple_Pack(3, out[0], out[1], out[2]);
    for (int i = 0; i < 2; i++)
        Py_XDECREF(views[i]);
    for (int i = 0; i < 3; i++)
        Py_XDECREF(out[i]);
    return result;
}

/* attribution_bytes(model, capacity, step_capacity, longest, first_layer, n_sample_tokens, n_steps,
 * normed, keep_inside) -> (bytes of an attribution, of its split rows on matrix units) */
PyObject *engine_attribution_bytes(PyObject *module, PyObject *args) {
    PyObject *model;
    struct attribution_sizes s;
    if (!PyArg_ParseTuple(args, "OIIIIIIpp", &model, &s.capacity, &s.step_capacity, &s.longest,
                          &s.first_layer, &s.n_sample_tokens, &s.n_steps, &s.normed,
                          &s.keep_inside))
        return NULL;
    struct engine_state *state = PyModule_GetState(module);
    if ((PyObject *)Py_TYPE(model) != state->model_type || !((struct model_object *)model)->model)
        return PyErr_Format(PyExc_TypeError, "attribution_bytes needs an open Model");
    const struct model_facts *f = &((struct model_object *)model)->model->facts;
    uint64_t scratch = run_sizes_of(((struct model_object *)model)->model).scratch;
    if (s.first_layer >= f->n_layers)
        return PyErr_Format(PyExc_ValueError, "layer %u of %u", s.first_layer, f->n_layers);
    return Py_BuildValue("(KK)", (unsigned long long)attribution_bytes(f, scratch, &s),
                         (unsigned long long)attribution_split_bytes(f, &s));
}

static PyMethodDef attribution_methods[] = {
    {"forward", attribution_forward_method, METH_VARARGS,
     "forward(...): clean and corrupt runs; see csrc/analysis/attribution.h."},
    {"step", attribution_step_method, METH_VARARGS,
     "step(...): forward and backward passes of integration steps."},
    {"reset", attribution_reset_method, METH_NOARGS, "reset(): gradients become zero."},
    {"contract", attribution_contract_method, METH_VARARGS,
     "contract(tiles, steer, dims_rows) -> (edges, nodes, dims)."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot attribution_slots[] = {
    {Py_tp_new, attribution_new},
    {Py_tp_dealloc, attribution_dealloc},
    {Py_tp_methods, attribution_methods},
    {Py_tp_doc,
     "Attribution(model, capacity, step_capacity, first_layer, n_sample_tokens, n_steps, "
     "normed=False, keep_inside=True): scores of EAP-IG."},
    {0, NULL}};
PyType_Spec attribution_spec = {
    .name = "vksteer._engine.Attribution",
    .basicsize = sizeof(struct attribution_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = attribution_slots,
};
