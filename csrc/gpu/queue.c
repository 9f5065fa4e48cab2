/* A queue of commands for a device: a ring of command buffers, a timeline semaphore, and a bound on
 * the work of one submission.
 *
 * Every command sees the results of those before it: a compute and transfer barrier is placed
 * before a command that reads what was written since the last barrier, or writes what was read or
 * written since (hazards.c). Commands between two barriers touch nothing of each other and may run
 * side by side. Every submission ends with a barrier, which also makes its results visible to the
 * host.
 *
 * Commands that are to run more than once are kept: recorded into a secondary command buffer, which
 * the queue's own command buffers execute. A barrier stands before and after each of its runs.
 *
 * VKSTEER_BARRIERS=all places one before every command. VKSTEER_BARRIERS=reverse records the
 * commands between two barriers in reverse order, so that a missing barrier changes results also on
 * drivers that run one command after another. Where it is set, an address in a kernel's parameters
 * that lies in no buffer is an error. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gpu/queue.h"

/* Recorded work is submitted when its estimated time reaches this bound. A desktop's watchdog kills
 * a submission after about two seconds, and Ctrl-C has to wait for the submissions under way. */
#define SUBMISSION_SECONDS 0.2

static int barriers_read(struct gpu_device *device, enum barriers *mode, struct error *error) {
    const char *text = getenv("VKSTEER_BARRIERS");
    *mode = BARRIERS_NEEDED;
    device->strict = text && text[0];
    if (!device->strict || strcmp(text, "needed") == 0)
        return 0;
    *mode = strcmp(text, "all") == 0 ? BARRIERS_ALL : BARRIERS_REVERSE;
    if (*mode == BARRIERS_REVERSE && strcmp(text, "reverse") != 0)
        return error_set(error, ERROR_VALUE,
                         "VKSTEER_BARRIERS=%s: use \"needed\", \"all\" or \"reverse\"", text);
    return 0;
}

/* A command buffer and its pool. */
static int commands_create(struct gpu_device *device, VkCommandBufferLevel level,
                           VkCommandPool *pool, VkCommandBuffer *commands, struct error *error) {
    const VkCommandPoolCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
        .queueFamilyIndex = device->queue_family,
    };
    if (gpu_result_check(device,
                         device->vk.vkCreateCommandPool(device->handle, &create, NULL, pool),
                         "creating a command pool", error))
        return -1;
    const VkCommandBufferAllocateInfo allocate = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
        .commandPool = *pool,
        .level = level,
        .commandBufferCount = 1,
    };
    if (gpu_result_check(device,
                         device->vk.vkAllocateCommandBuffers(device->handle, &allocate, commands),
                         "allocating a command buffer", error)) {
        device->vk.vkDestroyCommandPool(device->handle, *pool, NULL);
        *pool = VK_NULL_HANDLE;
        return -1;
    }
    return 0;
}

int gpu_queue_create(struct gpu_queue **out, struct gpu_device *device, struct error *error) {
    enum barriers mode;
    *out = NULL;
    if (gpu_device_check(device, error) || barriers_read(device, &mode, error))
        return -1;
    struct gpu_queue *queue = calloc(1, sizeof *queue);
    if (!queue)
        return error_set(error, ERROR_MEMORY, "out of memory for a command queue");
    queue->device = device;
    queue->mode = mode;
    queue->epoch = ++device->epochs;
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
    for (int i = 0; i < GPU_RING; i++) {
        struct ring_entry *entry = &queue->ring[i];
        if (commands_create(device, VK_COMMAND_BUFFER_LEVEL_PRIMARY, &entry->pool, &entry->commands,
                            error))
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
        for (int i = 0; i < GPU_RING; i++)
            if (queue->ring[i].pool)
                device->vk.vkDestroyCommandPool(device->handle, queue->ring[i].pool, NULL);
        if (queue->kept.pool)
            device->vk.vkDestroyCommandPool(device->handle, queue->kept.pool, NULL);
        if (queue->timeline)
            device->vk.vkDestroySemaphore(device->handle, queue->timeline, NULL);
    }
    gpu_profile_destroy(queue->profile);
    free(queue->deferred);
    free(queue);
}

