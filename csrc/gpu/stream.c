/* The one stream of work of a device user: a ring of command buffers, a timeline semaphore, a bound
 * on what one submission may hold.
 *
 * Every command sees the results of those before it: a full compute/transfer barrier follows each
 * one. Measured on lavapipe, barriers cost nothing on top of a dispatch; on GPUs they are what
 * keeps the record readable as the model's equations. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gpu/internal.h"

#define RING 4
/* A desktop watchdog kills a submission after about two seconds: this is the estimated time at
 * which recorded work is handed over. Also what keeps Ctrl-C within a second. */
#define SUBMISSION_SECONDS 0.2
#define SUBMISSION_COMMANDS 4096

struct slot {
    VkCommandPool pool;
    VkCommandBuffer commands;
    uint64_t ticket; /* the timeline value that its last submission signals; 0: never used */
};

struct gpu_stream {
    struct gpu_device *device;
    struct slot slots[RING];
    int current; /* slot being recorded */
    int recording;
    int n_commands;
    double seconds; /* estimated time of what is recorded */
    double flops_per_second;
    VkSemaphore timeline;
    uint64_t submitted; /* last ticket handed out */
    uint64_t dispatches;
    int (*poll)(void *);
    void *poll_context;
};

int gpu_stream_create(struct gpu_stream **out, struct gpu_device *device, struct error *error) {
    *out = NULL;
    if (gpu_device_check(device, error))
        return -1;
    struct gpu_stream *stream = calloc(1, sizeof *stream);
    if (!stream)
        return error_set(error, ERROR_MEMORY, "out of memory for a stream");
    stream->device = device;
    /* Only orders of magnitude matter here: a software driver on two cores, or a small GPU. */
    stream->flops_per_second = device->info.type == GPU_SOFTWARE ? 3e10 : 5e11;
    VkSemaphoreTypeCreateInfo type = {
        .sType = VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO,
        .semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE,
    };
    VkSemaphoreCreateInfo semaphore = {
        .sType = VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO,
        .pNext = &type,
    };
    if (gpu_result_check(
            device,
            device->vk.vkCreateSemaphore(device->handle, &semaphore, NULL, &stream->timeline),
            "creating a semaphore", error))
        goto fail;
    for (int i = 0; i < RING; i++) {
        struct slot *slot = &stream->slots[i];
        VkCommandPoolCreateInfo pool = {
            .sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
            .queueFamilyIndex = device->queue_family,
        };
        if (gpu_result_check(
                device, device->vk.vkCreateCommandPool(device->handle, &pool, NULL, &slot->pool),
                "creating a command pool", error))
            goto fail;
        VkCommandBufferAllocateInfo allocate = {
            .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
            .commandPool = slot->pool,
            .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
            .commandBufferCount = 1,
        };
        if (gpu_result_check(
                device,
                device->vk.vkAllocateCommandBuffers(device->handle, &allocate, &slot->commands),
                "allocating a command buffer", error))
            goto fail;
    }
    *out = stream;
    return 0;
fail:
    gpu_stream_destroy(stream);
    return -1;
}

void gpu_stream_destroy(struct gpu_stream *stream) {
    if (!stream)
        return;
    struct gpu_device *device = stream->device;
    if (device->owner == getpid()) {
        if (!device->lost && device->used)
            device->vk.vkQueueWaitIdle(device->queue);
        for (int i = 0; i < RING; i++)
            if (stream->slots[i].pool)
                device->vk.vkDestroyCommandPool(device->handle, stream->slots[i].pool, NULL);
        if (stream->timeline)
            device->vk.vkDestroySemaphore(device->handle, stream->timeline, NULL);
    }
    free(stream);
}

/* Waits until the timeline reaches `ticket`. The wait is cut into pieces so that Ctrl-C is seen;
 * work already submitted is always waited for, because its buffers may be freed next. */
