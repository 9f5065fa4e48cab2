/* NumPy arrays in and out. */
#include "engine.h"

#include <numpy/arrayobject.h>

int arrays_import(void) {
    import_array1(-1);
    return 0;
}

static PyObject *zeros(int n_dims, const Py_ssize_t *dims, int type, void **data) {
    npy_intp shape[8];
    for (int i = 0; i < n_dims; i++)
        shape[i] = dims[i];
    PyObject *array = PyArray_ZEROS(n_dims, shape, type, 0);
    if (array)
        *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

PyObject *array_zeros(int n_dims, const Py_ssize_t *dims, float **data) {
    return zeros(n_dims, dims, NPY_FLOAT32, (void **)data);
}

PyObject *array_zeros_double(int n_dims, const Py_ssize_t *dims, double **data) {
    return zeros(n_dims, dims, NPY_FLOAT64, (void **)data);
}

PyObject *array_zeros_int(int n_dims, const Py_ssize_t *dims, int32_t **data) {
    return zeros(n_dims, dims, NPY_INT32, (void **)data);
}

static int type_number(char type) {
    switch (type) {
    case 'f': return NPY_FLOAT32;
    case 'd': return NPY_FLOAT64;
    case 'i': return NPY_INT32;
    case 'I': return NPY_UINT32;
    case 'q': return NPY_INT64;
    default: return NPY_UINT8;
    }
}

int array_is(PyObject *object, char type) {
    return PyArray_Check(object) && PyArray_TYPE((PyArrayObject *)object) == type_number(type);
}

PyObject *array_copy(PyObject *array, char type, void **data) {
    PyObject *copy = PyArray_FROMANY(array, type_number(type), 0, 0,
                                     NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY | NPY_ARRAY_FORCECAST);
    if (copy)
        *data = PyArray_DATA((PyArrayObject *)copy);
    return copy;
}

PyObject *array_view(PyObject *object, char type, const char *name, const void **data,
                     Py_ssize_t *n) {
    if (!array_is(object, type) || !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a C-contiguous NumPy array of type '%c'", name,
                     type);
        return NULL;
    }
    *data = PyArray_DATA((PyArrayObject *)object);
    *n = PyArray_SIZE((PyArrayObject *)object);
    Py_INCREF(object);
    return object;
}

Py_ssize_t array_dim(PyObject *array, int axis) {
    return axis < PyArray_NDIM((PyArrayObject *)array) ? PyArray_DIM((PyArrayObject *)array, axis)
                                                       : -1;
}
