/* Bench: one op at a time on the device and on its float64 reference, with NumPy arrays as memory.
 * For the tests and `vksteer verify`. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#include "reference/calls.h"

/* bytes before and after every buffer; a kernel that writes there is caught */
#define GUARD 4096
/* as a float it is NaN, so that a kernel that reads there and uses it shows */
#define GUARD_BYTE 0xff
/* The largest number among an op's arguments. Tests need less, and with more a reference's loops
 * would run for hours. */
#define NUMBER_MAX (1u << 20)

struct bench_object {
    PyObject_HEAD
    struct device_object *owner;
    struct ops ops;
    struct gpu_buffer *arena; /* all buffers of a run, guards between them; grown when needed */
};

struct bench_run {
    const struct op_call *call;
    /* the same arguments twice, with addresses of the device and with those of the reference */
    void *device_arguments, *reference_arguments;
    struct reference_memory memory;
    PyObject *arrays[REFERENCE_BUFFERS]; /* as they were given; held */
    const void *given[REFERENCE_BUFFERS];
    float *returned[REFERENCE_BUFFERS]; /* of the arrays in `on_device`; NULL for words */
    uint64_t offset[REFERENCE_BUFFERS]; /* in the arena */
    uint64_t bytes;                     /* of the arena */
    PyObject *on_device, *on_reference; /* dicts of name -> array */
};

/* --- arguments -------------------------------------------------------------------------------- */

/* dict[name] = a copy of `array`; the dict owns it. */
static int copy_add(PyObject *dict, PyObject *name, PyObject *array, char type, void **data) {
    PyObject *copy = array_copy(array, type, data);
    int failed = !copy || PyDict_SetItem(dict, name, copy);
    Py_XDECREF(copy);
    return failed ? -1 : 0;
}

static int buffer_read(struct bench_run *run, PyObject *name, PyObject *array) {
    uint32_t i = run->memory.n_buffers;
    struct reference_buffer *buffer = &run->memory.buffers[i];
    if (i == REFERENCE_BUFFERS) {
        PyErr_Format(PyExc_ValueError, "more than %d buffers", REFERENCE_BUFFERS);
        return -1;
    }
    char type = array_is(array, 'I') ? 'I' : 'f';
    Py_ssize_t n;
    buffer->name = PyUnicode_AsUTF8AndSize(name, NULL);
    run->arrays[i] = buffer->name ? array_view(array, type, buffer->name, &run->given[i], &n)
                                  : NULL;
    if (!run->arrays[i])
        return -1;
    buffer->n = (uint64_t)n;
    run->offset[i] = run->bytes + GUARD;
    run->bytes += (GUARD + 4 * buffer->n + 255) / 256 * 256;
    run->memory.n_buffers++;
    if (type == 'I') {
        buffer->words = run->given[i];
        return 0;
    }
    void *doubles = NULL, *floats = NULL;
    if (copy_add(run->on_reference, name, array, 'd', &doubles) ||
        copy_add(run->on_device, name, array, 'f', &floats))
        return -1;
    buffer->floats = doubles;
    run->returned[i] = floats;
    return 0;
}

/* "name" or ("name", first item) -> which buffer, which item. */
static int address_read(const struct bench_run *run, const char *field, PyObject *value,
                        uint32_t *buffer, uint64_t *item) {
    PyObject *name = value;
    unsigned long long first = 0;
    if (PyTuple_Check(value) && !PyArg_ParseTuple(value, "UK", &name, &first))
        return -1;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;
    for (uint32_t i = 0; text && i < run->memory.n_buffers; i++)
        if (strcmp(text, run->memory.buffers[i].name) == 0) {
            *buffer = i;
            *item = first;
            if (first <= run->memory.buffers[i].n)
                return 0;
        }
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s: %R is no place in a buffer", field, value);
    return -1;
}

