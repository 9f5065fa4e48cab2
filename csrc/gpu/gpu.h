/* Devices, buffers, kernels and command queues. This is the only interface of the module to the
 * rest of the engine, and no Vulkan type is part of it.
 *
 * Ownership: the caller owns what `_create` and `_open` give out, and gives it back to `_destroy`
 * or
 * `_close`, which accept NULL. A device must outlive its buffers and queues.
 * Errors: a function that can fail returns 0, or -1 with `struct error` filled in; outputs are then
 * NULL or undefined.
 * Threads: an open device with its buffers and queues is used by one thread at a time (the caller
 * holds its lock), except in gpu_pipelines_prepare. Devices may be listed by any thread.
 */
#ifndef VKSTEER_GPU_H
#define VKSTEER_GPU_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

enum gpu_device_type { GPU_DISCRETE, GPU_INTEGRATED, GPU_VIRTUAL, GPU_SOFTWARE };

struct gpu_device_info {
    int index; /* in Vulkan's own order */
    char name[256];
    char vendor[32];
    enum gpu_device_type type;
    char driver[544];         /* name and version, as the driver reports them */
    char uuid[33];            /* hexadecimal device UUID */
    uint64_t memory_bytes;    /* the largest device-local heap */
    uint64_t available_bytes; /* what VK_EXT_memory_budget says is left of it, or memory_bytes */
    uint32_t subgroup_size;
    uint32_t max_push_bytes, max_shared_bytes, max_invocations;
    int has_budget, has_subgroup_control, has_executable_info, has_int64;
    /* Matrix units (VK_KHR_cooperative_matrix): a subgroup multiplies [matrix_m, matrix_k] by
     * [matrix_k, matrix_n] float16 and adds in float32; 0: there are none that kernels can use. */
    uint32_t matrix_m, matrix_n, matrix_k;
    uint32_t max_texels; /* 16-byte texels that a texel buffer may have; 0: unsupported */
    int suitable;        /* offers the baseline; if not, `missing` says what is absent */
    char missing[160];
};

#define GPU_ADDRESSES 16 /* the most addresses of a kernel's parameters */

/* One compiled kernel, from csrc/ops. The arrays are borrowed and must outlive the device. */
struct gpu_kernel {
    const char *name;
    const uint32_t *spirv;
    size_t spirv_bytes; /* 0: this build left the kernel out */
    size_t params_bytes;
    /* names of the addresses with which its parameters begin; NULL after the last */
    const char *addresses[GPU_ADDRESSES + 1];
    uint32_t written; /* bit i: it may write through address i; else it only reads there */
    /* bytes that a dispatch reads and writes, for profiles */
    void (*bytes)(const void *params, const uint32_t grid[3], double flops, double *read,
                  double *written);
};

struct gpu_device;
struct gpu_buffer;
struct gpu_queue;

/* Describes the devices of this machine in `infos`, at most `capacity` of them; *count is how many
 * there are. Without a device *count is 0 and the call succeeds. ERROR_DEVICE without a loader or a
 * driver, and in a child of fork(). */
int gpu_devices_list(struct gpu_device_info *infos, int capacity, int *count, struct error *error);

/* Opens device `index`. `kernels` [n_kernels] is borrowed until the device is closed. The pipeline
 * cache is read from and written to `cache_folder`; NULL or "" keeps none on disk. ERROR_DEVICE if
 * there is no such device or it lacks the baseline. */
int gpu_device_open(struct gpu_device **out, int index, const struct gpu_kernel *kernels,
                    int n_kernels, const char *cache_folder, struct error *error);
/* Waits for the device, writes its pipeline cache and frees it. In a child of fork() only host
 * memory is freed. */
void gpu_device_close(struct gpu_device *device);
/* The facts of the device as they were when it was opened; borrowed until it is closed. */
const struct gpu_device_info *gpu_device_get_info(const struct gpu_device *device);
/* Invocations of a workgroup: a multiple of the subgroup size. */
uint32_t gpu_device_workgroup(const struct gpu_device *device);
/* Buffers may take at most `bytes` together from now on, as on a device that has no more; 0: what
 * the device has. */
