/* Which memory commands read and write, and which of them must therefore wait for others.
 *
 * A buffer remembers the ranges that commands have read and written since the last barrier of the
 * queue that uses it. A command needs a barrier if it reads what was written since, or writes what
 * was read or written. A kernel's ranges follow from its parameters: an address stands for the
 * whole buffer that it lies in, unless the op says how many bytes from it on are touched. The table
 * of kernels says which addresses are written through. */
#include <stdlib.h>
#include <string.h>

#include "gpu/internal.h"

int gpu_buffer_register(struct gpu_buffer *buffer, struct error *error) {
    struct gpu_device *device = buffer->device;
    if (device->n_placed == device->placed_capacity) {
        uint32_t capacity = device->placed_capacity ? 2 * device->placed_capacity : 64;
        void *grown = realloc(device->placed, capacity * sizeof *device->placed);
        if (!grown)
            return error_set(error, ERROR_MEMORY, "out of memory for the list of buffers");
        device->placed = grown;
        device->placed_capacity = capacity;
    }
    uint32_t i = device->n_placed++;
    for (; i > 0 && device->placed[i - 1]->address > buffer->address; i--)
        device->placed[i] = device->placed[i - 1];
    device->placed[i] = buffer;
    return 0;
}

void gpu_buffer_unregister(struct gpu_buffer *buffer) {
    struct gpu_device *device = buffer->device;
    uint32_t n = 0;
    for (uint32_t i = 0; i < device->n_placed; i++)
        if (device->placed[i] != buffer)
            device->placed[n++] = device->placed[i];
    device->n_placed = n;
}

struct gpu_buffer *gpu_buffer_at(const struct gpu_device *device, uint64_t address) {
    uint32_t low = 0, high = device->n_placed; /* the last that begins at or before the address */
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (device->placed[middle]->address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    struct gpu_buffer *found = low ? device->placed[low - 1] : NULL;
    return found && address - found->address < found->bytes ? found : NULL;
}

/* --- ranges ----------------------------------------------------------------------------------- */

static int ranges_touched(const struct gpu_ranges *ranges, uint64_t epoch, uint64_t begin,
                          uint64_t end) {
    if (ranges->epoch != epoch)
        return 0;
    for (uint32_t i = 0; i < ranges->n; i++)
        if (begin < ranges->at[i].end && ranges->at[i].begin < end)
            return 1;
    return 0;
}

/* Adjoining ranges become one, and so do the last two where there are too many: more is then taken
 * as touched than was, which costs a barrier and is never wrong. */
static void ranges_add(struct gpu_ranges *ranges, uint64_t epoch, uint64_t begin, uint64_t end) {
    if (ranges->epoch != epoch) {
        ranges->epoch = epoch;
        ranges->n = 0;
    }
    for (uint32_t i = 0; i < ranges->n; i++)
        if (begin <= ranges->at[i].end && ranges->at[i].begin <= end) {
            if (begin < ranges->at[i].begin)
                ranges->at[i].begin = begin;
            if (end > ranges->at[i].end)
                ranges->at[i].end = end;
            return;
        }
    if (ranges->n == GPU_RANGES) {
        struct gpu_range *last = &ranges->at[GPU_RANGES - 1];
        last->begin = begin < last->begin ? begin : last->begin;
        last->end = end > last->end ? end : last->end;
        return;
    }
    ranges->at[ranges->n++] = (struct gpu_range){begin, end};
}

int gpu_access_waits(const struct gpu_access *accesses, int n, uint64_t epoch) {
    for (int i = 0; i < n; i++) {
        const struct gpu_access *a = &accesses[i];
        if (ranges_touched(&a->buffer->written, epoch, a->begin, a->end) ||
            (a->written && ranges_touched(&a->buffer->read, epoch, a->begin, a->end)))
            return 1;
    }
    return 0;
}

void gpu_access_note(const struct gpu_access *accesses, int n, uint64_t epoch) {
    for (int i = 0; i < n; i++) {
        const struct gpu_access *a = &accesses[i];
        ranges_add(a->written ? &a->buffer->written : &a->buffer->read, epoch, a->begin, a->end);
    }
}

int gpu_access_find(const struct gpu_device *device, int kernel, const void *params,
                    const uint64_t *extents, struct gpu_access accesses[GPU_ADDRESSES],
                    struct error *error) {
    const struct gpu_kernel *source = &device->kernels[kernel];
    int n = 0;
    for (int i = 0; source->addresses[i]; i++) {
        uint64_t address;
        memcpy(&address, (const char *)params + 8 * i, sizeof address);
        if (!address)
            continue;
        struct gpu_buffer *buffer = gpu_buffer_at(device, address);
        uint64_t begin = buffer ? address - buffer->address : 0;
        int outside = !buffer || (extents && extents[i] > buffer->bytes - begin);
        if (outside && device->strict)
            return error_set(error, ERROR_VALUE, "kernel %s: %s %s", source->name,
                             source->addresses[i],
                             buffer ? "reaches beyond its buffer" : "lies in no buffer");
        if (!buffer) /* so the kernel cannot use it */
            continue;
        accesses[n++] = (struct gpu_access){
            .buffer = buffer,
            .begin = !outside && extents && extents[i] ? begin : 0,
            .end = !outside && extents && extents[i] ? begin + extents[i] : buffer->bytes,
            .written = source->written >> i & 1,
        };
    }
    return n;
}
