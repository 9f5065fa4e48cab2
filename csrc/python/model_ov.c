/* Model methods of the OV circuit: value vectors, the lens, rows of weights. */
#include "engine.h"

#include "analysis/ov.h"

/* value_vectors(direction float32 [D], first_layer, post=True) -> float32 [n, H, D] */
PyObject *model_value_vectors(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    struct error error = {0};
    PyObject *array, *result = NULL;
    const void *direction;
    unsigned int first;
    int post = 1, failed = 1;
    Py_ssize_t n;
    float *out;
    if (!PyArg_ParseTuple(args, "OI|p", &array, &first, &post))
        return NULL;
    PyObject *view = array_view(array, 'f', "direction", &direction, &n);
    if (!view)
        return NULL;
    if (engine_begin(self, 1) == 0) {
        const struct model_facts *f = &self->model->facts;
        if (n != (Py_ssize_t)f->d_model || first >= f->n_layers)
            PyErr_Format(
                PyExc_ValueError,
                "a direction of %zd from layer %u on: the model has width %u and %u layers", n,
                first, f->d_model, f->n_layers);
        else
            result = array_zeros(3, (Py_ssize_t[]){f->n_layers - first, f->n_heads, f->d_model},
                                 &out);
        if (!result) {
            engine_end(self);
        } else {
            ENGINE_WORK(self, failed,
                        ov_value_vectors(self->work, direction, first, post, out, &error));
            if (failed) {
                Py_CLEAR(result);
                engine_fail(self, &error);
            }
        }
    }
    Py_DECREF(view);
    return result;
}

/* lens(vectors float32 [n, D], k, cosine=False) -> (values float32 [n, k],
 * tokens float32 [n, k]) */
PyObject *model_lens(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    struct error error = {0};
    struct ov_lens lens = {0};
    PyObject *array, *values = NULL, *indices = NULL, *result = NULL;
    const void *vectors;
    int failed = 1;
    Py_ssize_t n;
    if (!PyArg_ParseTuple(args, "OI|p", &array, &lens.k, &lens.cosine))
        return NULL;
    PyObject *view = array_view(array, 'f', "vectors", &vectors, &n);
    if (!view)
        return NULL;
    if (engine_begin(self, 1) == 0) {
        Py_ssize_t width = self->model->facts.d_model, rows = n / width;
        if (n % width || rows > 1 << 24 || lens.k == 0 || lens.k > TOPK_MAX) {
            PyErr_Format(PyExc_ValueError,
                         "%zd numbers as rows of %zd, the %u largest: at most %d and 2^24 rows", n,
                         width, lens.k, TOPK_MAX);
        } else {
            values = array_zeros(2, (Py_ssize_t[]){rows, lens.k}, &lens.values);
            indices = array_zeros(2, (Py_ssize_t[]){rows, lens.k}, &lens.indices);
        }
        if (!values || !indices) {
            engine_end(self);
        } else {
            lens.vectors = vectors;
            lens.n = (uint32_t)rows;
            ENGINE_WORK(self, failed, ov_lens_run(self->work, &lens, &error));
            if (failed)
                engine_fail(self, &error);
            else
                result = PyTuple_Pack(2, values, indices);
        }
    }
    Py_XDECREF(values);
    Py_XDECREF(indices);
    Py_DECREF(view);
    return result;
}

/* rows(matrix, layer, first, n) -> float32 [n, columns]: weights as the device holds them */
PyObject *model_rows(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    struct error error = {0};
    const char *name;
    PyObject *result = NULL;
    uint32_t rows, columns, first, n;
    int layer, failed = 1;
    float *out;
    if (!PyArg_ParseTuple(args, "siII", &name, &layer, &first, &n) || engine_begin(self, 1))
        return NULL;
    if (!model_matrix_find(self->model, name, layer, &rows, &columns))
        PyErr_Format(PyExc_KeyError, "no matrix %s in layer %d", name, layer);
    else if (first > rows || n > rows - first)
        PyErr_Format(PyExc_ValueError, "rows %u to %u of %s, which has %u", first, first + n, name,
                     rows);
    else
        result = array_zeros(2, (Py_ssize_t[]){n, columns}, &out);
    if (!result) {
        engine_end(self);
        return NULL;
    }
    ENGINE_WORK(self, failed, run_rows_read(self->work, name, layer, first, n, out, &error));
    if (failed) {
        Py_CLEAR(result);
        engine_fail(self, &error);
    }
    return result;
}
