/* The type Circuits, which runs the model under circuits beside the base run
 * (csrc/analysis/circuit.h), and the function measure, which computes metrics of final rows. */
#include "engine.h"

#include "analysis/circuit.h"

struct circuits_object {
    PyObject_HEAD
    struct model_object *owner;
    struct circuit_run *run;
};

#define PLAN_ARRAYS 15

/* plan: entry_first, ref_first, refs, state_first, states, output_first, outputs, variant_first,
 * variants, mask_first, masks, q_row_first, q_rows, k_row_first, k_rows (uint32 each). */
static int plan_read(struct batch_arguments *a, const struct model_facts *f, PyObject *tuple,
                     struct circuit_plan *plan) {
    static const char *const names[PLAN_ARRAYS] = {
        "entry_first",  "ref_first",   "refs",          "state_first", "states",
        "output_first", "outputs",     "variant_first", "variants",    "mask_first",
        "masks",        "q_row_first", "q_rows",        "k_row_first", "k_rows"};
    const uint32_t **to[PLAN_ARRAYS] = {
        &plan->entry_first, &plan->ref_first,    &plan->refs,    &plan->state_first,
        &plan->states,      &plan->output_first, &plan->outputs, &plan->variant_first,
        &plan->variants,    &plan->mask_first,   &plan->masks,   &plan->q_row_first,
        &plan->q_rows,      &plan->k_row_first,  &plan->k_rows};
    Py_ssize_t length[PLAN_ARRAYS], n = (Py_ssize_t)f->n_layers - plan->first_layer,
                                    w = f->n_heads + 2 * f->n_kv_heads + 1;
    if (PyTuple_Size(tuple) != PLAN_ARRAYS || n < 1)
        return PyErr_Format(PyExc_ValueError, "a plan has %d arrays, from a layer of the model on",
                            PLAN_ARRAYS),
               -1;
    for (int i = 0; i < PLAN_ARRAYS; i++) {
        PyObject *array = PyTuple_GetItem(tuple, i);
        if (batch_borrow(a, array, 'I', names[i], -1, (const void **)to[i]))
            return -1;
        length[i] = *to[i] ? PyObject_Length(array) : -1;
        if (length[i] < 0 || length[i] >= INT32_MAX)
            return PyErr_Format(PyExc_ValueError, "%s is missing or too long", names[i]), -1;
    }
    if (length[0] != n * w + 2 || length[1] < 1 || length[3] != n + 1 || length[4] % 4 ||
        length[5] != n + 1 || length[6] % 3 || length[7] != n + 1 || length[8] % f->n_heads ||
        length[9] != 2 * n + 2 || length[11] != n + 1 || length[12] % f->n_heads ||
        length[13] != n + 1 || length[14] % f->n_kv_heads)
        return PyErr_Format(PyExc_ValueError, "the arrays of a plan do not fit the model"), -1;
    plan->n_entries = (uint32_t)length[1] - 1;
    plan->n_refs = (uint32_t)length[2];
    plan->n_states = (uint32_t)length[4] / 4;
    plan->n_outputs = (uint32_t)length[6] / 3;
    plan->n_variants = (uint32_t)length[8] / f->n_heads;
    plan->n_masks = (uint32_t)length[10];
    plan->n_q_rows = (uint32_t)length[12] / f->n_heads;
    plan->n_k_rows = (uint32_t)length[14] / f->n_kv_heads;
    return 0;
}

static PyObject *circuits_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"model", "first_layer", "plan", NULL};
    PyObject *model, *tuple;
    struct circuit_plan plan = {0};
    struct batch_arguments a = {0};
    struct error error = {0};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OIO!", names, &model, &plan.first_layer,
                                     &PyTuple_Type, &tuple))
        return NULL;
    PyObject *object = engine_owned_new(type, model, 1,
                                        "Circuits(model, first_layer, plan) needs a Model");
    if (!object)
        return NULL;
    struct circuits_object *self = (struct circuits_object *)object;
    struct model *m = self->owner->model;
    int failed = plan_read(&a, &m->facts, tuple, &plan) ||
                 circuit_create(&self->run, m, &plan, &error);
    batch_release(&a);
    return engine_owned_made(object, failed, &error);
}

static void circuits_destroy(PyObject *object) {
    struct circuits_object *self = (struct circuits_object *)object;
    if (self->run && !self->owner->model) {
        self->run->model = NULL;
        if (self->run->work)
            self->run->work->model = NULL;
    }
    circuit_destroy(self->run);
}

static void circuits_dealloc(PyObject *object) { engine_owned_free(object, circuits_destroy); }

/* bytes(capacity, n_slots, longest, distributions) -> (device bytes of passes with that memory,
 * those of the largest buffer) */
