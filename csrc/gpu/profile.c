/* Profiles: what each kernel of a queue costs, from one timestamp after every command.
 *
 * A timestamp is written when all commands before it have ended, so the difference of two is the
 * time by which a command makes the work longer, its barrier included; commands that run side by
 * side share the time that they take together, and the rows add up to the whole. */
#include <math.h>
#include <stdlib.h>
#include <time.h>

#include "gpu/internal.h"

struct command {
    int row;
    double flops, read, written;
};

struct gpu_profile {
    struct gpu_device *device;
    int depth; /* starts without their stop */
    struct gpu_profile_row *rows;
    struct {
        VkQueryPool pool;
        int n; /* commands */
        struct command commands[GPU_SUBMISSION_COMMANDS];
    } ring[GPU_RING];
    double tick; /* seconds; 0: the device has no timestamps */
    uint64_t mask;
    double host_seconds, begun, waits; /* times of the clock; 0: not in a call, in a wait */
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Seconds of a tick and the bits that count, of the queue's family. */
static void clock_read(struct gpu_profile *profile) {
    struct gpu_device *device = profile->device;
    VkQueueFamilyProperties families[32];
    uint32_t n = 32;
    VkPhysicalDeviceProperties properties;
    vkGetPhysicalDeviceQueueFamilyProperties(device->physical, &n, families);
    vkGetPhysicalDeviceProperties(device->physical, &properties);
    uint32_t bits = device->queue_family < n ? families[device->queue_family].timestampValidBits
                                             : 0;
    profile->tick = bits ? 1e-9 * (double)properties.limits.timestampPeriod : 0;
    profile->mask = bits >= 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
}

int gpu_profile_start(struct gpu_profile **profile, struct gpu_device *device,
                      struct error *error) {
    if (*profile) {
        (*profile)->depth++;
        return 0;
    }
    struct gpu_profile *made = calloc(1, sizeof *made);
    if (made)
        made->rows = calloc((size_t)device->n_kernels + 2, sizeof *made->rows);
    if (!made || !made->rows) {
        free(made);
        return error_set(error, ERROR_MEMORY, "out of memory for a profile");
    }
    made->device = device;
    made->depth = 1;
    clock_read(made);
    for (int i = 0; i < device->n_kernels + 2; i++)
        made->rows[i].kernel = i < device->n_kernels    ? device->kernels[i].name
                               : i == device->n_kernels ? "(copy)"
                                                        : "(fill)";
    const VkQueryPoolCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO,
        .queryType = VK_QUERY_TYPE_TIMESTAMP,
        .queryCount = GPU_SUBMISSION_COMMANDS + 1,
    };
    for (int i = 0; i < GPU_RING && made->tick > 0; i++)
        if (gpu_result_check(
                device,
                device->vk.vkCreateQueryPool(device->handle, &create, NULL, &made->ring[i].pool),
                "creating timestamps", error)) {
            gpu_profile_destroy(made);
            return -1;
        }
    *profile = made;
    return 0;
}

void gpu_profile_stop(struct gpu_profile **profile) {
    if (*profile && --(*profile)->depth == 0) {
        gpu_profile_destroy(*profile);
        *profile = NULL;
    }
}

void gpu_profile_destroy(struct gpu_profile *profile) {
    if (!profile)
        return;
    struct gpu_device *device = profile->device;
    for (int i = 0; i < GPU_RING; i++)
        if (profile->ring[i].pool && gpu_device_check(device, NULL) == 0)
            device->vk.vkDestroyQueryPool(device->handle, profile->ring[i].pool, NULL);
    free(profile->rows);
    free(profile);
}

/* Adds up command buffer `ring`, which has ended. */
static void ring_collect(struct gpu_profile *profile, int ring) {
    static const double unknown = NAN;
    uint64_t times[GPU_SUBMISSION_COMMANDS + 1];
    struct gpu_device *device = profile->device;
    int n = profile->ring[ring].n;
    profile->ring[ring].n = 0;
    if (n == 0)
        return;
    VkQueryPool pool = profile->ring[ring].pool;
    int timed = pool && device->vk.vkGetQueryPoolResults(device->handle, pool, 0, (uint32_t)n + 1,
                                                         sizeof times, times, sizeof *times,
                                                         VK_QUERY_RESULT_64_BIT) == VK_SUCCESS;
    for (int i = 0; i < n; i++) {
        const struct command *command = &profile->ring[ring].commands[i];
        struct gpu_profile_row *row = &profile->rows[command->row];
        row->calls++;
        row->flops += command->flops;
        row->bytes_read += command->read;
        row->bytes_written += command->written;
        row->seconds += timed ? profile->tick * (double)((times[i + 1] - times[i]) & profile->mask)
                              : unknown;
    }
}

void gpu_profile_collect(struct gpu_profile *profile) {
    for (int i = 0; profile && i < GPU_RING; i++)
        ring_collect(profile, i);
}

int gpu_profile_begin(struct gpu_profile *profile, int ring, VkCommandBuffer commands,
                      struct error *error) {
    (void)error;
    if (!profile)
        return 0;
    ring_collect(profile, ring);
    VkQueryPool pool = profile->ring[ring].pool;
    if (pool) {
        const struct VolkDeviceTable *vk = &profile->device->vk;
        vk->vkCmdResetQueryPool(commands, pool, 0, GPU_SUBMISSION_COMMANDS + 1);
        vk->vkCmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, pool, 0);
    }
    return 0;
}

void gpu_profile_command(struct gpu_profile *profile, int ring, VkCommandBuffer commands, int row,
                         double flops, double read, double written) {
    VkQueryPool pool = profile->ring[ring].pool;
    int i = profile->ring[ring].n++;
    profile->ring[ring].commands[i] = (struct command){row, flops, read, written};
    if (pool)
        profile->device->vk.vkCmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT,
                                                pool, (uint32_t)i + 1);
}

void gpu_profile_discard(struct gpu_profile *profile, int ring) {
    if (profile)
        profile->ring[ring].n = 0;
}

void gpu_profile_host(struct gpu_profile *profile, enum gpu_host_event event) {
    if (!profile)
        return;
    double time = now();
    switch (event) {
    case GPU_HOST_BEGINS: profile->begun = time; break;
    case GPU_HOST_WAITS: profile->waits = time; break;
    case GPU_HOST_WAITED:
        if (profile->begun > 0)
            profile->begun += time - profile->waits;
        break;
    case GPU_HOST_ENDS:
        if (profile->begun > 0)
            profile->host_seconds += time - profile->begun;
        profile->begun = 0;
        break;
    }
}

int gpu_profile_rows(const struct gpu_profile *profile, struct gpu_profile_row *rows,
                     double *host_seconds) {
    int n = 0;
    for (int i = 0; i < profile->device->n_kernels + 2; i++)
        if (profile->rows[i].calls)
            rows[n++] = profile->rows[i];
    *host_seconds = profile->host_seconds;
    return n;
}