/* Waits until the timeline reaches `ticket`, and polls for Ctrl-C every 50 ms. An interrupt is
 * reported only after the wait, because the caller may free the buffers of submitted work next. */
static int ticket_wait(struct gpu_queue *queue, uint64_t ticket, struct error *error) {
    struct gpu_device *device = queue->device;
    int interrupted = 0;
    if (gpu_device_check(device, error)) /* in a forked child the timeline never advances */
        return -1;
    gpu_profile_host(queue->profile, GPU_HOST_WAITS);
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
        gpu_profile_host(queue->profile, GPU_HOST_WAITED);
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
    queue->commands = entry->commands;
    queue->n_commands = 0;
    queue->seconds = 0;
    queue->bound = VK_NULL_HANDLE;
    return gpu_profile_begin(queue->profile, queue->current, entry->commands, error);
}

/* --- commands --------------------------------------------------------------------------------- */

static void command_record(struct gpu_queue *queue, const struct command *c) {
    const struct gpu_device *device = queue->device;
    const struct VolkDeviceTable *vk = &device->vk;
    VkCommandBuffer commands = queue->commands;
    const VkBufferCopy region = {c->from_offset, c->to_offset, c->bytes};
    double read = (double)c->bytes, written = (double)c->bytes;
    int row = c->kernel;
    switch (c->kind) {
    case DISPATCH:
        if (c->pipeline != queue->bound)
            vk->vkCmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, c->pipeline);
        queue->bound = c->pipeline;
        if (c->texels)
            vk->vkCmdBindDescriptorSets(commands, VK_PIPELINE_BIND_POINT_COMPUTE, device->layout, 0,
                                        1, &c->texels, 0, NULL);
        vk->vkCmdPushConstants(commands, device->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0,
                               c->params_bytes, c->params);
        vk->vkCmdDispatch(commands, c->grid[0], c->grid[1], c->grid[2]);
        break;
    case COPY:
        vk->vkCmdCopyBuffer(commands, c->from, c->to, 1, &region);
        row = device->n_kernels;
        break;
    case ZERO:
        vk->vkCmdFillBuffer(commands, c->to, c->to_offset, c->bytes, 0);
        row = device->n_kernels + 1;
        read = 0;
        break;
    }
    if (!queue->profile)
        return;
    if (c->kind == DISPATCH)
        device->kernels[c->kernel].bytes(c->params, c->grid, c->flops, &read, &written);
    gpu_profile_command(queue->profile, queue->current, commands, row, c->flops, read, written);
}

/* Records the commands after the last barrier, the last one first. */
static void deferred_record(struct gpu_queue *queue) {
    while (queue->n_deferred > 0)
        command_record(queue, &queue->deferred[--queue->n_deferred]);
}

static int command_defer(struct gpu_queue *queue, const struct command *command,
                         struct error *error) {
    if (queue->n_deferred == queue->deferred_capacity) {
        int capacity = queue->deferred_capacity ? 2 * queue->deferred_capacity : 64;
        struct command *grown = realloc(queue->deferred, (size_t)capacity * sizeof *grown);
        if (!grown)
            return error_set(error, ERROR_MEMORY, "out of memory for commands");
        queue->deferred = grown;
        queue->deferred_capacity = capacity;
    }
    queue->deferred[queue->n_deferred++] = *command;
    return 0;
}

/* Everything after it sees what commands before it wrote; with `host`, so does the host after a
 * wait. */
static void barrier(struct gpu_queue *queue, int host) {
    deferred_record(queue);
    VkMemoryBarrier memory = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
        .srcAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT |
                         VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
        .dstAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT |
                         VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT |
                         (host ? VK_ACCESS_HOST_READ_BIT : 0),
    };
    queue->device->vk.vkCmdPipelineBarrier(
        queue->commands, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT |
            (host ? VK_PIPELINE_STAGE_HOST_BIT : 0),
        0, 1, &memory, 0, NULL, 0, NULL);
    queue->epoch = ++queue->device->epochs;
    queue->since_barrier = 0;
    queue->kept_ran = 0;
    queue->barriers++;
}

