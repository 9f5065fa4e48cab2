/* The device as the rest of the engine sees it: devices, buffers, kernels, one queue of work. No
 * Vulkan type leaves this room.
 *
 * Ownership: `_create`/`_open` give an object to the caller, `_destroy`/`_close` take it (NULL and
 * half-built objects are legal).
 * Errors: 0, or -1 with `struct error` filled where it happened.
 * Threads: an open device is used by one thread at a time (the caller holds its lock); listing
 * devices is safe from any thread.
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
    char driver[544];         /* name and version, as the driver tells them */
    char uuid[33];            /* hexadecimal device UUID */
    uint64_t memory_bytes;    /* the largest device-local heap */
    uint64_t available_bytes; /* what VK_EXT_memory_budget says is left of it, or memory_bytes */
    uint32_t subgroup_size;
    uint32_t max_push_bytes, max_shared_bytes, max_invocations;
    int has_budget, has_subgroup_control, has_executable_info, has_int64;
    uint32_t max_texels; /* 16-byte texels that a texel buffer may have; 0: none can be had */
    int suitable;        /* offers the baseline; if not, `missing` says what is absent */
    char missing[160];
};

/* One compiled kernel as the ops room hands it over; the arrays must outlive the device. */
struct gpu_kernel {
    const char *name;
    const uint32_t *spirv;
    size_t spirv_bytes; /* 0: this build left the kernel out */
    size_t params_bytes;
};

struct gpu_device;
struct gpu_buffer;
struct gpu_queue;

/* Fills up to `capacity` entries, sets *count to the number of devices. No driver at all:
 * *count = 0 and success. */
int gpu_devices_list(struct gpu_device_info *infos, int capacity, int *count, struct error *error);

int gpu_device_open(struct gpu_device **out, int index, const struct gpu_kernel *kernels,
                    int n_kernels, const char *cache_folder, struct error *error);
void gpu_device_close(struct gpu_device *device);
const struct gpu_device_info *gpu_device_get_info(const struct gpu_device *device);
/* invocations of a workgroup: a multiple of the subgroup size */
uint32_t gpu_device_workgroup(const struct gpu_device *device);
/* device-local bytes left, asked now */
uint64_t gpu_device_available(const struct gpu_device *device);
/* bytes that this device object holds */
uint64_t gpu_device_allocated(const struct gpu_device *device);
/* lost, or used after fork(): an error */
int gpu_device_check(const struct gpu_device *device, struct error *error);

enum gpu_memory { GPU_DEVICE_LOCAL, GPU_UPLOAD, GPU_READBACK };

/* At most 1 GiB a buffer (drivers' soft limit). Contents start undefined. */
#define GPU_BUFFER_MAX (UINT64_C(1) << 30)
int gpu_buffer_create(struct gpu_buffer **out, struct gpu_device *device, uint64_t bytes,
                      enum gpu_memory memory, const char *name, struct error *error);
void gpu_buffer_destroy(struct gpu_buffer *buffer);
uint64_t gpu_buffer_address(const struct gpu_buffer *buffer);
uint64_t gpu_buffer_size(const struct gpu_buffer *buffer);
/* NULL for device-local memory that the host cannot see */
void *gpu_buffer_map(struct gpu_buffer *buffer);

/* A queue records work in order; every dispatch sees the results of those before it. Recorded work
 * is submitted when its estimated time passes a bound (watchdogs), on flush, and on wait. */
int gpu_queue_create(struct gpu_queue **out, struct gpu_device *device, struct error *error);
void gpu_queue_destroy(struct gpu_queue *queue);
int gpu_queue_dispatch(struct gpu_queue *queue, int kernel, const void *params, size_t params_bytes,
                       uint32_t x, uint32_t y, uint32_t z, double flops, struct error *error);
/* The next dispatch sees `bytes` from device address `address` (in one buffer) as a texel buffer of
 * 16-byte texels, at set 0, binding 0. Views are made once and kept with the buffer. */
int gpu_queue_texels(struct gpu_queue *queue, uint64_t address, uint64_t bytes,
                     struct error *error);
int gpu_queue_copy(struct gpu_queue *queue, struct gpu_buffer *from, uint64_t from_offset,
                   struct gpu_buffer *to, uint64_t to_offset, uint64_t bytes, struct error *error);
/* Zeros `bytes` (a multiple of 4) from `offset` (a multiple of 4). */
int gpu_queue_zero(struct gpu_queue *queue, struct gpu_buffer *buffer, uint64_t offset,
                   uint64_t bytes, struct error *error);
int gpu_queue_flush(struct gpu_queue *queue, struct error *error);
/* Waits for all submitted work. `poll` (may be NULL) is asked between waits; non-zero: the work
 * under way is waited for, then ERROR_INTERRUPTED. */
int gpu_queue_wait(struct gpu_queue *queue, struct error *error);
/* After a failure: forgets what was recorded but not submitted and waits for the rest, so that
 * buffers may be freed and a new run begun. */
void gpu_queue_abandon(struct gpu_queue *queue);
void gpu_queue_poll(struct gpu_queue *queue, int (*poll)(void *), void *context);
/* Floating point operations that one submission may hold: split what is larger, or a watchdog (and
 * Ctrl-C) has to wait for all of it. */
double gpu_queue_flops_bound(const struct gpu_queue *queue);
/* since creation, for benchmarks */
uint64_t gpu_queue_dispatches(const struct gpu_queue *queue);

/* Whether this device offers what the kernel's code asks for (64-bit integers),
 * and this build has it. */
int gpu_pipeline_possible(const struct gpu_device *device, int kernel);
/* Compiles kernels ahead, in parallel threads. */
int gpu_pipelines_prepare(struct gpu_device *device, const int *kernels, int count,
                          struct error *error);
/* Registers, spills and the like, where the driver tells
 * (VK_KHR_pipeline_executable_properties): text into `out`. */
int gpu_pipeline_describe(struct gpu_device *device, int kernel, char *out, size_t capacity,
                          struct error *error);

#endif
