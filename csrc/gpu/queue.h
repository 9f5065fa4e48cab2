/* What the files of a command queue share (queue.c, commands.c). */
#ifndef VKSTEER_QUEUE_H
#define VKSTEER_QUEUE_H

#include "gpu/internal.h"

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

/* Commands that can run again. */
struct kept {
    VkCommandPool pool; /* made at first use */
    VkCommandBuffer commands;
    int recording, complete;
    uint64_t ticket; /* of the last submission that runs them */
    int n_commands;
    double seconds;
    uint64_t dispatches, barriers;
};

struct gpu_queue {
    struct gpu_device *device;
    struct ring_entry ring[GPU_RING];
    int current; /* entry being recorded */
    int recording;
    VkCommandBuffer commands; /* those being recorded: of the entry, or kept */
    int n_commands;
    double seconds; /* estimated time of what is recorded */
    struct kept kept;
    int kept_ran; /* since the last barrier: the next command must wait */
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

/* queue.c: adds a command of the estimated length `seconds`, after a barrier if it must wait for
 * one of the commands before it, and submits if the bound on a submission is reached. */
int gpu_command_add(struct gpu_queue *queue, const struct command *command,
                    const struct gpu_access *accesses, int n_accesses, double seconds,
                    struct error *error);

#endif
