/* The type Encoder, the encoder of a sparse autoencoder on a model's device
 * (csrc/analysis/encode.h). */
#include "engine.h"

#include "analysis/encode.h"

struct encoder_object {
    PyObject_HEAD
    struct model_object *owner;
    struct encoder *encoder;
    uint32_t n_features, width;
};

static PyObject *encoder_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"model", "n_features", "width", "kind", "rows", "columns", NULL};
    PyObject *model;
    unsigned int n_features, width, kind, rows, columns;
    struct error error = {0};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OIIIII", names, &model, &n_features, &width,
                                     &kind, &rows, &columns))
        return NULL;
    PyObject *object = engine_owned_new(type, model, 1, "Encoder needs a Model");
    if (!object)
        return NULL;
    struct encoder_object *self = (struct encoder_object *)object;
    self->n_features = n_features;
    self->width = width;
    int failed = encoder_create(&self->encoder, self->owner->model, n_features, width, kind, rows,
                                columns, &error);
    return engine_owned_made(object, failed, &error);
}

static void destroy(PyObject *object) {
    encoder_destroy(((struct encoder_object *)object)->encoder);
}

static void encoder_dealloc(PyObject *object) { engine_owned_free(object, destroy); }

/* load(first, rows float32 [n, width]): weights of features [first, first + n) */
static PyObject *load(PyObject *object, PyObject *args) {
    struct encoder_object *self = (struct encoder_object *)object;
    struct error error = {0};
    unsigned int first;
    PyObject *rows;
    const void *data;
    Py_ssize_t n;
    int begun = 1, failed = 1;
    if (!PyArg_ParseTuple(args, "IO", &first, &rows))
        return NULL;
    PyObject *view = array_view(rows, 'f', "rows", &data, &n);
    if (!view || engine_begin(self->owner, 1)) {
        Py_XDECREF(view);
        return NULL;
    }
    if (n % self->width || n / self->width > (Py_ssize_t)self->n_features) {
        PyErr_Format(PyExc_ValueError, "%zd numbers are no rows of %u features of width %u", n,
                     self->n_features, self->width);
    } else {
        ENGINE_WORK(self->owner, failed,
                    encoder_load(self->encoder, first, (uint32_t)(n / self->width), data, &error));
        begun = 0;
    }
    Py_DECREF(view);
    return engine_finish(self->owner, begun, failed, &error) ? Py_NewRef(Py_None) : NULL;
}

/* vectors(a, b, c): float32 [n_features] or None; see encoder_vectors */
static PyObject *vectors(PyObject *object, PyObject *args) {
    struct encoder_object *self = (struct encoder_object *)object;
    struct batch_arguments a = {0};
    struct error error = {0};
    PyObject *given[3];
    const float *data[3] = {NULL, NULL, NULL};
    int begun = 1, failed = 1;
    if (!PyArg_ParseTuple(args, "OOO", &given[0], &given[1], &given[2]) ||
        engine_begin(self->owner, 1))
        return NULL;
    for (int i = 0; i < 3; i++)
        if (batch_borrow(&a, given[i], 'f', "a vector of the encoder", self->n_features,
                         (const void **)&data[i]))
            goto done;
    ENGINE_WORK(self->owner, failed, encoder_vectors(self->encoder, data, &error));
    begun = 0;
done:
    batch_release(&a);
    return engine_finish(self->owner, begun, failed, &error) ? Py_NewRef(Py_None) : NULL;
}

/* sums(x float32 [n, width], counts uint32 [m]) -> float32 [m, n_features] */
static PyObject *sums(PyObject *object, PyObject *args) {
    struct encoder_object *self = (struct encoder_object *)object;
    struct batch_arguments a = {0};
    struct error error = {0};
    PyObject *x, *list, *out = NULL;
    const void *data;
    const uint32_t *counts;
    float *to;
    Py_ssize_t m, total = 0;
    int begun = 1, failed = 1;
    if (!PyArg_ParseTuple(args, "OO", &x, &list) || engine_begin(self->owner, 1))
        return NULL;
    if (batch_list(&a, list, "counts", &counts, &m))
        goto done;
    for (Py_ssize_t i = 0; i < m; i++)
        total += counts[i];
    if (m > 1 << 20 || total > 1 << 24) {
        PyErr_SetString(PyExc_ValueError, "too many tokens at a time");
        goto done;
    }
    if (batch_borrow(&a, x, 'f', "x", total * (Py_ssize_t)self->width, &data) ||
        !(out = array_zeros(2, (Py_ssize_t[]){m, self->n_features}, &to)))
        goto done;
    ENGINE_WORK(self->owner, failed,
                encoder_sums(self->encoder, data, counts, (uint32_t)m, to, &error));
    begun = 0;
done:
    batch_release(&a);
    if (!engine_finish(self->owner, begun, failed, &error))
        Py_CLEAR(out);
    return out;
}

/* top(x float32 [n, width], k) -> (values float32 [n, k], indices float32 [n, k]) */
static PyObject *top(PyObject *object, PyObject *args) {
    struct encoder_object *self = (struct encoder_object *)object;
    struct error error = {0};
    PyObject *x, *values = NULL, *indices = NULL, *result = NULL;
    const void *data;
    unsigned int k;
    float *to[2];
    Py_ssize_t n;
    int begun = 1, failed = 1;
    if (!PyArg_ParseTuple(args, "OI", &x, &k))
        return NULL;
    PyObject *view = array_view(x, 'f', "x", &data, &n);
    if (!view || engine_begin(self->owner, 1)) {
        Py_XDECREF(view);
        return NULL;
    }
    Py_ssize_t rows = n / self->width;
    if (n % self->width || rows > 1 << 24 || k == 0 || k > TOPK_MAX) {
        PyErr_Format(PyExc_ValueError,
                     "%zd numbers as rows of %u, the %u largest: at most %d and 2^24 rows", n,
                     self->width, k, TOPK_MAX);
    } else if ((values = array_zeros(2, (Py_ssize_t[]){rows, k}, &to[0])) &&
               (indices = array_zeros(2, (Py_ssize_t[]){rows, k}, &to[1]))) {
        ENGINE_WORK(self->owner, failed,
                    encoder_top(self->encoder, data, (uint32_t)rows, k, to[0], to[1], &error));
        begun = 0;
    }
    Py_DECREF(view);
    if (engine_finish(self->owner, begun, failed, &error))
        result = PyTuple_Pack(2, values, indices);
    Py_XDECREF(values);
    Py_XDECREF(indices);
    return result;
}

static PyMethodDef methods[] = {
    {"load", load, METH_VARARGS, "load(first, rows): weights of features from `first` on."},
    {"vectors", vectors, METH_VARARGS, "vectors(a, b, c): biases and thresholds."},
    {"sums", sums, METH_VARARGS, "sums(x, counts) -> sums of features over segments of tokens."},
    {"top", top, METH_VARARGS, "top(x, k) -> (values, indices) of the largest features."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, encoder_new},
    {Py_tp_dealloc, encoder_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Encoder(model, n_features, width, kind, rows, columns): the encoder of a sparse "
                "autoencoder; see csrc/analysis/encode.h."},
    {0, NULL}};
PyType_Spec encoder_spec = {
    .name = "vksteer._engine.Encoder",
    .basicsize = sizeof(struct encoder_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