void gpu_device_limit(struct gpu_device *device, uint64_t bytes);
/* Bytes of device-local memory that are free now, of what the buffers may take; 0 in a child of
 * fork(). */
uint64_t gpu_device_available(const struct gpu_device *device);
/* Bytes that the buffers of this device hold. */
uint64_t gpu_device_allocated(const struct gpu_device *device);
/* The most bytes that they have held together since the last reset. reset: 1 to begin again. */
uint64_t gpu_device_peak(struct gpu_device *device, int reset);
/* ERROR_DEVICE if the device was lost or this process is a child of the one that opened it. */
int gpu_device_check(const struct gpu_device *device, struct error *error);

enum gpu_memory { GPU_DEVICE_LOCAL, GPU_UPLOAD, GPU_READBACK };

/* The largest buffer: drivers commonly allow 1 GiB for one allocation. */
#define GPU_BUFFER_MAX (UINT64_C(1) << 30)
/* A buffer of `bytes`, rounded up to a multiple of 16, with undefined contents. `name` appears in
 * messages and debuggers. ERROR_DEVICE if `bytes` is 0 or above GPU_BUFFER_MAX, or memory is
 * short. */
int gpu_buffer_create(struct gpu_buffer **out, struct gpu_device *device, uint64_t bytes,
                      enum gpu_memory memory, const char *name, struct error *error);
/* Frees a buffer, which submitted work must not use any more. */
void gpu_buffer_destroy(struct gpu_buffer *buffer);
/* The address by which kernels read and write the buffer. */
uint64_t gpu_buffer_address(const struct gpu_buffer *buffer);
/* Bytes of the buffer, after rounding up. */
uint64_t gpu_buffer_size(const struct gpu_buffer *buffer);
/* The buffer's memory for the host, valid until it is destroyed; NULL for GPU_DEVICE_LOCAL. */
void *gpu_buffer_map(struct gpu_buffer *buffer);

/* A queue records commands in order, and every command sees the results of those before it; those
 * that touch nothing of each other may run side by side. A buffer is used by one queue from one of
 * its waits to the next.
 * Recorded commands are submitted when their estimated time passes a bound (because of watchdogs),
 * and by a wait. */
int gpu_queue_create(struct gpu_queue **out, struct gpu_device *device, struct error *error);
/* Waits for the device and frees the queue. */
void gpu_queue_destroy(struct gpu_queue *queue);
/* Records a dispatch of x * y * z workgroups; none if one of them is 0. `params` is copied into the
 * push constants, and its size must be that of the kernel's parameters. `flops` estimates its
 * length. ERROR_VALUE if a dimension exceeds 65535 or the size is another. */
int gpu_queue_dispatch(struct gpu_queue *queue, int kernel, const void *params, size_t params_bytes,
                       uint32_t x, uint32_t y, uint32_t z, double flops, struct error *error);
/* For the next dispatch: from address i of its parameters on it touches at most `bytes`, instead of
 * the whole buffer, so that it need not wait for work on other parts. */
void gpu_queue_extent(struct gpu_queue *queue, size_t i, uint64_t bytes);
/* Binds `bytes` from device address `address`, which lie in one buffer, as the texel buffer
 * (16-byte texels, set 0, binding 0) of the next dispatch. The view is kept with the buffer, so
 * that binding it again is cheap. ERROR_DEVICE if the range cannot be a texel buffer. */
int gpu_queue_texels(struct gpu_queue *queue, uint64_t address, uint64_t bytes,
                     struct error *error);
/* Records a copy between buffers. ERROR_VALUE if a range leaves its buffer. */
int gpu_queue_copy(struct gpu_queue *queue, struct gpu_buffer *from, uint64_t from_offset,
                   struct gpu_buffer *to, uint64_t to_offset, uint64_t bytes, struct error *error);
