/* What every type needs: the state behind an object, errors turned into exceptions, the device's
 * lock, calls begun and ended. */
#include "engine.h"

#include <unistd.h>

struct engine_state *engine_state_of(PyObject *object) {
    return PyType_GetModuleState(Py_TYPE(object));
}

PyObject *engine_raise(PyObject *object, const struct error *error) {
    struct engine_state *state = PyModule_Check(object) ? PyModule_GetState(object)
                                                        : engine_state_of(object);
    PyObject *type = PyExc_RuntimeError;
    switch (error->kind) {
    case ERROR_DEVICE: type = state->device_error; break;
    case ERROR_MODEL: type = state->model_error; break;
    case ERROR_VALUE: type = PyExc_ValueError; break;
    case ERROR_TYPE: type = PyExc_TypeError; break;
    case ERROR_KEY: type = PyExc_KeyError; break;
    case ERROR_MEMORY: type = PyExc_MemoryError; break;
    case ERROR_INTERRUPTED:
        if (PyErr_Occurred()) /* what the signal handler raised */
            return NULL;
        type = PyExc_KeyboardInterrupt;
        break;
    }
    PyErr_SetString(type, error->message);
    return NULL;
}

int engine_poll(void *context) {
    if (((struct device_object *)context)->ending)
        return 1;
    PyGILState_STATE gil = PyGILState_Ensure();
    int raised = PyErr_Occurred() != NULL || PyErr_CheckSignals() != 0;
    PyGILState_Release(gil);
    return raised;
}

/* For daemon threads while the interpreter ends: they would only fail, and print why,
 * while all is taken down. */
static void stand_still(const struct device_object *device) {
    if (!device->ending || pthread_equal(device->ender, pthread_self()) ||
        (device->depth && pthread_equal(device->holder, pthread_self())))
        return;
    Py_BEGIN_ALLOW_THREADS
    for (;;)
        pause();
    Py_END_ALLOW_THREADS
}

void engine_lock(struct device_object *device) {
    stand_still(device);
    if (device->owner != getpid())
        return;
    if (pthread_mutex_trylock(&device->lock) != 0) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&device->lock);
        Py_END_ALLOW_THREADS
    }
    /* before depth: whoever reads a depth reads its holder, or a later one */
    device->holder = pthread_self();
    device->depth++;
}

void engine_unlock(struct device_object *device) {
    if (device->owner != getpid())
        return;
    device->depth--;
    pthread_mutex_unlock(&device->lock);
}

int engine_begin(struct model_object *model, int finished) {
    struct device_object *device = model->owner;
    struct error error = {0};
    engine_lock(device);
    if (!model->model || (finished && !model->work)) {
        PyErr_SetString(PyExc_ValueError,
                        model->model ? "the model is not loaded yet" : "the model is closed");
    } else if (gpu_device_check(device->device, &error)) {
        engine_raise((PyObject *)model, &error);
    } else if (device->busy) {
        PyErr_SetString(PyExc_RuntimeError, "the device is inside a call of this thread: a signal "
                                            "handler cannot begin another one");
    } else {
        device->busy = 1;
        return 0;
    }
    engine_unlock(device);
    return -1;
}

void engine_end(struct model_object *model) {
    model->owner->busy = 0;
    engine_unlock(model->owner);
}

PyObject *engine_fail(struct model_object *model, const struct error *error) {
    stand_still(model->owner);
    return engine_raise((PyObject *)model, error);
}

int engine_finish(struct model_object *model, int begun, int failed, const struct error *error) {
    if (begun)
        engine_end(model);
    else if (failed)
        engine_fail(model, error);
    return !begun && !failed;
}

PyObject *engine_owned_new(PyTypeObject *type, PyObject *model, int valid, const char *needs) {
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct owned_object *self = (struct owned_object *)allocate(type, 0);
    if (!self)
        return NULL;
    valid = valid && (PyObject *)Py_TYPE(model) == engine_state_of((PyObject *)self)->model_type;
    if (!valid)
        PyErr_SetString(PyExc_TypeError, needs);
    if (!valid || engine_begin((struct model_object *)model, 1)) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    self->owner = (struct model_object *)Py_NewRef(model);
    return (PyObject *)self;
}

PyObject *engine_owned_made(PyObject *object, int failed, const struct error *error) {
    engine_end(((struct owned_object *)object)->owner);
    if (!failed)
        return object;
    if (error->kind != ERROR_NONE)
        engine_raise(object, error);
    Py_DECREF(object);
    return NULL;
}

void engine_owned_free(PyObject *object, void (*destroy)(PyObject *object)) {
    struct model_object *owner = ((struct owned_object *)object)->owner;
    PyTypeObject *type = Py_TYPE(object);
    if (owner) {
        engine_lock(owner->owner);
        destroy(object);
        engine_unlock(owner->owner);
    }
    Py_XDECREF((PyObject *)owner);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}
