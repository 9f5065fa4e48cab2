/* A queue of commands for a device: a ring of command buffers, a timeline semaphore, and a bound on
 * the work of one submission.
 *
 * Every command sees the results of those before it, because a full compute and transfer barrier
 * follows each one. On lavapipe a barrier adds no measurable time to a dispatch; on GPUs it is the
 * price of recording commands in the order of the model's equations. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gpu/internal.h"

#define RING 4
/* Recorded work is submitted when its estimated time reaches this bound. A desktop's watchdog kills
 * a submission after about two seconds, and Ctrl-C has to wait for the submissions under way. */
#define SUBMISSION_SECONDS 0.2
#define SUBMISSION_COMMANDS 4096

struct ring_entry {
    VkCommandPool pool;
    VkCommandBuffer commands;
    uint64_t ticket; /* the timeline value that its last submission signals; 0: never used */
};

struct gpu_queue {
    struct gpu_device *device;
    struct ring_entry ring[RING];
    int current; /* entry being recorded */
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

int gpu_queue_create(struct gpu_queue **out, struct gpu_device *device, struct error *error) {
    *out = NULL;
    if (gpu_device_check(device, error))
        return -1;
    struct gpu_queue *queue = calloc(1, sizeof *queue);
    if (!queue)
        return error_set(error, ERROR_MEMORY, "out of memory for a command queue");
    queue->device = device;
    /* Only orders of magnitude matter here: a software driver on two cores, or a small GPU. */
    queue->flops_per_second = device->info.type == GPU_SOFTWARE ? 3e10 : 5e11;
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
            device->vk.vkCreateSemaphore(device->handle, &semaphore, NULL, &queue->timeline),
            "creating a semaphore", error))
        goto fail;
    for (int i = 0; i < RING; i++) {
        struct ring_entry *entry = &queue->ring[i];
        VkCommandPoolCreateInfo pool = {
            .sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
            .queueFamilyIndex = device->queue_family,
        };
        if (gpu_result_check(
                device, device->vk.vkCreateCommandPool(device->handle, &pool, NULL, &entry->pool),
                "creating a command pool", error))
            goto fail;
        VkCommandBufferAllocateInfo allocate = {
            .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
            .commandPool = entry->pool,
            .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
            .commandBufferCount = 1,
        };
        if (gpu_result_check(
                device,
                device->vk.vkAllocateCommandBuffers(device->handle, &allocate, &entry->commands),
                "allocating a command buffer", error))
            goto fail;
    }
    *out = queue;
    return 0;
fail:
    gpu_queue_destroy(queue);
    return -1;
}

void gpu_queue_destroy(struct gpu_queue *queue) {
    if (!queue)
        return;
    struct gpu_device *device = queue->device;
    if (device->owner == getpid()) {
        if (!device->lost && device->used)
            device->vk.vkQueueWaitIdle(device->queue);
        for (int i = 0; i < RING; i++)
            if (queue->ring[i].pool)
                device->vk.vkDestroyCommandPool(device->handle, queue->ring[i].pool, NULL);
        if (queue->timeline)
            device->vk.vkDestroySemaphore(device->handle, queue->timeline, NULL);
    }
    free(queue);
}

/* Waits until the timeline reaches `ticket`, and polls for Ctrl-C every 50 ms. An interrupt is
 * reported only after the wait, because the caller may free the buffers of submitted work next. */
static int ticket_wait(struct gpu_queue *queue, uint64_t ticket, struct error *error) {
    struct gpu_device *device = queue->device;
    int interrupted = 0;
    if (gpu_device_check(device, error)) /* in a forked child the timeline never advances */
        return -1;
    for (;;) {
        VkSemaphoreWaitInfo wait = {
            .sType = VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO,
            .semaphoreCount = 1,
            .pSemaphores = &queue->timeline,
            .pValues = &ticket,
        };
        VkResult result = device->vk.vkWaitSemaphores(device->handle, &wait, UINT64_C(50000000));
        if (!interrupted && queue->poll && queue->poll(queue->poll_context))
            interrupted = 1;
        if (result == VK_TIMEOUT)
            continue;
        if (gpu_result_check(device, result, "waiting for the device", error))
            return -1;
        return interrupted ? error_set(error, ERROR_INTERRUPTED, "interrupted") : 0;
    }
}

