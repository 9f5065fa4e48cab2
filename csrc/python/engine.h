/* What the files of csrc/python share: the module's state, errors turned into exceptions,
 * NumPy arrays in and out.
 *
 * Ownership: every object keeps a reference to the one it works on (Model -> Device, Cache ->
 * Model), so that freeing order never matters.
 * Threads: the GIL is released while the device works, and the device's own lock serialises
 * threads. No thread waits for the lock while it holds the GIL, so the lock's holder may take the
 * GIL (engine_poll, allocating arrays).
 * fork(): the child takes no lock, because its holder may not exist there, and touches no driver;
 * every call raises DeviceError. */
#ifndef VKSTEER_PYTHON_ENGINE_H
#define VKSTEER_PYTHON_ENGINE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>

#include "base/mapped_file.h"
#include "analysis/attribution.h"

struct device_object {
    PyObject_HEAD
    struct gpu_device *device;
    /* recursive: garbage collection may free device memory while this thread holds the lock */
    pthread_mutex_t lock;
    _Atomic(pthread_t) holder; /* of the lock, where depth > 0 */
    _Atomic int depth;
    pid_t owner;         /* the process that opened it */
    int busy;            /* a call is under way; read and written under the lock */
    volatile int ending; /* the interpreter is ending, by `ender`: see Device.hold */
    pthread_t ender;
};

struct file_object {
    PyObject_HEAD
    struct mapped_file file;
};