static PyObject *circuits_bytes(PyObject *object, PyObject *args) {
    struct circuits_object *self = (struct circuits_object *)object;
    unsigned int capacity, n_slots, longest;
    uint64_t largest, total;
    int distributions;
    if (!PyArg_ParseTuple(args, "IIIp", &capacity, &n_slots, &longest, &distributions) ||
        engine_begin(self->owner, 1))
        return NULL;
    total = circuit_bytes(self->run, capacity, n_slots, longest, distributions, &largest);
    engine_end(self->owner);
    return Py_BuildValue("(KK)", (unsigned long long)total, (unsigned long long)largest);
}

/* reserve(capacity, n_slots, longest, steer): memory for passes. */
static PyObject *circuits_reserve(PyObject *object, PyObject *args) {
    struct circuits_object *self = (struct circuits_object *)object;
    PyObject *steer;
    unsigned int capacity, n_slots, longest;
    const void *data;
    Py_ssize_t n;
    struct error error = {0};
    if (!PyArg_ParseTuple(args, "IIIO", &capacity, &n_slots, &longest, &steer))
        return NULL;
    PyObject *view = array_view(steer, 'f', "steer", &data, &n);
    if (!view || engine_begin(self->owner, 1)) {
        Py_XDECREF(view);
        return NULL;
    }
    int failed;
    if (n != (Py_ssize_t)self->owner->model->facts.d_model || capacity == 0 ||
        capacity > 1u << 20 || n_slots == 0)
        failed =
            error_set(&error, ERROR_VALUE,
                      "steer [D], a capacity of 1 to 1,048,576 tokens and cache slots are needed");
    else
        failed = circuit_reserve(self->run, capacity, n_slots, longest, data, &error);
    engine_end(self->owner);
    Py_DECREF(view);
    if (failed)
        return engine_raise(object, &error);
    return Py_NewRef(Py_None);
}

/* request = (softcap, a, b, reference, other, targets, logits): what is read of n_tokens
 * tokens of n_runs runs; arrays or None. *out: (pairs, distributions, logits), each None where it
 * is not requested. */
static int request_read(struct batch_arguments *a, const struct model_facts *f, PyObject *tuple,
                        Py_ssize_t n_runs, struct read_request *read, PyObject **out) {
    PyObject *in[5], *arrays[3] = {NULL, NULL, NULL};
    int logits;
    Py_ssize_t n = read->n, d = (Py_ssize_t)f->d_model, dims[3] = {n_runs, n, 0};
    if (!PyArg_ParseTuple(tuple, "fOOOOOp", &read->softcap, &in[0], &in[1], &in[2], &in[3], &in[4],
                          &logits))
        return -1;
    if (batch_borrow(a, in[0], 'I', "a", n, (const void **)&read->a) ||
        batch_borrow(a, in[1], 'I', "b", n, (const void **)&read->b) ||
        batch_borrow(a, in[2], 'f', "reference", n * d, (const void **)&read->reference) ||
        batch_borrow(a, in[3], 'f', "other", n * d, (const void **)&read->other) ||
        batch_borrow(a, in[4], 'I', "targets", n, (const void **)&read->targets))
        return -1;
    if (!read->a != !read->b || !read->reference != !read->other ||
        !read->reference != !read->targets)
        return PyErr_Format(PyExc_ValueError, "a request lacks an array"), -1;
    for (Py_ssize_t i = 0; i < n; i++)
        if ((read->a && (read->a[i] >= f->d_vocab || read->b[i] >= f->d_vocab)) ||
            (read->targets && read->targets[i] >= f->d_vocab))
            return PyErr_Format(PyExc_ValueError, "token %zd of a request is not in the vocabulary",
                                i),
                   -1;
    const struct {
        int requested;
        Py_ssize_t each;
        float **to;
    } parts[3] = {{read->a != NULL, 2, &read->pairs},
                  {read->reference != NULL, 4, &read->distributions},
                  {logits, (Py_ssize_t)f->d_vocab, &read->logits}};
    int failed = 0;
    for (int i = 0; i < 3; i++) {
        dims[2] = parts[i].each;
        arrays[i] = parts[i].requested ? array_zeros(3, dims, parts[i].to) : Py_NewRef(Py_None);
        failed = failed || !arrays[i];
    }
    *out = failed ? NULL : Py_BuildValue("(OOO)", arrays[0], arrays[1], arrays[2]);
    for (int i = 0; i < 3; i++)
        Py_XDECREF(arrays[i]);
    return *out ? 0 : -1;
}

/* tokens: the packed tokens whose metrics are read, ascending. */
static int read_tokens(struct batch_arguments *a, PyObject *tokens, struct read_request *read) {
    Py_ssize_t n;
    if (batch_list(a, tokens, "tokens", &read->tokens, &n))
        return -1;
    if (n > INT32_MAX)
        return PyErr_SetString(PyExc_ValueError, "too many tokens to be read"), -1;
    read->n = (uint32_t)n;
    for (uint32_t i = 0; i < read->n; i++)
        if (read->tokens[i] >= a->n_tokens || (i && read->tokens[i] <= read->tokens[i - 1]))
            return PyErr_Format(
                       PyExc_ValueError,
                       "tokens to be read must ascend and lie in the batch: %u is none of %llu",
                       read->tokens[i], (unsigned long long)a->n_tokens),
                   -1;
    return 0;
}

