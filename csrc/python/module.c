/* The extension module vksteer._engine: its types, functions and constants. Multi-phase, limited
 * API, state per module. */
#include "engine.h"

#include "analysis/encode.h"
#include "analysis/ov.h"
#include "op_fields.h"

static struct engine_state *module_state(PyObject *module) { return PyModule_GetState(module); }

static const char *const kind_names[] = {"width", "one",         "query_heads", "kv_heads",
                                         "keys",  "heads_width", "mlp"};
static const char *const needs_names[] = {"",         "positions",  "pre_norms", "post_norms",
                                          "rotation", "sequential", "gate"};

static PyObject *engine_sites(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    PyObject *list = PyList_New(SITE_COUNT);
    for (int i = 0; list && i < SITE_COUNT; i++) {
        PyObject *item = Py_BuildValue("(ssOs)", site_name(i), kind_names[site_kind(i)],
                                       site_is_layered(i) ? Py_True : Py_False,
                                       needs_names[site_needs(i)]);
        if (!item) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SetItem(list, i, item);
    }
    return list;
}

static PyObject *engine_kernels(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    PyObject *list = PyList_New(KERNEL_COUNT);
    const struct gpu_kernel *kernels = op_kernels_get();
    for (int i = 0; list && i < KERNEL_COUNT; i++) {
        PyObject *item = Py_BuildValue("(sy#n)", kernels[i].name, (const char *)kernels[i].spirv,
                                       (Py_ssize_t)kernels[i].spirv_bytes,
                                       (Py_ssize_t)kernels[i].params_bytes);
        if (!item) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SetItem(list, i, item);
    }
    return list;
}

/* module.constants = {name: number}: the constants of op_fields.h, which C, GLSL and Python share,
 * and others that Python reads. */
static int constants_add(PyObject *module) {
    static const struct {
        const char *name;
        unsigned long long value;
    } constants[] = {
#define CONSTANT(name) {#name, name},
        /* clang-format off */
        CONSTANTS(CONSTANT)
        CONSTANT(RUN_LOGITS_NONE)
        CONSTANT(RUN_LOGITS_LAST)
        CONSTANT(RUN_LOGITS_ALL)
        CONSTANT(METRIC_PAIR)
        CONSTANT(METRIC_LOG_PROB)
        CONSTANT(METRIC_KL)
        CONSTANT(METRIC_DIRECTIONAL_KL)
        CONSTANT(METRIC_CHOICE)
        CONSTANT(LENS_ROWS)
        CONSTANT(ENCODER_JUMP)
        CONSTANT(ENCODER_GATE)
        CONSTANT(ENCODER_LINEAR)
        CONSTANT(GPU_BUFFER_MAX)
        CONSTANT(WORK_UPLOAD_BYTES)
        CONSTANT(ATTRIBUTION_PICKS_BYTES)
        CONSTANT(ATTRIBUTION_PICKS_ROWS)
#undef CONSTANT
        /* clang-format on */
    };
    PyObject *dict = PyDict_New();
    int failed = !dict;
    for (size_t i = 0; i < sizeof constants / sizeof constants[0] && !failed; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(constants[i].value);
        failed = !value || PyDict_SetItemString(dict, constants[i].name, value);
        Py_XDECREF(value);
    }
    failed = failed || PyModule_AddObjectRef(module, "constants", dict);
    Py_XDECREF(dict);
    return failed ? -1 : 0;
}

static PyObject *engine_row_stride(PyObject *module, PyObject *arg) {
    (void)module;
    unsigned long width = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    if (width > UINT32_MAX / 2) {
        PyErr_SetString(PyExc_ValueError, "a row has fewer than 2^31 floats");
        return NULL;
    }
    return PyLong_FromUnsignedLong(op_row_stride((uint32_t)width));
}

static int type_add(PyObject *module, PyType_Spec *spec, PyObject **slot) {
    *slot = PyType_FromModuleAndSpec(module, spec, NULL);
    return *slot ? PyModule_AddType(module, (PyTypeObject *)*slot) : -1;
}

