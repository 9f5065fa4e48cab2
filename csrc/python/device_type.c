/* Device. */
#include "engine.h"

#include <unistd.h>

static const char *const type_names[] = {"discrete", "integrated", "virtual", "software"};

static PyObject *info_dict(const struct gpu_device_info *info) {
    PyObject *matrix = info->matrix_m
                           ? Py_BuildValue("(III)", info->matrix_m, info->matrix_n, info->matrix_k)
                           : Py_NewRef(Py_None);
    return Py_BuildValue("{s:i,s:s,s:s,s:s,s:s,s:s,s:K,s:K,s:I,s:I,s:O,s:O,s:O,s:O,s:O,s:s,s:N}",
                         "index", info->index, "name", info->name, "vendor", info->vendor, "type",
                         type_names[info->type], "driver", info->driver, "uuid", info->uuid,
                         "memory_bytes", (unsigned long long)info->memory_bytes, "available_bytes",
                         (unsigned long long)info->available_bytes, "subgroup_size",
                         info->subgroup_size, "max_shared_bytes", info->max_shared_bytes,
                         "memory_budget", info->has_budget ? Py_True : Py_False,
                         "subgroup_size_control", info->has_subgroup_control ? Py_True : Py_False,
                         "int64", info->has_int64 ? Py_True : Py_False, "executable_info",
                         info->has_executable_info ? Py_True : Py_False, "suitable",
                         info->suitable ? Py_True : Py_False, "missing", info->missing,
                         "matrix_units", matrix);
}

PyObject *engine_devices(PyObject *module, PyObject *unused) {
    (void)unused;
    struct gpu_device_info infos[64];
    struct error error = {0};
    int count = 0;
    if (gpu_devices_list(infos, 64, &count, &error))
        return engine_raise(module, &error);
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < count && i < 64; i++) {
        PyObject *item = info_dict(&infos[i]);
        if (!item || PyList_Append(list, item)) {
            Py_XDECREF(item);
            Py_DECREF(list);
            return NULL;
        }
        Py_DECREF(item);
    }
    return list;
}

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"index", "cache_folder", "memory", NULL};
    int index;
    unsigned long long memory = 0;
    const char *folder = "";
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "i|sK", names, &index, &folder, &memory))
        return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct device_object *self = (struct device_object *)allocate(type, 0);
    if (!self)
        return NULL;
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&self->lock, &recursive);
    pthread_mutexattr_destroy(&recursive);
    self->owner = getpid();
    struct error error = {0};
    if (gpu_device_open(&self->device, index, op_kernels_get(), KERNEL_COUNT, folder, &error)) {
        engine_raise((PyObject *)self, &error);
        Py_DECREF(self);
        return NULL;
    }
    gpu_device_limit(self->device, memory);
    return (PyObject *)self;
}

static void device_dealloc(PyObject *object) {
    struct device_object *self = (struct device_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    gpu_device_close(self->device);
    pthread_mutex_destroy(&self->lock);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *device_get_info(PyObject *object, void *unused) {
    (void)unused;
    return info_dict(gpu_device_get_info(((struct device_object *)object)->device));
}

static PyObject *device_get_available(PyObject *object, void *unused) {
    (void)unused;
    struct error error = {0};
    if (gpu_device_check(((struct device_object *)object)->device, &error))
        return engine_raise(object, &error);
    return PyLong_FromUnsignedLongLong(
        gpu_device_available(((struct device_object *)object)->device));
}

static PyObject *device_get_usable(PyObject *object, void *unused) {
    (void)unused;
    return PyBool_FromLong(gpu_device_check(((struct device_object *)object)->device, NULL) == 0);
}

static PyObject *device_get_allocated(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(
        gpu_device_allocated(((struct device_object *)object)->device));
}

/* peak_bytes(reset=False) */
static PyObject *device_peak_bytes(PyObject *object, PyObject *args) {
    int reset = 0;
    if (!PyArg_ParseTuple(args, "|p", &reset))
        return NULL;
    return PyLong_FromUnsignedLongLong(
        gpu_device_peak(((struct device_object *)object)->device, reset));
}

static PyObject *device_prepare(PyObject *object, PyObject *unused) {
    (void)unused;
    struct device_object *self = (struct device_object *)object;
    int kernels[KERNEL_COUNT], n = 0, failed;
    struct error error = {0};
    /* A software driver takes seconds for each kernel of matrix units, which run there only where
     * they are asked for by name. */
    int software = gpu_device_get_info(self->device)->type == GPU_SOFTWARE;
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (gpu_pipeline_possible(self->device, i) &&
            !(software && gpu_kernel_on_matrix_units(&op_kernels_get()[i])))
            kernels[n++] = i;
    Py_BEGIN_ALLOW_THREADS
    failed = gpu_pipelines_prepare(self->device, kernels, n, &error);
    Py_END_ALLOW_THREADS
    return failed ? engine_raise(object, &error) : Py_NewRef(Py_None);
}

static PyObject *device_describe(PyObject *object, PyObject *args) {
    const char *name;
    char text[16384];
    struct error error = {0};
    if (!PyArg_ParseTuple(args, "s", &name))
        return NULL;
    int kernel = op_kernel_find(name);
    if (kernel < 0)
        return PyErr_Format(PyExc_KeyError, "no kernel %s", name);
    if (gpu_pipeline_describe(((struct device_object *)object)->device, kernel, text, sizeof text,
                              &error))
        return engine_raise(object, &error);
    return PyUnicode_FromString(text);
}

static PyObject *device_hold(PyObject *object, PyObject *unused) {
    (void)unused;
    struct device_object *self = (struct device_object *)object;
    self->ender = pthread_self();
    self->ending = 1;
    engine_lock(self);
    Py_RETURN_NONE;
}

static PyGetSetDef device_getset[] = {
    {"info", device_get_info, NULL, "What the device is: a dict as in devices().", NULL},
    {"available_bytes", device_get_available, NULL, "Device-local bytes that are free now.", NULL},
    {"usable", device_get_usable, NULL, "False once the device is lost, and in a forked child.",
     NULL},
    {"allocated_bytes", device_get_allocated, NULL, "Bytes that this object holds.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef device_methods[] = {
    {"prepare", device_prepare, METH_NOARGS,
     "prepare(): compiles every kernel that this device can run, in parallel; on a software device "
     "without those of matrix units."},
    {"peak_bytes", device_peak_bytes, METH_VARARGS,
     "peak_bytes(reset=False) -> the most bytes that this object has held at once since the last "
     "reset."},
    {"describe", device_describe, METH_VARARGS,
     "describe(kernel) -> str: registers, spills and the like, as far as the driver tells."},
    {"hold", device_hold, METH_NOARGS,
     "hold(): takes the device for this thread for good, because the interpreter ends. A run of "
     "another thread is cut "
     "short; daemon threads stand still where they want the device, instead of failing while all "
     "is taken down."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot device_slots[] = {
    {Py_tp_new, device_new},
    {Py_tp_dealloc, device_dealloc},
    {Py_tp_getset, device_getset},
    {Py_tp_methods, device_methods},
    {Py_tp_doc,
     "Device(index, cache_folder='', memory=0): an open Vulkan device, of whose memory buffers may "
     "take `memory` bytes (0: all)."},
    {0, NULL}};
PyType_Spec device_spec = {
    .name = "vksteer._engine.Device",
    .basicsize = sizeof(struct device_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = device_slots,
};

/* --- MappedFile ------------------------------------------------------------------------------- */