/* Ends the recording of kept commands and lets the command buffer of the ring run them once. */
static int kept_end(struct gpu_queue *queue, struct error *error) {
    struct kept *kept = &queue->kept;
    const struct VolkDeviceTable *vk = &queue->device->vk;
    deferred_record(queue);
    kept->recording = 0;
    kept->ticket = queue->submitted + 1;
    queue->commands = queue->ring[queue->current].commands;
    queue->bound = VK_NULL_HANDLE;
    queue->kept_ran = 1;
    if (gpu_result_check(queue->device, vk->vkEndCommandBuffer(kept->commands), "ending commands",
                         error))
        return -1;
    vk->vkCmdExecuteCommands(queue->commands, 1, &kept->commands);
    return 0;
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
    if (queue->kept.recording && kept_end(queue, error)) /* kept->complete stays 0 */
        return -1;
    barrier(queue, 1);
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
    queue->current = (queue->current + 1) % GPU_RING;
    /* At most one submission waits behind the one that runs. The device stays busy, and an
     * interrupt is handled within two submissions. */
    if (ticket > 2)
        return ticket_wait(queue, ticket - 2, error);
    return 0;
}

/* Submits if the bound is reached. */
static int bound_keep(struct gpu_queue *queue, struct error *error) {
    if (queue->seconds < SUBMISSION_SECONDS && queue->n_commands < GPU_SUBMISSION_COMMANDS)
        return 0;
    return submit(queue, error);
}

int gpu_command_add(struct gpu_queue *queue, const struct command *command,
                    const struct gpu_access *accesses, int n_accesses, double seconds,
                    struct error *error) {
    if (recording_begin(queue, error))
        return -1;
    if (queue->kept_ran ||
        (queue->mode == BARRIERS_ALL ? queue->since_barrier > 0
                                     : gpu_access_waits(accesses, n_accesses, queue->epoch)))
        barrier(queue, 0);
    gpu_access_note(accesses, n_accesses, queue->epoch);
    if (queue->mode != BARRIERS_REVERSE)
        command_record(queue, command);
    else if (command_defer(queue, command, error))
        return -1;
    queue->since_barrier++;
    queue->n_commands++;
    queue->seconds += seconds;
    return bound_keep(queue, error);
}

/* --- kept commands ---------------------------------------------------------------------------- */

int gpu_queue_keep_begin(struct gpu_queue *queue, struct error *error) {
    struct gpu_device *device = queue->device;
    struct kept *kept = &queue->kept;
    kept->complete = 0;
    if (queue->profile) /* which needs a timestamp for every command */
        return 0;
    if (gpu_device_check(device, error) ||
        (!kept->pool && commands_create(device, VK_COMMAND_BUFFER_LEVEL_SECONDARY, &kept->pool,
                                        &kept->commands, error)))
        return -1;
    if (kept->ticket > queue->submitted && submit(queue, error)) /* they may be recorded to run */
        return -1;
    if (kept->ticket && ticket_wait(queue, kept->ticket, error))
        return -1;
    if (recording_begin(queue, error))
        return -1;
    const VkCommandBufferInheritanceInfo inheritance = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_INHERITANCE_INFO,
    };
    const VkCommandBufferBeginInfo begin = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
        .flags = VK_COMMAND_BUFFER_USAGE_SIMULTANEOUS_USE_BIT,
        .pInheritanceInfo = &inheritance,
    };
    if (gpu_result_check(device, device->vk.vkResetCommandPool(device->handle, kept->pool, 0),
                         "resetting commands", error) ||
        gpu_result_check(device, device->vk.vkBeginCommandBuffer(kept->commands, &begin),
                         "beginning commands", error))
        return -1;
    if (queue->since_barrier > 0 || queue->kept_ran)
        barrier(queue, 0);
    kept->recording = 1;
    kept->n_commands = -queue->n_commands;
    kept->seconds = -queue->seconds;
    kept->dispatches = queue->dispatches;
    kept->barriers = queue->barriers;
    queue->commands = kept->commands;
    queue->bound = VK_NULL_HANDLE;
    return 0;
}