/* forward(cache, rows, tokens, request, mask, token_steer) -> (pairs [E, n, 2], distributions [E,
 * n, 4], logits [E, n, V]) of the E entries of the logits' input */
static PyObject *circuits_forward(PyObject *object, PyObject *args, PyObject *keywords) {
    static char *names[] = {"cache", "rows", "tokens", "request", "mask", "token_steer", NULL};
    struct circuits_object *self = (struct circuits_object *)object;
    struct model_object *owner = self->owner;
    PyObject *cache, *rows, *tokens, *tuple, *values = NULL, *result = NULL;
    PyObject *mask = Py_None, *steer = Py_None;
    struct batch_arguments a = {0};
    struct read_request read = {0};
    struct error error = {0};
    const void *masked, *steered;
    int failed = 1, begun = 1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOO!|OO", names, &cache, &rows, &tokens,
                                     &PyTuple_Type, &tuple, &mask, &steer) ||
        engine_begin(owner, 1))
        return NULL;
    if (batch_read(&a, owner, cache, rows) || read_tokens(&a, tokens, &read) ||
        batch_borrow(&a, mask, 'B', "mask", (Py_ssize_t)a.n_tokens, &masked) ||
        batch_borrow(&a, steer, 'f', "token_steer",
                     (Py_ssize_t)a.n_tokens * (Py_ssize_t)owner->model->facts.d_model, &steered) ||
        request_read(&a, &owner->model->facts, tuple, self->run->n_logits, &read, &values))
        goto done;
    ENGINE_WORK(owner, failed,
                circuit_forward(self->run, a.cache, &a.batch, &read, masked, steered, &error));
    begun = 0;
done:
    if (engine_finish(owner, begun, failed, &error))
        result = Py_NewRef(values);
    batch_release(&a);
    Py_XDECREF(values);
    return result;
}

static PyMethodDef circuits_methods[] = {
    {"bytes", circuits_bytes, METH_VARARGS,
     "bytes(capacity, n_slots) -> (device bytes, bytes of the largest buffer)."},
    {"reserve", circuits_reserve, METH_VARARGS,
     "reserve(capacity, n_slots, steer): memory for passes."},
    {"forward", (PyCFunction)(void (*)(void))circuits_forward, METH_VARARGS | METH_KEYWORDS,
     "forward(...): one pass; see csrc/analysis/circuit.h."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot circuits_slots[] = {
    {Py_tp_new, circuits_new},
    {Py_tp_dealloc, circuits_dealloc},
    {Py_tp_methods, circuits_methods},
    {Py_tp_doc,
     "Circuits(model, first_layer, plan): the model under circuits; see csrc/analysis/circuit.h."},
    {0, NULL}};
PyType_Spec circuits_spec = {
    .name = "vksteer._engine.Circuits",
    .basicsize = sizeof(struct circuits_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = circuits_slots,
};

/* measure(model, rows [n_runs, n, D], n, request) -> (pairs, distributions, None): metrics of
 * normed final rows. */
PyObject *engine_measure(PyObject *module, PyObject *args) {
    PyObject *model, *rows, *tuple, *values = NULL, *result = NULL;
    struct batch_arguments a = {0};
    struct read_request read = {0};
    struct error error = {0};
    unsigned int n;
    const void *data;
    if (!PyArg_ParseTuple(args, "OOIO!", &model, &rows, &n, &PyTuple_Type, &tuple))
        return NULL;
    struct engine_state *state = PyModule_GetState(module);
    if ((PyObject *)Py_TYPE(model) != state->model_type)
        return PyErr_Format(PyExc_TypeError, "measure needs a Model");
    struct model_object *owner = (struct model_object *)model;
    if (engine_begin(owner, 1))
        return NULL;
    int begun = 1, failed = 1;
    const struct model_facts *f = &owner->model->facts;
    read.n = n;
    Py_ssize_t dims[] = {array_is(rows, 'f') ? array_dim(rows, 0) : -1};
    if (n == 0 || dims[0] < 1) {
        PyErr_SetString(PyExc_ValueError, "measure needs float32 rows [runs, n, D]");
        goto done;
    }
    if (batch_borrow(&a, rows, 'f', "rows", dims[0] * (Py_ssize_t)n * (Py_ssize_t)f->d_model,
                     &data) ||
        request_read(&a, f, tuple, dims[0], &read, &values))
        goto done;
    if (read.logits) {
        PyErr_SetString(PyExc_ValueError, "measure gives no logits");
        goto done;
    }
    ENGINE_WORK(owner, failed, read_measure(owner->work, &read, data, (uint32_t)dims[0], &error));
    begun = 0;
done:
    if (engine_finish(owner, begun, failed, &error))
        result = Py_NewRef(values);
    batch_release(&a);
    Py_XDECREF(values);
    return result;
}