/* Begins a command buffer unless one is being recorded. Waits if the ring's next entry is still in
 * use by the device. */
static int recording_begin(struct gpu_queue *queue, struct error *error) {
    if (queue->recording)
        return 0;
    struct gpu_device *device = queue->device;
    if (gpu_device_check(device, error))
        return -1;
    struct ring_entry *entry = &queue->ring[queue->current];
    if (entry->ticket && ticket_wait(queue, entry->ticket, error))
        return -1;
    VkCommandBufferBeginInfo begin = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
        .flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT,
    };
    if (gpu_result_check(device, device->vk.vkResetCommandPool(device->handle, entry->pool, 0),
                         "resetting commands", error) ||
        gpu_result_check(device, device->vk.vkBeginCommandBuffer(entry->commands, &begin),
                         "beginning commands", error))
        return -1;
    queue->recording = 1;
    queue->n_commands = 0;
    queue->seconds = 0;
    return 0;
}

static void barrier(struct gpu_queue *queue) {
    VkMemoryBarrier memory = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
        .srcAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT |
                         VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
        .dstAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT |
                         VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT |
                         VK_ACCESS_HOST_READ_BIT,
    };
    queue->device->vk.vkCmdPipelineBarrier(
        queue->ring[queue->current].commands,
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT |
            VK_PIPELINE_STAGE_HOST_BIT,
        0, 1, &memory, 0, NULL, 0, NULL);
}

/* Submits what was recorded; does nothing if nothing was. Waits while more than one earlier
 * submission is unfinished. */
static int submit(struct gpu_queue *queue, struct error *error) {
    struct gpu_device *device = queue->device;
    if (!queue->recording)
        return 0;
    if (gpu_device_check(device, error))
        return -1;
    struct ring_entry *entry = &queue->ring[queue->current];
    queue->recording = 0;
    if (gpu_result_check(device, device->vk.vkEndCommandBuffer(entry->commands), "ending commands",
                         error))
        return -1;
    uint64_t ticket = queue->submitted + 1;
    VkTimelineSemaphoreSubmitInfo timeline = {
        .sType = VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO,
        .signalSemaphoreValueCount = 1,
        .pSignalSemaphoreValues = &ticket,
    };
    VkSubmitInfo info = {
        .sType = VK_STRUCTURE_TYPE_SUBMIT_INFO,
        .pNext = &timeline,
        .commandBufferCount = 1,
        .pCommandBuffers = &entry->commands,
        .signalSemaphoreCount = 1,
        .pSignalSemaphores = &queue->timeline,
    };
    if (gpu_result_check(device, device->vk.vkQueueSubmit(device->queue, 1, &info, VK_NULL_HANDLE),
                         "submitting work", error))
        return -1;
    device->used = 1;
    queue->submitted = ticket;
    entry->ticket = ticket;
    queue->current = (queue->current + 1) % RING;
    /* At most one submission waits behind the one that runs. The device stays busy, and an
     * interrupt is handled within two submissions. */
    if (ticket > 2)
        return ticket_wait(queue, ticket - 2, error);
    return 0;
}

/* Closes a command of the estimated length `seconds`: a barrier, and a submission if the bound is
 * reached. */
static int command_done(struct gpu_queue *queue, double seconds, struct error *error) {
    barrier(queue);
    queue->n_commands++;
    queue->seconds += seconds;
    if (queue->seconds < SUBMISSION_SECONDS && queue->n_commands < SUBMISSION_COMMANDS)
        return 0;
    return submit(queue, error);
}