int gpu_queue_keep_end(struct gpu_queue *queue, int *complete, struct error *error) {
    struct kept *kept = &queue->kept;
    *complete = 0;
    if (!kept->recording)
        return 0;
    kept->n_commands += queue->n_commands;
    kept->seconds += queue->seconds;
    kept->dispatches = queue->dispatches - kept->dispatches;
    if (kept_end(queue, error))
        return -1;
    kept->barriers = queue->barriers - kept->barriers;
    *complete = kept->complete = 1;
    return 0;
}

int gpu_queue_run_kept(struct gpu_queue *queue, struct error *error) {
    struct kept *kept = &queue->kept;
    if (!kept->complete)
        return error_set(error, ERROR_VALUE, "there are no kept commands");
    if (recording_begin(queue, error))
        return -1;
    if (queue->since_barrier > 0 || queue->kept_ran)
        barrier(queue, 0);
    queue->device->vk.vkCmdExecuteCommands(queue->commands, 1, &kept->commands);
    kept->ticket = queue->submitted + 1;
    queue->bound = VK_NULL_HANDLE;
    queue->kept_ran = 1;
    queue->dispatches += kept->dispatches;
    queue->barriers += kept->barriers;
    queue->n_commands += kept->n_commands;
    queue->seconds += kept->seconds;
    return bound_keep(queue, error);
}

int gpu_queue_wait(struct gpu_queue *queue, struct error *error) {
    if (submit(queue, error)) {
        if (error && error->kind == ERROR_INTERRUPTED && queue->submitted)
            ticket_wait(queue, queue->submitted, NULL);
        return -1;
    }
    if (queue->submitted && ticket_wait(queue, queue->submitted, error))
        return -1;
    gpu_profile_collect(queue->profile);
    return 0;
}

void gpu_queue_abandon(struct gpu_queue *queue) {
    if (queue->kept.ticket > queue->submitted) /* of commands whose submission failed */
        queue->kept.ticket = queue->submitted;
    if (queue->recording) {
        if (queue->kept.recording)
            queue->device->vk.vkEndCommandBuffer(queue->kept.commands);
        queue->kept.recording = queue->kept.complete = 0;
        queue->kept.ticket = queue->submitted;
        queue->device->vk.vkEndCommandBuffer(queue->ring[queue->current].commands);
        queue->recording = 0;
        queue->kept_ran = 0;
        queue->n_deferred = 0;
        queue->since_barrier = 0;
        queue->epoch = ++queue->device->epochs;
        gpu_profile_discard(queue->profile, queue->current);
    }
    queue->texels = VK_NULL_HANDLE;
    queue->has_extents = 0;
    if (queue->submitted)
        ticket_wait(queue, queue->submitted, NULL);
}

void gpu_queue_poll(struct gpu_queue *queue, int (*poll)(void *), void *context) {
    gpu_profile_host(queue->profile, poll ? GPU_HOST_BEGINS : GPU_HOST_ENDS);
    queue->poll = poll;
    queue->poll_context = context;
}

double gpu_queue_flops_bound(const struct gpu_queue *queue) {
    return SUBMISSION_SECONDS * queue->flops_per_second;
}

uint64_t gpu_queue_dispatches(const struct gpu_queue *queue) { return queue->dispatches; }

int gpu_queue_profile_start(struct gpu_queue *queue, struct error *error) {
    if (gpu_queue_wait(queue, error)) /* so that every command buffer is profiled whole or not */
        return -1;
    return gpu_profile_start(&queue->profile, queue->device, error);
}

void gpu_queue_profile_stop(struct gpu_queue *queue) {
    gpu_queue_wait(queue, NULL);
    gpu_profile_stop(&queue->profile);
}

int gpu_queue_profile_read(struct gpu_queue *queue, struct gpu_profile_row *rows, int *n,
                           struct gpu_profile_totals *totals, struct error *error) {
    if (!queue->profile)
        return error_set(error, ERROR_VALUE, "nothing is profiled");
    if (gpu_queue_wait(queue, error))
        return -1;
    *n = gpu_profile_rows(queue->profile, rows, &totals->host_seconds);
    totals->dispatches = queue->dispatches;
    totals->barriers = queue->barriers;
    totals->submissions = queue->submitted;
    return 0;
}
