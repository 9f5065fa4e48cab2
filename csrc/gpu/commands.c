/* The commands of a queue: their arguments are checked, and what they touch is found. */
#include <string.h>

#include "gpu/queue.h"

int gpu_queue_dispatch(struct gpu_queue *queue, int kernel, const void *params, size_t params_bytes,
                       uint32_t x, uint32_t y, uint32_t z, double flops, struct error *error) {
    struct gpu_device *device = queue->device;
    struct command command = {
        .kind = DISPATCH,
        .kernel = kernel,
        .texels = queue->texels,
        .grid = {x, y, z},
        .params_bytes = (uint32_t)params_bytes,
        .flops = flops,
    };
    struct gpu_access accesses[GPU_ADDRESSES];
    const uint64_t *extents = queue->has_extents ? queue->extents : NULL;
    int n_accesses = 0;
    queue->texels = VK_NULL_HANDLE;
    queue->has_extents = 0;
    if (x == 0 || y == 0 || z == 0)
        return 0;
    if (y > 65535 || z > 65535 || x > 65535 || params_bytes > GPU_PUSH_BYTES ||
        params_bytes != device->kernels[kernel].params_bytes)
        return error_set(
            error, ERROR_VALUE,
            "kernel %s: a grid of %u x %u x %u with %zu bytes of parameters is out of range",
            device->kernels[kernel].name, x, y, z, params_bytes);
    memcpy(command.params, params, params_bytes);
    if (gpu_pipeline_get(device, kernel, &command.pipeline, error) ||
        (n_accesses = gpu_access_find(device, kernel, params, extents, accesses, error)) < 0 ||
        gpu_command_add(queue, &command, accesses, n_accesses, flops / queue->flops_per_second,
                        error))
        return -1;
    queue->dispatches++;
    return 0;
}

void gpu_queue_extent(struct gpu_queue *queue, size_t i, uint64_t bytes) {
    if (!queue->has_extents)
        memset(queue->extents, 0, sizeof queue->extents);
    queue->has_extents = 1;
    queue->extents[i] = bytes;
}

int gpu_queue_texels(struct gpu_queue *queue, uint64_t address, uint64_t bytes,
                     struct error *error) {
    return gpu_texels_get(queue->device, address, bytes, &queue->texels, error);
}

int gpu_queue_copy(struct gpu_queue *queue, struct gpu_buffer *from, uint64_t from_offset,
                   struct gpu_buffer *to, uint64_t to_offset, uint64_t bytes, struct error *error) {
    if (bytes == 0)
        return 0;
    if (from_offset > from->bytes || bytes > from->bytes - from_offset || to_offset > to->bytes ||
        bytes > to->bytes - to_offset)
        return error_set(error, ERROR_VALUE, "a copy of %llu bytes leaves its buffer",
                         (unsigned long long)bytes);
    const struct command command = {
        .kind = COPY,
        .from = from->handle,
        .from_offset = from_offset,
        .to = to->handle,
        .to_offset = to_offset,
        .bytes = bytes,
    };
    const struct gpu_access accesses[] = {{from, from_offset, from_offset + bytes, 0},
                                          {to, to_offset, to_offset + bytes, 1}};
    return gpu_command_add(queue, &command, accesses, 2, bytes / 4e9, error);
}

int gpu_queue_zero(struct gpu_queue *queue, struct gpu_buffer *buffer, uint64_t offset,
                   uint64_t bytes, struct error *error) {
    if (bytes == 0)
        return 0;
    if (offset % 4 || bytes % 4 || offset > buffer->bytes || bytes > buffer->bytes - offset)
        return error_set(error, ERROR_VALUE, "zeroing %llu bytes leaves the buffer",
                         (unsigned long long)bytes);
    const struct command command = {
        .kind = ZERO,
        .to = buffer->handle,
        .to_offset = offset,
        .bytes = bytes,
    };
    const struct gpu_access access = {buffer, offset, offset + bytes, 1};
    return gpu_command_add(queue, &command, &access, 1, bytes / 4e9, error);
}
