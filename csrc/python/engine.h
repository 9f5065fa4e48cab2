/* What the files of this room share: the module's state, errors turned into exceptions, NumPy arrays in and out.
 *
 * Ownership: every object keeps a reference to the one it works on (Model -> Device, Cache -> Model), so that freeing order never matters.
 * The GIL is released while the device works; the device's own lock serialises threads. */
#ifndef VKSTEER_PYTHON_ENGINE_H
#define VKSTEER_PYTHON_ENGINE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>

#include "base/mapped_file.h"
#include "run/run.h"

struct device_object {
    PyObject_HEAD
    struct gpu_device *device; /* NULL once closed */
    pthread_mutex_t lock;
};

struct file_object {
    PyObject_HEAD
    struct mapped_file file;
};

struct model_object {
    PyObject_HEAD
    struct device_object *owner;
    struct model *model; /* NULL once closed */
    struct run_work *work; /* NULL until finished loading */
};

struct cache_object {
    PyObject_HEAD
    struct model_object *owner;
    struct run_cache *cache;
};

struct edits_object {
    PyObject_HEAD
    struct model_object *owner;
    struct edit_list list;
    struct gpu_buffer *operands;
    uint32_t *positions, *heads;
};

struct engine_state {
    PyObject *device_type, *file_type, *model_type, *cache_type, *edits_type, *bench_type;
    PyObject *device_error, *model_error;
};

extern PyType_Spec device_spec, file_spec, model_spec, cache_spec, edits_spec, bench_spec;
struct engine_state *engine_state_of(PyObject *object); /* of a heap type's instance */

/* Sets the exception that `error` stands for; always returns NULL. */
PyObject *engine_raise(PyObject *object, const struct error *error);
/* For gpu_stream_poll: non-zero when a signal handler raised; its exception stays set. */
int engine_poll(void *context);

/* Takes the device's lock with the GIL held: gives the GIL up while it waits, because the thread that has the lock may want it (engine_poll). */
void engine_lock(struct device_object *device);
void engine_unlock(struct device_object *device);

/* device_type.c */
PyObject *engine_devices(PyObject *module, PyObject *unused);
/* ops_type.c */
PyObject *engine_ops(PyObject *module, PyObject *unused);
/* forward.c */
PyObject *model_forward(PyObject *self, PyObject *args, PyObject *keywords);

/* choice.c */
PyObject *model_get_family(PyObject *self, void *unused);
int model_set_family(PyObject *self, PyObject *value, void *unused);
PyObject *model_get_families(PyObject *self, void *unused);
PyObject *model_measure_linear(PyObject *self, PyObject *args);
PyObject *model_prepare(PyObject *self, PyObject *unused);
PyObject *model_measure_read(PyObject *self, PyObject *args);

/* arrays.c: NumPy's C API stays in this one file. */
int arrays_import(void);
/* A new C-contiguous float32 array of zeros; *data is its memory. */
PyObject *array_zeros(int n_dims, const Py_ssize_t *dims, float **data);
/* Borrowed views of C-contiguous arrays with exactly this item type ('f' float32, 'i' int32, 'I' uint32, 'q' int64, 'B' uint8): a new
 * reference, or NULL with TypeError/ValueError set. */
PyObject *array_view(PyObject *object, char type, const char *name, const void **data, Py_ssize_t *n);
int array_is(PyObject *object, char type); /* an array with this item type? */
/* A new C-contiguous copy with the items cast to `type` (as above, or 'd' float64); *data is its memory. */
PyObject *array_copy(PyObject *array, char type, void **data);
Py_ssize_t array_dim(PyObject *array, int axis); /* -1 if there is no such axis */

#endif
