// Placeholder: the extension module, multi-phase, limited API.
#include <Python.h>

static int engine_exec(PyObject *module)
{
    return PyModule_AddIntConstant(module, "placeholder", 1);
}

static PyModuleDef_Slot engine_slots[] = {
    {Py_mod_exec, (void *)engine_exec},
    {0, NULL},
};

static struct PyModuleDef engine_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_engine",
    .m_slots = engine_slots,
};

PyMODINIT_FUNC PyInit__engine(void)
{
    return PyModuleDef_Init(&engine_module);
}