static int ticket_wait(struct gpu_stream *stream, uint64_t ticket, struct error *error) {
    struct gpu_device *device = stream->device;
    int interrupted = 0;
    if (gpu_device_check(device, error)) /* in a forked child nobody would ever answer */
        return -1;
    for (;;) {
        VkSemaphoreWaitInfo wait = {
            .sType = VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO,
            .semaphoreCount = 1,
            .pSemaphores = &stream->timeline,
            .pValues = &ticket,
        };
        VkResult result = device->vk.vkWaitSemaphores(device->handle, &wait, UINT64_C(50000000));
        if (!interrupted && stream->poll && stream->poll(stream->poll_context))
            interrupted = 1;
        if (result == VK_TIMEOUT)
            continue;
        if (gpu_result_check(device, result, "waiting for the device", error))
            return -1;
        return interrupted ? error_set(error, ERROR_INTERRUPTED, "interrupted") : 0;
    }
}

static int recording_begin(struct gpu_stream *stream, struct error *error) {
    if (stream->recording)
        return 0;
    struct gpu_device *device = stream->device;
    if (gpu_device_check(device, error))
        return -1;
    struct slot *slot = &stream->slots[stream->current];
    if (slot->ticket && ticket_wait(stream, slot->ticket, error))
        return -1;
    VkCommandBufferBeginInfo begin = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
        .flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT,
    };
    if (gpu_result_check(device, device->vk.vkResetCommandPool(device->handle, slot->pool, 0),
                         "resetting commands", error) ||
        gpu_result_check(device, device->vk.vkBeginCommandBuffer(slot->commands, &begin),
                         "beginning commands", error))
        return -1;
    stream->recording = 1;
    stream->n_commands = 0;
    stream->seconds = 0;
    return 0;
}

static void barrier(struct gpu_stream *stream) {
    VkMemoryBarrier memory = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
        .srcAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT |
                         VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
        .dstAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT |
                         VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT |
                         VK_ACCESS_HOST_READ_BIT,
    };
    stream->device->vk.vkCmdPipelineBarrier(
        stream->slots[stream->current].commands,
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT |
            VK_PIPELINE_STAGE_HOST_BIT,
        0, 1, &memory, 0, NULL, 0, NULL);
}

static int command_done(struct gpu_stream *stream, double seconds, struct error *error) {
    barrier(stream);
    stream->n_commands++;
    stream->seconds += seconds;
    if (stream->seconds < SUBMISSION_SECONDS && stream->n_commands < SUBMISSION_COMMANDS)
        return 0;
    return gpu_stream_flush(stream, error);
}

int gpu_stream_dispatch(struct gpu_stream *stream, int kernel, const void *params,
                        size_t params_bytes, uint32_t x, uint32_t y, uint32_t z, double flops,
                        struct error *error) {
    struct gpu_device *device = stream->device;
    if (x == 0 || y == 0 || z == 0)
        return 0;
    if (y > 65535 || z > 65535 || x > 65535 || params_bytes > GPU_PUSH_BYTES ||
        params_bytes != device->kernels[kernel].params_bytes)
        return error_set(
            error, ERROR_VALUE,
            "kernel %s: a grid of %u x %u x %u with %zu bytes of parameters is out of range",
            device->kernels[kernel].name, x, y, z, params_bytes);
    VkPipeline pipeline;
    if (gpu_pipeline_get(device, kernel, &pipeline, error) || recording_begin(stream, error))
        return -1;
    VkCommandBuffer commands = stream->slots[stream->current].commands;
    device->vk.vkCmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
    device->vk.vkCmdPushConstants(commands, device->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0,
                                  (uint32_t)params_bytes, params);
    device->vk.vkCmdDispatch(commands, x, y, z);
    stream->dispatches++;
    return command_done(stream, flops / stream->flops_per_second, error);
}

int gpu_stream_texels(struct gpu_stream *stream, uint64_t address, uint64_t bytes,
                      struct error *error) {
    struct gpu_device *device = stream->device;
    VkDescriptorSet set;
    if (gpu_texels_get(device, address, bytes, &set, error) || recording_begin(stream, error))
        return -1;
    device->vk.vkCmdBindDescriptorSets(stream->slots[stream->current].commands,
                                       VK_PIPELINE_BIND_POINT_COMPUTE, device->layout, 0, 1, &set,
                                       0, NULL);
    return 0;
}