static int field_write(struct bench_run *run, const struct op_field *field, PyObject *value,
                       uint64_t arena) {
    char *device = (char *)run->device_arguments + field->offset,
         *reference = (char *)run->reference_arguments + field->offset;
    if (field->kind == FIELD_ADDRESS) {
        uint32_t buffer;
        uint64_t item;
        if (value == Py_None)
            return 0;
        if (address_read(run, field->name, value, &buffer, &item))
            return -1;
        uint64_t on_device = arena + run->offset[buffer] + 4 * item,
                 on_reference = reference_address(buffer, item);
        memcpy(device, &on_device, 8);
        memcpy(reference, &on_reference, 8);
        return 0;
    }
    double number = PyFloat_AsDouble(value);
    if (PyErr_Occurred())
        return -1;
    if (field->kind == FIELD_FLOAT) {
        float f = (float)number;
        memcpy(device, &f, 4);
        memcpy(reference, &f, 4);
        return 0;
    }
    if (!(number >= 0 && number <= NUMBER_MAX) || number != (double)(uint32_t)number) {
        PyErr_Format(PyExc_ValueError, "%s: %R is not a whole number from 0 to %u", field->name,
                     value, NUMBER_MAX);
        return -1;
    }
    uint32_t u = (uint32_t)number;
    memcpy(device, &u, 4);
    memcpy(reference, &u, 4);
    return 0;
}

static int arguments_fill(struct bench_run *run, PyObject *arguments, uint64_t arena) {
    Py_ssize_t used = 0;
    for (int i = 0; i < run->call->n_fields; i++) {
        PyObject *value = PyDict_GetItemString(arguments, run->call->fields[i].name);
        if (value && field_write(run, &run->call->fields[i], value, arena))
            return -1;
        used += value != NULL;
    }
    if (used == PyDict_Size(arguments))
        return 0;
    PyErr_Format(PyExc_KeyError, "%s takes no such argument among %R", run->call->name, arguments);
    return -1;
}

/* --- the run, without the GIL ----------------------------------------------------------------- */

/* Every byte outside the buffers is still the guard's, and no word has changed. */
static int arena_check(const struct bench_run *run, const unsigned char *arena,
                       struct error *error) {
    uint64_t at = 0;
    for (uint32_t i = 0; i <= run->memory.n_buffers; i++) {
        uint64_t end = i < run->memory.n_buffers ? run->offset[i] : run->bytes;
        for (; at < end; at++)
            if (arena[at] != GUARD_BYTE)
                return error_set(error, ERROR_DEVICE, "%s wrote outside its buffers, near %s",
                                 run->call->name, run->memory.buffers[i ? i - 1 : 0].name);
        if (i == run->memory.n_buffers)
            break;
        if (run->memory.buffers[i].words &&
            memcmp(arena + at, run->given[i], 4 * run->memory.buffers[i].n))
            return error_set(error, ERROR_DEVICE, "%s wrote into the words of %s", run->call->name,
                             run->memory.buffers[i].name);
        at += 4 * run->memory.buffers[i].n;
    }
    return 0;
}

/* The reference first: it checks every access, and the device then sees only what stays inside. */
static int run_both(struct bench_object *self, struct bench_run *run, struct error *error) {
    run->call->reference(&run->memory, run->reference_arguments);
    if (run->memory.failed) {
        *error = run->memory.error;
        return error_add_context(error, "%s", run->call->name);
    }
    char *arena = gpu_buffer_map(self->arena);
    memset(arena, GUARD_BYTE, run->bytes);
    for (uint32_t i = 0; i < run->memory.n_buffers; i++)
        memcpy(arena + run->offset[i], run->given[i], 4 * run->memory.buffers[i].n);
    if (run->call->run(&self->ops, run->device_arguments, error) ||
        gpu_queue_wait(self->ops.queue, error)) {
        gpu_queue_abandon(self->ops.queue);
        return -1;
    }
    for (uint32_t i = 0; i < run->memory.n_buffers; i++)
        if (run->returned[i])
            memcpy(run->returned[i], arena + run->offset[i], 4 * run->memory.buffers[i].n);
    return arena_check(run, (const unsigned char *)arena, error);
}

