/* A queue of commands for a device: a ring of command buffers, a timeline semaphore, and a bound on
 * the work of one submission.
 *
 * Every command sees the results of those before it: a compute and transfer barrier is placed
 * before a command that reads what was written since the last barrier, or writes what was read or
 * written since (hazards.c). Commands between two barriers touch nothing of each other and may run
 * side by side. Every submission ends with a barrier, which also makes its results visible to the
 * host.
 *
 * VKSTEER_BARRIERS=all places one before every command. VKSTEER_BARRIERS=reverse records the
 * commands between two barriers in reverse order, so that a missing barrier changes results also on
 * drivers that run one command after another. Where it is set, an address in a kernel's parameters
 * that lies in no buffer is an error. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gpu/internal.h"

/* Recorded work is submitted when its estimated time reaches this bound. A desktop's watchdog kills
 * a submission after about two seconds, and Ctrl-C has to wait for the submissions under way. */
#define SUBMISSION_SECONDS 0.2

struct ring_entry {
    VkCommandPool pool;
    VkCommandBuffer commands;
    uint64_t ticket; /* the timeline value that its last submission signals; 0: never used */
};

enum barriers { BARRIERS_NEEDED, BARRIERS_ALL, BARRIERS_REVERSE };

struct command {
    enum { DISPATCH, COPY, ZERO } kind;
    int kernel;
    VkPipeline pipeline;
    VkDescriptorSet texels; /* VK_NULL_HANDLE: none */
    uint32_t grid[3], params_bytes;
    char params[GPU_PUSH_BYTES];
    VkBuffer from, to;
    uint64_t from_offset, to_offset, bytes;
    double flops;
};

struct gpu_queue {
    struct gpu_device *device;
    struct ring_entry ring[GPU_RING];
    int current; /* entry being recorded */
    int recording;
    int n_commands;
    double seconds; /* estimated time of what is recorded */
    double flops_per_second;
    VkSemaphore timeline;
    uint64_t submitted; /* last ticket handed out */
    uint64_t dispatches, barriers;
    enum barriers mode;
    uint64_t epoch;    /* the last barrier */
    int since_barrier; /* commands after it */
    VkPipeline bound;  /* in the command buffer being recorded */
    /* for the next dispatch */
    VkDescriptorSet texels;
    uint64_t extents[GPU_ADDRESSES];
    int has_extents;
    struct command *deferred; /* BARRIERS_REVERSE: the commands after the last barrier */
    int n_deferred, deferred_capacity;
    struct gpu_profile *profile; /* NULL while nothing is profiled */
    int (*poll)(void *);
    void *poll_context;
};

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
        for (int i = 0; i < GPU_RING; i++)
            if (queue->ring[i].pool)
                device->vk.vkDestroyCommandPool(device->handle, queue->ring[i].pool, NULL);
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
    queue->n_commands = 0;
    queue->seconds = 0;
    queue->bound = VK_NULL_HANDLE;
    return gpu_profile_begin(queue->profile, queue->current, entry->commands, error);
}

/* --- commands --------------------------------------------------------------------------------- */

static void command_record(struct gpu_queue *queue, const struct command *c) {
    const struct gpu_device *device = queue->device;
    const struct VolkDeviceTable *vk = &device->vk;
    VkCommandBuffer commands = queue->ring[queue->current].commands;
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
        queue->ring[queue->current].commands,
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT |
            (host ? VK_PIPELINE_STAGE_HOST_BIT : 0),
        0, 1, &memory, 0, NULL, 0, NULL);
    queue->epoch = ++queue->device->epochs;
    queue->since_barrier = 0;
    queue->barriers++;
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

/* Adds a command of the estimated length `seconds`, after a barrier if it must wait for one of the
 * commands before it, and submits if the bound is reached. */
static int command_add(struct gpu_queue *queue, const struct command *command,
                       const struct gpu_access *accesses, int n_accesses, double seconds,
                       struct error *error) {
    if (recording_begin(queue, error))
        return -1;
    if (queue->mode == BARRIERS_ALL ? queue->since_barrier > 0
                                    : gpu_access_waits(accesses, n_accesses, queue->epoch))
        barrier(queue, 0);
    gpu_access_note(accesses, n_accesses, queue->epoch);
    if (queue->mode != BARRIERS_REVERSE)
        command_record(queue, command);
    else if (command_defer(queue, command, error))
        return -1;
    queue->since_barrier++;
    queue->n_commands++;
    queue->seconds += seconds;
    if (queue->seconds < SUBMISSION_SECONDS && queue->n_commands < GPU_SUBMISSION_COMMANDS)
        return 0;
    return submit(queue, error);
}

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
        command_add(queue, &command, accesses, n_accesses, flops / queue->flops_per_second, error))
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
    return command_add(queue, &command, accesses, 2, bytes / 4e9, error);
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
    return command_add(queue, &command, &access, 1, bytes / 4e9, error);
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
    if (queue->recording) {
        queue->device->vk.vkEndCommandBuffer(queue->ring[queue->current].commands);
        queue->recording = 0;
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