int gpu_stream_copy(struct gpu_stream *stream, struct gpu_buffer *from, uint64_t from_offset,
                    struct gpu_buffer *to, uint64_t to_offset, uint64_t bytes,
                    struct error *error) {
    if (bytes == 0)
        return 0;
    if (from_offset > from->bytes || bytes > from->bytes - from_offset || to_offset > to->bytes ||
        bytes > to->bytes - to_offset)
        return error_set(error, ERROR_VALUE, "a copy of %llu bytes leaves its buffer",
                         (unsigned long long)bytes);
    if (recording_begin(stream, error))
        return -1;
    VkBufferCopy region = {.srcOffset = from_offset, .dstOffset = to_offset, .size = bytes};
    stream->device->vk.vkCmdCopyBuffer(stream->slots[stream->current].commands, from->handle,
                                       to->handle, 1, &region);
    return command_done(stream, bytes / 4e9, error);
}

int gpu_stream_zero(struct gpu_stream *stream, struct gpu_buffer *buffer, uint64_t offset,
                    uint64_t bytes, struct error *error) {
    if (bytes == 0)
        return 0;
    if (offset % 4 || bytes % 4 || offset > buffer->bytes || bytes > buffer->bytes - offset)
        return error_set(error, ERROR_VALUE, "zeroing %llu bytes leaves the buffer",
                         (unsigned long long)bytes);
    if (recording_begin(stream, error))
        return -1;
    stream->device->vk.vkCmdFillBuffer(stream->slots[stream->current].commands, buffer->handle,
                                       offset, bytes, 0);
    return command_done(stream, bytes / 4e9, error);
}

int gpu_stream_flush(struct gpu_stream *stream, struct error *error) {
    struct gpu_device *device = stream->device;
    if (!stream->recording)
        return 0;
    if (gpu_device_check(device, error))
        return -1;
    struct slot *slot = &stream->slots[stream->current];
    stream->recording = 0;
    if (gpu_result_check(device, device->vk.vkEndCommandBuffer(slot->commands), "ending commands",
                         error))
        return -1;
    uint64_t ticket = stream->submitted + 1;
    VkTimelineSemaphoreSubmitInfo timeline = {
        .sType = VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO,
        .signalSemaphoreValueCount = 1,
        .pSignalSemaphoreValues = &ticket,
    };
    VkSubmitInfo submit = {
        .sType = VK_STRUCTURE_TYPE_SUBMIT_INFO,
        .pNext = &timeline,
        .commandBufferCount = 1,
        .pCommandBuffers = &slot->commands,
        .signalSemaphoreCount = 1,
        .pSignalSemaphores = &stream->timeline,
    };
    if (gpu_result_check(device,
                         device->vk.vkQueueSubmit(device->queue, 1, &submit, VK_NULL_HANDLE),
                         "submitting work", error))
        return -1;
    device->used = 1;
    stream->submitted = ticket;
    slot->ticket = ticket;
    stream->current = (stream->current + 1) % RING;
    /* At most one submission waits behind the one that runs: bounded latency for an interrupt, and
     * the device never idles. */
    if (ticket > 2)
        return ticket_wait(stream, ticket - 2, error);
    return 0;
}

int gpu_stream_wait(struct gpu_stream *stream, struct error *error) {
    if (gpu_stream_flush(stream, error)) {
        if (error && error->kind == ERROR_INTERRUPTED && stream->submitted)
            ticket_wait(stream, stream->submitted, NULL);
        return -1;
    }
    return stream->submitted ? ticket_wait(stream, stream->submitted, error) : 0;
}

void gpu_stream_abandon(struct gpu_stream *stream) {
    if (stream->recording) {
        stream->device->vk.vkEndCommandBuffer(stream->slots[stream->current].commands);
        stream->recording = 0;
    }
    if (stream->submitted)
        ticket_wait(stream, stream->submitted, NULL);
}

void gpu_stream_poll(struct gpu_stream *stream, int (*poll)(void *), void *context) {
    stream->poll = poll;
    stream->poll_context = context;
}

double gpu_stream_flops_bound(const struct gpu_stream *stream) {
    return SUBMISSION_SECONDS * stream->flops_per_second;
}

uint64_t gpu_stream_dispatches(const struct gpu_stream *stream) { return stream->dispatches; }
