/* MappedFile: a file mapped into memory. */
#include "engine.h"

static PyObject *file_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"path", NULL};
    PyObject *path;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&", names, PyUnicode_FSConverter, &path))
        return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct file_object *self = (struct file_object *)allocate(type, 0);
    struct error error = {0};
    if (self && mapped_file_open(&self->file, PyBytes_AsString(path), &error)) {
        engine_raise((PyObject *)self, &error);
        Py_CLEAR(self);
    }
    Py_DECREF(path);
    return (PyObject *)self;
}

static void file_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    mapped_file_close(&((struct file_object *)object)->file);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyType_Slot file_slots[] = {{Py_tp_new, file_new},
                                   {Py_tp_dealloc, file_dealloc},
                                   {Py_tp_doc, "MappedFile(path): a file mapped read-only."},
                                   {0, NULL}};
PyType_Spec file_spec = {
    .name = "vksteer._engine.MappedFile",
    .basicsize = sizeof(struct file_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = file_slots,
};
