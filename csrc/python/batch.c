/* What a call that runs a batch takes from Python: packed rows, a cache, arrays that are borrowed,
 * and new arrays for captures. */
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

int batch_list(struct batch_arguments *a, PyObject *object, const char *name, const uint32_t **data,
               Py_ssize_t *n) {
    PyObject *view = array_view(object, 'I', name, (const void **)data, n);
    if (!view)
        return -1;
    a->held[a->n_held++] = view;
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
            !site_exists(capture->site, capture->layer, &model->facts)) {
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

int batch_read(struct batch_arguments *a, struct model_object *self, PyObject *cache,
               PyObject *rows) {
    struct engine_state *state = engine_state_of((PyObject *)self);
    if ((PyObject *)Py_TYPE(cache) != state->cache_type ||
        ((struct cache_object *)cache)->owner != self)
        return PyErr_SetString(PyExc_TypeError, "cache must be a Cache of this model"), -1;
    if ((PyObject *)Py_TYPE(rows) != state->packed_rows_type)
        return PyErr_SetString(PyExc_TypeError, "rows must be PackedRows"), -1;
    struct packed_rows_object *packed = (struct packed_rows_object *)rows;
    if (packed->edits && packed->edits->owner != self)
        return PyErr_SetString(PyExc_TypeError, "edits must be Edits of this model"), -1;
    if (packed_rows_check(packed, &self->model->facts, &a->n_tokens))
        return -1;
    a->held[a->n_held++] = Py_NewRef(rows);
    a->batch = packed->batch;
    a->n_out_rows = packed->n_out_rows;
    a->cache = ((struct cache_object *)cache)->cache;
    return 0;
}

void batch_release(struct batch_arguments *a) {
    for (int i = 0; i < a->n_held; i++)
        Py_DECREF(a->held[i]);
    free(a->captures);
}