static int arena_grow(struct bench_object *self, uint64_t bytes, struct error *error) {
    if (self->arena && gpu_buffer_size(self->arena) >= bytes)
        return 0;
    gpu_buffer_destroy(self->arena);
    return gpu_buffer_create(&self->arena, self->owner->device, bytes, GPU_READBACK, "op bench",
                             error);
}

static int run_read(struct bench_run *run, const char *name, PyObject *buffers) {
    PyObject *key, *array;
    Py_ssize_t at = 0;
    run->call = op_call_find(name);
    if (!run->call) {
        PyErr_Format(PyExc_KeyError, "no op %s", name);
        return -1;
    }
    run->device_arguments = calloc(1, run->call->bytes);
    run->reference_arguments = calloc(1, run->call->bytes);
    run->on_device = PyDict_New();
    run->on_reference = PyDict_New();
    if (!run->device_arguments || !run->reference_arguments || !run->on_device ||
        !run->on_reference) {
        PyErr_NoMemory();
        return -1;
    }
    while (PyDict_Next(buffers, &at, &key, &array)) {
        if (!PyUnicode_Check(key)) {
            PyErr_SetString(PyExc_TypeError, "buffers are named by strings");
            return -1;
        }
        if (buffer_read(run, key, array))
            return -1;
    }
    run->bytes += GUARD;
    return 0;
}

static PyObject *bench_run(PyObject *object, PyObject *args) {
    struct bench_object *self = (struct bench_object *)object;
    struct error error = {0};
    const char *name;
    PyObject *arguments, *buffers, *result = NULL;
    if (!PyArg_ParseTuple(args, "sO!O!", &name, &PyDict_Type, &arguments, &PyDict_Type, &buffers))
        return NULL;
    struct bench_run *run = calloc(1, sizeof *run);
    if (!run)
        return PyErr_NoMemory();
    if (run_read(run, name, buffers) == 0) {
        engine_lock(self->owner);
        int failed = arena_grow(self, run->bytes, &error);
        int filled = !failed &&
                     arguments_fill(run, arguments, gpu_buffer_address(self->arena)) == 0;
        if (filled) {
            Py_BEGIN_ALLOW_THREADS
            failed = run_both(self, run, &error);
            Py_END_ALLOW_THREADS
        }
        engine_unlock(self->owner);
        if (failed)
            engine_raise(object, &error);
        else if (filled)
            result = PyTuple_Pack(2, run->on_device, run->on_reference);
    }
    for (uint32_t i = 0; i < REFERENCE_BUFFERS; i++)
        Py_XDECREF(run->arrays[i]);
    Py_XDECREF(run->on_device);
    Py_XDECREF(run->on_reference);
    free(run->device_arguments);
    free(run->reference_arguments);
    free(run);
    return result;
}

static PyObject *bench_self_test(PyObject *object, PyObject *args) {
    struct bench_object *self = (struct bench_object *)object;
    struct error error = {0};
    int family, type = -1, failed;
    if (!PyArg_ParseTuple(args, "i|i", &family, &type))
        return NULL;
    engine_lock(self->owner);
    Py_BEGIN_ALLOW_THREADS
    failed = op_linear_self_test(&self->ops, family, type, &error);
    Py_END_ALLOW_THREADS
    engine_unlock(self->owner);
    return failed ? engine_raise(object, &error) : Py_NewRef(Py_None);
}

static PyObject *bench_use(PyObject *object, PyObject *args) {
    struct bench_object *self = (struct bench_object *)object;
    int family, fast = 0;
    unsigned int large_from = OP_LARGE_COLUMNS;
    if (!PyArg_ParseTuple(args, "i|pI", &family, &fast, &large_from))
        return NULL;
    if (family < 0 || !op_kernel_family_offered(&self->ops, family))
        return PyErr_Format(PyExc_ValueError, "this device does not offer kernel family %d",
                            family);
    engine_lock(self->owner);
    self->ops.kernel_family = family;
    self->ops.fast = fast;
    self->ops.large_from = large_from;
    engine_unlock(self->owner);
    Py_RETURN_NONE;
}

