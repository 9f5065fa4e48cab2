/* Model methods around the choice of matrix kernels: which are offered, how fast they are here,
 * which one is in use. */
#include "engine.h"

static struct ops *ops_of(PyObject *object) {
    struct model_object *self = (struct model_object *)object;
    if (self->model)
        return &self->model->ops;
    PyErr_SetString(PyExc_ValueError, "the model is closed");
    return NULL;
}

PyObject *model_get_family(PyObject *object, void *unused) {
    (void)unused;
    struct ops *ops = ops_of(object);
    return ops ? PyUnicode_FromString(op_kernel_family_name(ops->kernel_family)) : NULL;
}

int model_set_family(PyObject *object, PyObject *value, void *unused) {
    (void)unused;
    struct ops *ops = ops_of(object);
    PyObject *text = ops && value ? PyUnicode_AsUTF8String(value) : NULL;
    if (!text)
        return -1;
    int family = op_kernel_family_find(PyBytes_AsString(text));
    Py_DECREF(text);
    if (family < 0 || !op_kernel_family_offered(ops, family)) {
        PyErr_Format(PyExc_ValueError, "%R is not one of this device's matrix kernels", value);
        return -1;
    }
    if (engine_begin((struct model_object *)object, 0))
        return -1;
    struct error error = {0};
    int failed = family == LINEAR_MATRIX &&
                 model_ranges_measure(((struct model_object *)object)->model, &error);
    failed = failed || ops_split_release(ops, &error); /* that of a measurement */
    if (!failed)
        ops->kernel_family = family;
    engine_end((struct model_object *)object);
    if (failed)
        engine_fail((struct model_object *)object, &error);
    return failed ? -1 : 0;
}

PyObject *model_get_fast(PyObject *object, void *unused) {
    (void)unused;
    struct ops *ops = ops_of(object);
    return ops ? PyBool_FromLong(ops->fast) : NULL;
}

int model_set_fast(PyObject *object, PyObject *value, void *unused) {
    (void)unused;
    struct ops *ops = ops_of(object);
    int fast = ops && value ? PyObject_IsTrue(value) : -1;
    if (fast < 0 || engine_begin((struct model_object *)object, 0))
        return -1;
    ops->fast = fast;
    engine_end((struct model_object *)object);
    return 0;
}

PyObject *model_get_families(PyObject *object, void *unused) {
    (void)unused;
    struct ops *ops = ops_of(object);
    PyObject *list = ops ? PyList_New(0) : NULL;
    for (int i = 0; list && i < LINEAR_FAMILIES; i++) {
        if (!op_kernel_family_offered(ops, i))
            continue;
        PyObject *name = PyUnicode_FromString(op_kernel_family_name(i));
        if (!name || PyList_Append(list, name))
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

/* measure_linear(m, n, k, decode=False, backward=False) -> (flop/s, weight bytes/s) with the
 * kernels in use and the model's weight type. */
PyObject *model_measure_linear(PyObject *object, PyObject *args) {
    unsigned int m, n, k;
    int decode = 0, backward = 0, failed;
    double flops = 0, bytes = 0;
    struct error error = {0};
    struct ops *ops = ops_of(object);
    if (!ops || !PyArg_ParseTuple(args, "III|pp", &m, &n, &k, &decode, &backward))
        return NULL;
    if (m == 0 || n == 0 || k == 0 || m > 65536 || n > 1 << 20 || k > 65536)
        return PyErr_Format(PyExc_ValueError, "a product of %u x %u by %u x %u is out of range", m,
                            k, n, k);
    struct model_object *self = (struct model_object *)object;
    if (engine_begin(self, 0))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    uint32_t type = self->model->facts.weight_type;
    if (backward) {
        failed = op_linear_bwd_measure(ops, type, m, n, k, &flops, &error);
        bytes = flops / (2.0 * m * n * k) * (double)op_matrix_bytes(type, n, k);
    } else {
        failed = op_linear_measure(ops, type, m, n, k, decode, &flops, &bytes, &error);
    }
    engine_end(self);
    Py_END_ALLOW_THREADS
    return failed ? engine_fail(self, &error) : Py_BuildValue("(dd)", flops, bytes);
}

PyObject *model_measure_read(PyObject *object, PyObject *args) {
    unsigned long long bytes;
    int failed;
    double rate = 0;
    struct error error = {0};
    struct ops *ops = ops_of(object);
    if (!ops || !PyArg_ParseTuple(args, "K", &bytes))
        return NULL;
    if (bytes < 1 << 20 || bytes > GPU_BUFFER_MAX)
        return PyErr_Format(PyExc_ValueError, "reading %llu bytes: use 1 MiB to 1 GiB", bytes);
    struct model_object *self = (struct model_object *)object;
    if (engine_begin(self, 0))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = op_read_measure(ops, bytes, &rate, &error);
    engine_end(self);
    Py_END_ALLOW_THREADS
    return failed ? engine_fail(self, &error) : PyFloat_FromDouble(rate);
}

/* prepare(): compiles the kernels that this model will use. */
PyObject *model_prepare(PyObject *object, PyObject *unused) {
    (void)unused;
    int failed;
    struct error error = {0};
    struct ops *ops = ops_of(object);
    if (!ops)
        return NULL;
    struct model_object *self = (struct model_object *)object;
    struct op_kernels_needed needed = model_kernels_needed(&self->model->facts);
    if (engine_begin(self, 0))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = ops_kernels_prepare(ops, &needed, &error);
    engine_end(self);
    Py_END_ALLOW_THREADS
    return failed ? engine_fail(self, &error) : Py_NewRef(Py_None);
}