struct model_object {
    PyObject_HEAD
    struct device_object *owner;
    struct model *model;   /* NULL once closed */
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

/* The rows of one batch. */
enum { PACKED_ROWS_TOKENS, PACKED_ROWS_N_TOKENS, PACKED_ROWS_ARRAYS = 14 };
struct packed_rows_object {
    PyObject_HEAD
    struct run_batch batch; /* n_rows is set by packed_rows_check; no captures, no logits */
    uint32_t n_out_rows;
    struct edits_object *edits;
    PyObject *arrays[PACKED_ROWS_ARRAYS]; /* borrowed from; NULL where one is not given */
    Py_ssize_t lengths[PACKED_ROWS_ARRAYS];
};

struct engine_state {
    PyObject *device_type, *file_type, *model_type, *cache_type, *edits_type, *packed_rows_type,
        *bench_type, *tape_type, *attribution_type, *circuits_type, *encoder_type;
    PyObject *device_error, *model_error;
};

/* Memory for forward and backward passes: buffers for `capacity` tokens and their tape. */
struct tape_object {
    PyObject_HEAD
    struct model_object *owner;
    struct run_work *work;
    struct run_tape *tape;
};

struct attribution_object {
    PyObject_HEAD
    struct model_object *owner;
    struct attribution *attribution;
};

extern PyType_Spec device_spec, file_spec, model_spec, cache_spec, edits_spec, packed_rows_spec,
    bench_spec, tape_spec, attribution_spec, circuits_spec, encoder_spec;
/* engine.c */
struct engine_state *engine_state_of(PyObject *object); /* of a heap type's instance */

/* Sets the exception for `error`; always returns NULL. */
PyObject *engine_raise(PyObject *object, const struct error *error);

/* Takes the device's lock. The caller holds the GIL, which is released while waiting. Once the
 * interpreter ends, it returns only in the thread that ends it and in one that has the lock. */
void engine_lock(struct device_object *device);
void engine_unlock(struct device_object *device);

/* Begins a call that works on an open model (finished: one that is loaded, too) and takes the lock.
 * Returns -1 with an exception set and without the lock where the model is closed, where the device
 * is lost or belongs to the parent of a fork, and where this thread is inside a call already (in a
 * signal handler). */
int engine_begin(struct model_object *model, int finished);
void engine_end(struct model_object *model); /* with or without the GIL */
/* Cache, Edits, Tape, Attribution, Circuits and Encoder begin like this. */
struct owned_object {
    PyObject_HEAD
    struct model_object *owner;
};
/* Begins a constructor: a new object that owns `model`, after engine_begin. NULL with
 * TypeError(needs) where `model` is no Model or !valid, or with the exception of engine_begin. */
PyObject *engine_owned_new(PyTypeObject *type, PyObject *model, int valid, const char *needs);
/* Ends it: engine_end; on failure raises `error` (if it is set) and frees the object. */
PyObject *engine_owned_made(PyObject *object, int failed, const struct error *error);
/* Frees an object. destroy runs with the device's lock; its owner's model may be closed by then:
 * the queue is idle and gone. */
void engine_owned_free(PyObject *object, void (*destroy)(PyObject *object));

/* engine_raise for a failed call, after engine_end. A thread that was stopped because the
 * interpreter ends does not return. */
PyObject *engine_fail(struct model_object *model, const struct error *error);

/* The end of a method that began with engine_begin. begun: ENGINE_WORK was not reached and an
 * exception is set; the call is ended here. Otherwise `failed` is what ENGINE_WORK gave, and
 * `error` is raised if it is not 0. Returns 1 where the method succeeded. */
int engine_finish(struct model_object *model, int begun, int failed, const struct error *error);

/* For gpu_queue_poll, context: the device object. Non-zero when a signal handler raised (its
 * exception stays set) or the interpreter ends. */
int engine_poll(void *context);

/* failed = call; the call works on the device with the GIL released and signals polled. Between
 * engine_begin and engine_end, which it includes. */
#define ENGINE_WORK(self, failed, call) \
    do { \
        Py_BEGIN_ALLOW_THREADS \
        gpu_queue_poll((self)->model->ops.queue, engine_poll, (self)->owner); \
        failed = (call); \
        gpu_queue_poll((self)->model->ops.queue, NULL, NULL); \
        engine_end(self); \
        Py_END_ALLOW_THREADS \
    } while (0)

/* device_type.c */
PyObject *engine_devices(PyObject *module, PyObject *unused);
/* ops_type.c */
PyObject *engine_ops(PyObject *module, PyObject *unused);
/* tape_type.c */
PyObject *engine_tape_bytes(PyObject *module, PyObject *args);
struct batch_arguments;
/* The scalar whose gradient is taken: metric = (kind, capped, tokens, a, b, weights, reference,
 * other, reference_logits). A new array of its values. */
PyObject *batch_metric_read(struct batch_arguments *a, const struct model *model, PyObject *tuple,
                            struct run_metric *metric);
/* attribution_type.c */
PyObject *engine_attribution_bytes(PyObject *module, PyObject *args);
/* circuit_type.c */
PyObject *engine_measure(PyObject *module, PyObject *args);
/* packed_rows_type.c: ValueError or TypeError where lengths or values do not fit together or do not
 * fit the model; *total: tokens of all rows. */
int packed_rows_check(struct packed_rows_object *self, const struct model_facts *f,
                      uint64_t *total);

/* batch.c */
/* What a call that runs a batch takes from Python; borrowed until batch_release. */
struct batch_arguments {
    struct run_batch batch;
    struct run_cache *cache;
    struct run_capture *captures;
    uint32_t n_out_rows;
    uint64_t n_tokens;  /* of all rows */
    PyObject *held[24]; /* objects that are borrowed from */
    int n_held;
};
/* cache: a Cache of this model; rows: PackedRows, checked. After engine_begin. */
int batch_read(struct batch_arguments *a, struct model_object *self, PyObject *cache,
               PyObject *rows);
/* An array of exactly `expected` items (< 0: of any number); None gives NULL. */
int batch_borrow(struct batch_arguments *a, PyObject *object, char type, const char *name,
                 Py_ssize_t expected, const void **data);
/* A uint32 array of any number of items. */
int batch_list(struct batch_arguments *a, PyObject *object, const char *name, const uint32_t **data,
               Py_ssize_t *n);
/* list: (site, layer) pairs. Makes *captures (to be freed), and puts their new arrays into dict. */
int batch_captures_read(const struct model *model, const struct batch_arguments *a, PyObject *list,
                        PyObject *dict, struct run_capture **captures, uint32_t *n_captures);
void batch_release(struct batch_arguments *a);

/* model_facts.c */
int model_facts_read(PyObject *dict, struct model_facts *f);
int model_ropes_read(PyObject *dict, struct model_facts *f, double **tables, double *factors);

/* model_ov.c */
PyObject *model_value_vectors(PyObject *self, PyObject *args);
PyObject *model_lens(PyObject *self, PyObject *args);
PyObject *model_rows(PyObject *self, PyObject *args);

/* model_kernels.c */
PyObject *model_get_family(PyObject *self, void *unused);
int model_set_family(PyObject *self, PyObject *value, void *unused);
PyObject *model_get_fast(PyObject *self, void *unused);
int model_set_fast(PyObject *self, PyObject *value, void *unused);
PyObject *model_get_families(PyObject *self, void *unused);
PyObject *model_measure_linear(PyObject *self, PyObject *args);
PyObject *model_prepare(PyObject *self, PyObject *unused);
PyObject *model_measure_read(PyObject *self, PyObject *args);
/* model_profile.c */
PyObject *model_profile_start(PyObject *self, PyObject *unused);
PyObject *model_profile_stop(PyObject *self, PyObject *unused);
PyObject *model_profile_read(PyObject *self, PyObject *unused);

/* arrays.c: NumPy's C API stays in this one file. */
int arrays_import(void);
/* A new C-contiguous float32 array of zeros; *data is its memory. */
PyObject *array_zeros(int n_dims, const Py_ssize_t *dims, float **data);
PyObject *array_zeros_double(int n_dims, const Py_ssize_t *dims, double **data);
PyObject *array_zeros_int(int n_dims, const Py_ssize_t *dims, int32_t **data);
/* Borrowed views of C-contiguous arrays with exactly this item type ('f' float32, 'i' int32, 'I'
 * uint32, 'q' int64, 'B' uint8): a new reference, or NULL with TypeError/ValueError set. */
PyObject *array_view(PyObject *object, char type, const char *name, const void **data,
                     Py_ssize_t *n);
int array_is(PyObject *object, char type); /* an array with this item type? */
/* A new C-contiguous copy with the items cast to `type` (as above, or 'd' float64);
 * *data is its memory. */
PyObject *array_copy(PyObject *array, char type, void **data);
Py_ssize_t array_dim(PyObject *array, int axis); /* -1 if there is no such axis */

#endif