static PyObject *bench_families(PyObject *object, PyObject *unused) {
    (void)unused;
    struct bench_object *self = (struct bench_object *)object;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < LINEAR_FAMILIES; i++) {
        PyObject *item = op_kernel_family_offered(&self->ops, i)
                             ? Py_BuildValue("(is)", i, op_kernel_family_name(i))
                             : Py_NewRef(Py_None);
        if (!item || (item != Py_None && PyList_Append(list, item)))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

/* --- the type --------------------------------------------------------------------------------- */

static PyObject *bench_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"device", NULL};
    PyObject *device;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O", names, &device))
        return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct bench_object *self = (struct bench_object *)allocate(type, 0);
    if (!self)
        return NULL;
    struct error error = {0};
    if ((PyObject *)Py_TYPE(device) != engine_state_of((PyObject *)self)->device_type) {
        PyErr_SetString(PyExc_TypeError, "device must be a Device");
        Py_CLEAR(self);
        return NULL;
    }
    self->owner = (struct device_object *)Py_NewRef(device);
    engine_lock(self->owner);
    int failed = ops_create(&self->ops, self->owner->device, &error);
    engine_unlock(self->owner);
    if (failed) {
        engine_raise((PyObject *)self, &error);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void bench_dealloc(PyObject *object) {
    struct bench_object *self = (struct bench_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->owner) {
        engine_lock(self->owner);
        ops_destroy(&self->ops);
        gpu_buffer_destroy(self->arena);
        engine_unlock(self->owner);
    }
    Py_XDECREF((PyObject *)self->owner);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

PyObject *engine_ops(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    static const char *const kinds[] = {"address", "uint", "float"};
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < op_calls_count; i++) {
        PyObject *fields = PyList_New(0);
        for (int j = 0; fields && j < op_calls[i].n_fields; j++) {
            const struct op_field *field = &op_calls[i].fields[j];
            PyObject *item = Py_BuildValue("(ssI)", field->name, kinds[field->kind], field->offset);
            if (!item || PyList_Append(fields, item))
                Py_CLEAR(fields);
            Py_XDECREF(item);
        }
        PyObject *item = fields ? Py_BuildValue("(snN)", op_calls[i].name,
                                                (Py_ssize_t)op_calls[i].params_bytes, fields)
                                : NULL;
        if (!item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyMethodDef bench_methods[] = {
    {"run", bench_run, METH_VARARGS,
     "run(op, arguments, buffers) -> (device, reference)\n\nRuns one op on copies of `buffers` "
     "(name -> "
     "float32 or uint32 array) on the device, and its reference on\n"
     "float64 copies. `arguments`: field -> number, or for an address a buffer's name or (name, "
     "first item); what is not named is 0 or absent.\n"
     "Returns the float arrays as they are afterwards. An access outside its buffer is a "
     "ValueError before the device sees it."},
    {"families", bench_families, METH_NOARGS,
     "families() -> list of (number, name): the matrix kernels that this device offers."},
    {"use", bench_use, METH_VARARGS,
     "use(family, fast=False, large_from=2048): the family of ops whose arguments name none, "
     "precision and tile sizes on matrix units."},
    {"self_test", bench_self_test, METH_VARARGS,
     "self_test(family, weight_type=-1): ValueError unless this family of matrix kernels may "
     "replace the baseline."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot bench_slots[] = {
    {Py_tp_new, bench_new},
    {Py_tp_dealloc, bench_dealloc},
    {Py_tp_methods, bench_methods},
    {Py_tp_doc, "Bench(device): runs single ops and their float64 references."},
    {0, NULL}};
PyType_Spec bench_spec = {
    .name = "vksteer._engine.Bench",
    .basicsize = sizeof(struct bench_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = bench_slots,
};
