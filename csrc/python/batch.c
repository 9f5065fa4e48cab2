/* A batch as it comes from Python: arrays borrowed and checked, places for what is captured. */
#include "engine.h"

#include <stdlib.h>

/* A per-row (or per-layer) array of exactly `expected` items; None gives NULL. */
int batch_borrow(struct batch_arguments *a, PyObject *object, char type, const char *name,
                 Py_ssize_t expected, const void **data) {
    Py_ssize_t n;
    *data = NULL;
    if (!object || object == Py_None)
        return 0;
    PyObject *view = array_view(object, type, name, data, &n);
    if (!view)
        return -1;
    a->held[a->n_held++] = view;
    if (expected >= 0 && n != expected) {
        PyErr_Format(PyExc_ValueError, "%s has %zd items, not %zd", name, n, expected);
        return -1;
    }
    return 0;
}

/* Every output place must lie inside the arrays that will be made. */
int batch_places_check(const struct batch_arguments *a) {
    const struct run_batch *b = &a->batch;
    for (uint32_t r = 0; r < b->n_rows; r++) {
        if (b->out_row[r] < 0)
            continue;
        int64_t first = (int64_t)b->column[r] + b->start[r], end = first + b->n_tokens[r];
        int64_t key_end = (int64_t)b->key_column[r] + b->start[r] + b->n_tokens[r];
        if ((uint32_t)b->out_row[r] >= a->n_out_rows || first < 0 || end > b->n_columns ||
            b->key_column[r] < 0 || key_end > b->n_keys) {
            PyErr_Format(PyExc_ValueError, "row %u does not fit the output arrays", r);
            return -1;
        }
    }
    return 0;
}

/* A zeroed array for one captured site. */
static PyObject *capture_array(const struct model *model, const struct batch_arguments *a, int site,
                               float **data) {
    uint32_t heads, width;
    site_shape(site, &model->facts, &heads, &width);
    Py_ssize_t rows = a->n_out_rows, columns = a->batch.n_columns;
    switch (site_kind(site)) {
    case SITE_KIND_KEYS:
        return array_zeros(4, (Py_ssize_t[]){rows, heads, columns, a->batch.n_keys}, data);
    case SITE_KIND_QUERY_HEADS:
    case SITE_KIND_KV_HEADS:
    case SITE_KIND_HEADS_WIDTH:
        return array_zeros(4, (Py_ssize_t[]){rows, columns, heads, width}, data);
    default: return array_zeros(3, (Py_ssize_t[]){rows, columns, width}, data);
    }
}

/* `list`: (site, layer) pairs. Makes *captures (free it) and puts the arrays into
 * `dict` under their pair. */
int batch_captures_read(const struct model *model, const struct batch_arguments *a, PyObject *list,
                        PyObject *dict, struct run_capture **captures, uint32_t *n_captures) {
    Py_ssize_t n = PyList_Size(list);
    *n_captures = 0;
    *captures = calloc((size_t)n + 1, sizeof **captures);
    if (!*captures) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        struct run_capture *capture = &(*captures)[*n_captures];
        PyObject *pair = PyList_GetItem(list, i);
        if (!PyArg_ParseTuple(pair, "ii", &capture->site, &capture->layer))
            return -1;
        if (capture->site < 0 || capture->site >= SITE_COUNT ||
            !site_exists(capture->site, &model->facts) || capture->layer < 0 ||
            (uint32_t)capture->layer >=
                (site_is_layered(capture->site) ? model->facts.n_layers : 1)) {
            PyErr_Format(PyExc_KeyError, "no site %d in layer %d", capture->site, capture->layer);
            return -1;
        }
        if (PyDict_Contains(dict, pair))
            continue;
        PyObject *array = capture_array(model, a, capture->site, &capture->to);
        if (!array || PyDict_SetItem(dict, pair, array)) {
            Py_XDECREF(array);
            return -1;
        }
        Py_DECREF(array);
        (*n_captures)++;
    }
    return 0;
}