static int engine_exec(PyObject *module) {
    struct engine_state *state = module_state(module);
    if (arrays_import())
        return -1;
    PyObject *errors = PyImport_ImportModule("vksteer.errors");
    if (!errors)
        return -1;
    state->device_error = PyObject_GetAttrString(errors, "DeviceError");
    state->model_error = PyObject_GetAttrString(errors, "ModelError");
    Py_DECREF(errors);
    if (!state->device_error || !state->model_error)
        return -1;
    if (type_add(module, &device_spec, &state->device_type) ||
        type_add(module, &file_spec, &state->file_type) ||
        type_add(module, &model_spec, &state->model_type) ||
        type_add(module, &cache_spec, &state->cache_type) ||
        type_add(module, &edits_spec, &state->edits_type) ||
        type_add(module, &packed_rows_spec, &state->packed_rows_type) ||
        type_add(module, &bench_spec, &state->bench_type) ||
        type_add(module, &tape_spec, &state->tape_type) ||
        type_add(module, &attribution_spec, &state->attribution_type) ||
        type_add(module, &circuits_spec, &state->circuits_type) ||
        type_add(module, &encoder_spec, &state->encoder_type))
        return -1;
    if (PyModule_AddIntConstant(module, "ATTRIBUTE_TILE", ATTRIBUTE_TILE) || constants_add(module))
        return -1;
    return 0;
}

static int engine_traverse(PyObject *module, visitproc visit, void *arg) {
    struct engine_state *state = module_state(module);
    Py_VISIT(state->device_type);
    Py_VISIT(state->file_type);
    Py_VISIT(state->model_type);
    Py_VISIT(state->cache_type);
    Py_VISIT(state->edits_type);
    Py_VISIT(state->packed_rows_type);
    Py_VISIT(state->bench_type);
    Py_VISIT(state->tape_type);
    Py_VISIT(state->attribution_type);
    Py_VISIT(state->circuits_type);
    Py_VISIT(state->encoder_type);
    Py_VISIT(state->device_error);
    Py_VISIT(state->model_error);
    return 0;
}

static int engine_clear(PyObject *module) {
    struct engine_state *state = module_state(module);
    Py_CLEAR(state->device_type);
    Py_CLEAR(state->file_type);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->cache_type);
    Py_CLEAR(state->edits_type);
    Py_CLEAR(state->packed_rows_type);
    Py_CLEAR(state->bench_type);
    Py_CLEAR(state->tape_type);
    Py_CLEAR(state->attribution_type);
    Py_CLEAR(state->circuits_type);
    Py_CLEAR(state->encoder_type);
    Py_CLEAR(state->device_error);
    Py_CLEAR(state->model_error);
    return 0;
}

static PyMethodDef engine_methods[] = {
    {"devices", engine_devices, METH_NOARGS,
     "devices() -> list of dicts: every Vulkan device of this machine; [] without a driver."},
    {"sites", engine_sites, METH_NOARGS,
     "sites() -> list of (name, kind, layered, needs) in the order of the forward pass."},
    {"kernels", engine_kernels, METH_NOARGS,
     "kernels() -> list of (name, SPIR-V bytes, bytes of parameters)."},
    {"tape_bytes", engine_tape_bytes, METH_VARARGS,
     "tape_bytes(model, capacity, first_layer, keep_inside) -> bytes of device memory that a Tape "
     "takes."},
    {"attribution_bytes", engine_attribution_bytes, METH_VARARGS,
     "attribution_bytes(model, capacity, step_capacity, longest, first_layer, n_sample_tokens, "
     "n_steps, normed, keep_inside) -> (bytes of device memory that an Attribution takes, of its "
     "split rows on matrix units)."},
    {"measure", engine_measure, METH_VARARGS,
     "measure(model, rows, n, request) -> (pairs, distributions, None): metrics of normed final "
     "rows; see "
     "csrc/analysis/read_logits.h."},
    {"row_stride", engine_row_stride, METH_O,
     "row_stride(width) -> floats from one row of activations to the next."},
    {"ops", engine_ops, METH_NOARGS,
     "ops() -> list of (name, bytes of its arguments, [(field, kind, offset)]): what "
     "Bench.run takes."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot engine_slots[] = {
    {Py_mod_exec, (void *)engine_exec},
    {0, NULL},
};

static struct PyModuleDef engine_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_engine",
    .m_doc = "The C engine. Use it through vksteer; shapes and numbers are checked here, "
             "friendliness lives in Python.",
    .m_size = sizeof(struct engine_state),
    .m_methods = engine_methods,
    .m_slots = engine_slots,
    .m_traverse = engine_traverse,
    .m_clear = engine_clear,
};

PyMODINIT_FUNC PyInit__engine(void) { return PyModuleDef_Init(&engine_module); }