/* Records zeroing of `bytes` from `offset` on; both are multiples of 4. ERROR_VALUE otherwise, and
 * if the range leaves the buffer. */
int gpu_queue_zero(struct gpu_queue *queue, struct gpu_buffer *buffer, uint64_t offset,
                   uint64_t bytes, struct error *error);
/* The commands from keep_begin to keep_end are recorded like all others, and kept: run_kept adds
 * them again, with the same arguments, after everything recorded before. *complete: 0 where they
 * could not be kept (they were submitted in parts, or there is a profile), and run_kept must not be
 * called. A queue keeps the last ones; keep_begin waits for those before. */
int gpu_queue_keep_begin(struct gpu_queue *queue, struct error *error);
int gpu_queue_keep_end(struct gpu_queue *queue, int *complete, struct error *error);
int gpu_queue_run_kept(struct gpu_queue *queue, struct error *error);
/* Submits what was recorded and waits for all submitted work. ERROR_INTERRUPTED, after the wait, if
 * the poll function asked for it; ERROR_DEVICE if the device was lost. */
int gpu_queue_wait(struct gpu_queue *queue, struct error *error);
/* For use after a failure: discards what was recorded and not submitted, and waits for the rest, so
 * that buffers may be freed and the queue used again. Calling it again does nothing. */
void gpu_queue_abandon(struct gpu_queue *queue);
/* `poll(context)` is called while the queue waits; non-zero asks for an interrupt. NULL: none. A
 * profile's host_seconds run from a call that sets it to the next that sets none. */
void gpu_queue_poll(struct gpu_queue *queue, int (*poll)(void *), void *context);
/* Floating-point operations that one submission should hold. A larger dispatch is better split:
 * watchdogs and Ctrl-C have to wait for all of it. */
double gpu_queue_flops_bound(const struct gpu_queue *queue);
/* Dispatches recorded since the queue was created, for benchmarks. */
uint64_t gpu_queue_dispatches(const struct gpu_queue *queue);

/* --- profile: what the commands of a queue cost, by kernel. Nothing is measured and no time is
 * taken while none runs. Results are bit-identical with one and without --- */

struct gpu_profile_row {
    const char *kernel; /* "(copy)", "(fill)": copies and fills */
    uint64_t calls;
    /* on the device, from the end of the command before to this one's; NAN without timestamps */
    double seconds;
    double bytes_read, bytes_written, flops;
};
struct gpu_profile_totals {
    uint64_t dispatches, barriers, submissions; /* since the queue was created */
    double host_seconds; /* recording and submitting: calls without their waits for the device */
};
/* Waits and begins to profile; a profile that runs goes on, and ends with as many stops. */
int gpu_queue_profile_start(struct gpu_queue *queue, struct error *error);
void gpu_queue_profile_stop(struct gpu_queue *queue);
/* Waits, then the rows of what ran since the first start, at most one a kernel and two more
 * (*n: how many). ERROR_VALUE where nothing is profiled. */
int gpu_queue_profile_read(struct gpu_queue *queue, struct gpu_profile_row *rows, int *n,
                           struct gpu_profile_totals *totals, struct error *error);

/* 1 if the kernel runs on matrix units. */
int gpu_kernel_on_matrix_units(const struct gpu_kernel *kernel);
/* 1 if this build contains the kernel and the device offers what it needs (64-bit integers, matrix
 * units). */
int gpu_pipeline_possible(const struct gpu_device *device, int kernel);
/* Compiles `count` kernels in parallel threads; those compiled already are skipped. If several
 * fail, one of their errors is reported. */
int gpu_pipelines_prepare(struct gpu_device *device, const int *kernels, int count,
                          struct error *error);
/* Compiler statistics such as registers and spills, one `name=value` a line, as text in `out`
 * (terminated, cut at `capacity`); "" where the driver does not offer
 * VK_KHR_pipeline_executable_properties. */
int gpu_pipeline_describe(struct gpu_device *device, int kernel, char *out, size_t capacity,
                          struct error *error);

#endif