int batch_rows_read(struct batch_arguments *a, const struct model *model, PyObject **in) {
    static const char *const names[] = {"tokens",   "n_tokens", "start",  "slot",       "group",
                                        "edit_row", "out_row",  "column", "key_column", "q_row",
                                        "v_row",    "mlp_row",  "frozen"};
    static const char types[] = "IIIIIIiiiIIIB";
    struct run_batch *b = &a->batch;
    const void **to[] = {
        (const void **)&b->tokens,  (const void **)&b->n_tokens, (const void **)&b->start,
        (const void **)&b->slot,    (const void **)&b->group,    (const void **)&b->edit_row,
        (const void **)&b->out_row, (const void **)&b->column,   (const void **)&b->key_column,
        (const void **)&b->q_row,   (const void **)&b->v_row,    (const void **)&b->mlp_row,
        (const void **)&b->frozen};
    if (!PyObject_HasAttrString(in[1], "__len__"))
        return PyErr_SetString(PyExc_TypeError, "n_tokens must be an array"), -1;
    Py_ssize_t n_rows = PyObject_Length(in[1]);
    if (n_rows < 1 || n_rows > 1 << 20)
        return PyErr_Format(PyExc_ValueError, "a batch of %zd rows", n_rows), -1;
    b->n_rows = (uint32_t)n_rows;
    for (int i = 0; i < 13; i++) {
        if (batch_borrow(a, in[i], types[i], names[i],
                         i == 0    ? -1
                         : i == 12 ? (Py_ssize_t)model->facts.n_layers
                                   : n_rows,
                         to[i]))
            return -1;
        if (!*to[i] && i < 9)
            return PyErr_Format(PyExc_TypeError, "%s is missing", names[i]), -1;
    }
    if (b->frozen && (!b->q_row || !b->v_row || !b->mlp_row))
        return PyErr_SetString(PyExc_TypeError, "frozen layers need q_row, v_row and mlp_row"), -1;
    uint64_t total = 0;
    for (uint32_t r = 0; r < b->n_rows; r++) {
        if (b->n_tokens[r] == 0 || b->n_tokens[r] > 1u << 24 || b->start[r] > 1u << 24)
            return PyErr_Format(PyExc_ValueError, "row %u has no tokens, or far too many", r), -1;
        total += b->n_tokens[r];
    }
    if ((uint64_t)PyObject_Length(in[0]) != total)
        return PyErr_SetString(PyExc_ValueError, "tokens and n_tokens do not fit together"), -1;
    return 0;
}

/* The residual stream to resume from: float32 [all tokens, D]. */
int batch_inputs_read(struct batch_arguments *a, const struct model *model, PyObject *object) {
    uint64_t total = 0;
    const void *data;
    for (uint32_t r = 0; r < a->batch.n_rows; r++)
        total += a->batch.n_tokens[r];
    if (batch_borrow(a, object, 'f', "inputs", (Py_ssize_t)(total * model->facts.d_model), &data))
        return -1;
    a->batch.inputs = data;
    return 0;
}

int batch_owners_read(struct batch_arguments *a, struct model_object *self, PyObject *cache,
                      PyObject *edits) {
    struct engine_state *state = engine_state_of((PyObject *)self);
    if ((PyObject *)Py_TYPE(cache) != state->cache_type ||
        ((struct cache_object *)cache)->owner != self)
        return PyErr_SetString(PyExc_TypeError, "cache must be a Cache of this model"), -1;
    if (edits != Py_None && ((PyObject *)Py_TYPE(edits) != state->edits_type ||
                             ((struct edits_object *)edits)->owner != self))
        return PyErr_SetString(PyExc_TypeError, "edits must be Edits of this model"), -1;
    a->batch.edits = edits == Py_None ? NULL : &((struct edits_object *)edits)->list;
    a->cache = ((struct cache_object *)cache)->cache;
    return 0;
}

void batch_release(struct batch_arguments *a) {
    for (int i = 0; i < a->n_held; i++)
        Py_DECREF(a->held[i]);
    free(a->captures);
}