int gpu_queue_dispatch(struct gpu_queue *queue, int kernel, const void *params, size_t params_bytes,
                       uint32_t x, uint32_t y, uint32_t z, double flops, struct error *error) {
    struct gpu_device *device = queue->device;
    if (x == 0 || y == 0 || z == 0)
        return 0;
    if (y > 65535 || z > 65535 || x > 65535 || params_bytes > GPU_PUSH_BYTES ||
        params_bytes != device->kernels[kernel].params_bytes)
        return error_set(
            error, ERROR_VALUE,
            "kernel %s: a grid of %u x %u x %u with %zu bytes of parameters is out of range",
            device->kernels[kernel].name, x, y, z, params_bytes);
    VkPipeline pipeline;
    if (gpu_pipeline_get(device, kernel, &pipeline, error) || recording_begin(queue, error))
        return -1;
    VkCommandBuffer commands = queue->ring[queue->current].commands;
    device->vk.vkCmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
    device->vk.vkCmdPushConstants(commands, device->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0,
                                  (uint32_t)params_bytes, params);
    device->vk.vkCmdDispatch(commands, x, y, z);
    queue->dispatches++;
    return command_done(queue, flops / queue->flops_per_second, error);
}

int gpu_queue_texels(struct gpu_queue *queue, uint64_t address, uint64_t bytes,
                     struct error *error) {
    struct gpu_device *device = queue->device;
    VkDescriptorSet set;
    if (gpu_texels_get(device, address, bytes, &set, error) || recording_begin(queue, error))
        return -1;
    device->vk.vkCmdBindDescriptorSets(queue->ring[queue->current].commands,
                                       VK_PIPELINE_BIND_POINT_COMPUTE, device->layout, 0, 1, &set,
                                       0, NULL);
    return 0;
}

int gpu_queue_copy(struct gpu_queue *queue, struct gpu_buffer *from, uint64_t from_offset,
                   struct gpu_buffer *to, uint64_t to_offset, uint64_t bytes, struct error *error) {
    if (bytes == 0)
        return 0;
    if (from_offset > from->bytes || bytes > from->bytes - from_offset || to_offset > to->bytes ||
        bytes > to->bytes - to_offset)
        return error_set(error, ERROR_VALUE, "a copy of %llu bytes leaves its buffer",
                         (unsigned long long)bytes);
    if (recording_begin(queue, error))
        return -1;
    VkBufferCopy region = {.srcOffset = from_offset, .dstOffset = to_offset, .size = bytes};
    queue->device->vk.vkCmdCopyBuffer(queue->ring[queue->current].commands, from->handle,
                                      to->handle, 1, &region);
    return command_done(queue, bytes / 4e9, error);
}

int gpu_queue_zero(struct gpu_queue *queue, struct gpu_buffer *buffer, uint64_t offset,
                   uint64_t bytes, struct error *error) {
    if (bytes == 0)
        return 0;
    if (offset % 4 || bytes % 4 || offset > buffer->bytes || bytes > buffer->bytes - offset)
        return error_set(error, ERROR_VALUE, "zeroing %llu bytes leaves the buffer",
                         (unsigned long long)bytes);
    if (recording_begin(queue, error))
        return -1;
    queue->device->vk.vkCmdFillBuffer(queue->ring[queue->current].commands, buffer->handle, offset,
                                      bytes, 0);
    return command_done(queue, bytes / 4e9, error);
}

int gpu_queue_wait(struct gpu_queue *queue, struct error *error) {
    if (submit(queue, error)) {
        if (error && error->kind == ERROR_INTERRUPTED && queue->submitted)
            ticket_wait(queue, queue->submitted, NULL);
        return -1;
    }
    return queue->submitted ? ticket_wait(queue, queue->submitted, error) : 0;
}

void gpu_queue_abandon(struct gpu_queue *queue) {
    if (queue->recording) {
        queue->device->vk.vkEndCommandBuffer(queue->ring[queue->current].commands);
        queue->recording = 0;
    }
    if (queue->submitted)
        ticket_wait(queue, queue->submitted, NULL);
}

void gpu_queue_poll(struct gpu_queue *queue, int (*poll)(void *), void *context) {
    queue->poll = poll;
    queue->poll_context = context;
}

double gpu_queue_flops_bound(const struct gpu_queue *queue) {
    return SUBMISSION_SECONDS * queue->flops_per_second;
}

uint64_t gpu_queue_dispatches(const struct gpu_queue *queue) { return queue->dispatches; }
