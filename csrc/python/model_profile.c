/* Model methods that profile: what each kernel costs on the device, and the host's part. */
#include <stdlib.h>

#include "engine.h"

/* profile_start(): begins to profile; a profile that runs goes on. Each start has its stop. */
PyObject *model_profile_start(PyObject *object, PyObject *unused) {
    (void)unused;
    struct model_object *self = (struct model_object *)object;
    struct error error = {0};
    int failed;
    if (engine_begin(self, 1))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = gpu_queue_profile_start(self->model->ops.queue, &error);
    engine_end(self);
    Py_END_ALLOW_THREADS
    return failed ? engine_fail(self, &error) : Py_NewRef(Py_None);
}

/* profile_stop(): idempotent after the last stop. */
PyObject *model_profile_stop(PyObject *object, PyObject *unused) {
    (void)unused;
    struct model_object *self = (struct model_object *)object;
    if (engine_begin(self, 1))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    gpu_queue_profile_stop(self->model->ops.queue);
    engine_end(self);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *read_result(const struct gpu_profile_row *rows, int n,
                             const struct gpu_profile_totals *totals) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < n; i++) {
        PyObject *row = Py_BuildValue("(sKdddd)", rows[i].kernel, (unsigned long long)rows[i].calls,
                                      rows[i].seconds, rows[i].bytes_read, rows[i].bytes_written,
                                      rows[i].flops);
        if (!row || PyList_Append(list, row))
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list ? Py_BuildValue("(NKKKd)", list, (unsigned long long)totals->dispatches,
                                (unsigned long long)totals->barriers,
                                (unsigned long long)totals->submissions, totals->host_seconds)
                : NULL;
}

/* profile_read() -> (rows, dispatches, barriers, submissions, host seconds); rows: (kernel, calls,
 * seconds, bytes read, bytes written, flops), all since the first start; the three counts since the
 * model was made. */
PyObject *model_profile_read(PyObject *object, PyObject *unused) {
    (void)unused;
    struct model_object *self = (struct model_object *)object;
    struct gpu_profile_row *rows = malloc((KERNEL_COUNT + 2) * sizeof *rows);
    struct gpu_profile_totals totals = {0};
    struct error error = {0};
    PyObject *result = NULL;
    int failed = -1, n = 0;
    if (!rows)
        return PyErr_NoMemory();
    if (engine_begin(self, 1) == 0) {
        Py_BEGIN_ALLOW_THREADS
        failed = gpu_queue_profile_read(self->model->ops.queue, rows, &n, &totals, &error);
        engine_end(self);
        Py_END_ALLOW_THREADS
        result = failed ? engine_fail(self, &error) : read_result(rows, n, &totals);
    }
    free(rows);
    return result;
}
