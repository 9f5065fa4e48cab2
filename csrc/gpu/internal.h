/* What the files of csrc/gpu share; no other module includes it. */
#ifndef VKSTEER_GPU_INTERNAL_H
#define VKSTEER_GPU_INTERNAL_H

#include <pthread.h>
#include <sys/types.h>
#include <volk.h>

#include "gpu/gpu.h"

#define GPU_RING 4                   /* command buffers of a queue */
#define GPU_SUBMISSION_COMMANDS 4096 /* the most of one submission */
#define GPU_PUSH_BYTES 128           /* push constants that every Vulkan device offers */

struct gpu_texels { /* one view of a part of a buffer */
    uint64_t address, bytes;
    VkBufferView view;
    VkDescriptorSet set;
    VkDescriptorPool pool;
    struct gpu_texels *next; /* of the same buffer */
};

struct gpu_pipeline {
    VkPipeline handle; /* VK_NULL_HANDLE until it is compiled */
};

struct gpu_device {
    struct gpu_device_info info;
    VkPhysicalDevice physical;
    VkDevice handle;
    VkQueue queue;
    uint32_t queue_family;
    VkPhysicalDeviceMemoryProperties memory;
    struct VolkDeviceTable vk;
    /* the process that opened it; a child of fork() must not call the driver */
    pid_t owner;
    int lost;
    int used;                 /* work was submitted to its queue */
    uint64_t allocated, peak; /* bytes of all buffers, and the most since the peak was reset */
    uint64_t limit;           /* bytes that they may take together; 0: what the device has */
    uint32_t workgroup;
    const struct gpu_kernel *kernels;
    int n_kernels;
    struct gpu_pipeline *pipelines; /* one per kernel */
    pthread_mutex_t pipeline_lock;
    int pipeline_lock_made;
    VkPipelineLayout layout;
    VkDescriptorSetLayout set_layout; /* one texel buffer, for the kernels that use it */
    struct {
        VkDescriptorPool pool;
        uint32_t used;
    } *texel_pools;
    uint32_t n_texel_pools;
    struct gpu_buffer **placed; /* all buffers, by ascending address */
    uint32_t n_placed, placed_capacity;
    int strict;      /* 1: an address outside all buffers is an error, even if no kernel uses it */
    uint64_t epochs; /* barriers of all queues: no two have one number */
    uint32_t texel_alignment;
    VkPipelineCache cache;
    char cache_path[1024];                     /* "" when there is no cache on disk */
    PFN_vkSetDebugUtilsObjectNameEXT set_name; /* NULL without VK_EXT_debug_utils */
};

#define GPU_RANGES 8

struct gpu_range {
    uint64_t begin, end; /* bytes from the buffer's begin */
};

/* What was touched since the barrier `epoch`; nothing, for a queue that is at another one. */
struct gpu_ranges {
    uint64_t epoch;
    uint32_t n;
    struct gpu_range at[GPU_RANGES];
};

struct gpu_buffer {
    struct gpu_device *device;
    VkBuffer handle;
    VkDeviceMemory memory;
    uint64_t bytes, allocated, address;
    void *map;
    struct gpu_texels *texels;
    struct gpu_ranges read, written;
};

/* A part of a buffer that a command touches. */
struct gpu_access {
    struct gpu_buffer *buffer;
    uint64_t begin, end;
    int written; /* 1: written, and perhaps read; 0: read only */
};

/* instance.c */
/* The instance of this process, made by the first call; VK_NULL_HANDLE with ERROR_DEVICE if there
 * is no loader or driver, or the parent process made one before fork(). Safe from any thread. */
VkInstance gpu_instance_get(struct error *error);
/* 1 if the instance offers VK_EXT_debug_utils; 0 before it is made. */
int gpu_instance_has_debug_names(void);

/* device_info.c */
/* The first queue family that offers compute; UINT32_MAX if there is none. */
uint32_t gpu_compute_family_find(VkPhysicalDevice physical);
/* Sets memory_bytes and available_bytes of the largest device-local heap. The caller has zeroed
 * memory_bytes and set `has_budget` and `type`. */
void gpu_memory_info(VkPhysicalDevice physical, struct gpu_device_info *info);
/* Fills `info` for the device at `index` of the list. */
void gpu_device_describe(VkPhysicalDevice physical, int index, struct gpu_device_info *info);
/* The first 64 physical devices into `list` [64]; *count is how many they are. */
int gpu_physical_devices(VkPhysicalDevice *list, uint32_t *count, struct error *error);

/* check.c */
/* Turns the result of a Vulkan call into an error. `what` names the call in the message ("creating
 * a buffer"). After VK_ERROR_DEVICE_LOST the device is marked as lost and idle. */
int gpu_result_check(struct gpu_device *device, VkResult result, const char *what,
                     struct error *error);
/* Names an object for debuggers and validation messages, where the instance offers it. */
void gpu_name_set(struct gpu_device *device, VkObjectType type, uint64_t handle, const char *name);

/* texels.c */
/* The descriptor set of the texel buffer at an address, made at its first use and owned by the
 * buffer. ERROR_DEVICE if no texel buffer can begin there or have this size. */
int gpu_texels_get(struct gpu_device *device, uint64_t address, uint64_t bytes,
                   VkDescriptorSet *set, struct error *error);
/* Destroys all views of a buffer. */
void gpu_texels_destroy(struct gpu_buffer *buffer);
/* Makes device->set_layout. */
int gpu_texels_layout_create(struct gpu_device *device, struct error *error);
/* Destroys the layout and the descriptor pools, as far as they exist. */
void gpu_texels_layout_destroy(struct gpu_device *device);

/* hazards.c */
/* Enters a buffer into the device's list by address, and takes it out. */
int gpu_buffer_register(struct gpu_buffer *buffer, struct error *error);
void gpu_buffer_unregister(struct gpu_buffer *buffer);
/* The buffer that holds the address; NULL if none does. */
struct gpu_buffer *gpu_buffer_at(const struct gpu_device *device, uint64_t address);
/* What a dispatch of `kernel` touches; returns the number of accesses. extents: bytes that it
 * touches from each address of its parameters on, 0: the whole buffer; NULL: all whole. An address
 * outside all buffers is one that the kernel does not use. On a strict device it is an ERROR_VALUE
 * (-1), unless it is 0, and so is a range that leaves its buffer. */
int gpu_access_find(const struct gpu_device *device, int kernel, const void *params,
                    const uint64_t *extents, struct gpu_access accesses[GPU_ADDRESSES],
                    struct error *error);
/* Must a command with these accesses wait for one since the barrier `epoch`? */
int gpu_access_waits(const struct gpu_access *accesses, int n, uint64_t epoch);
/* Notes them as done since that barrier. */
void gpu_access_note(const struct gpu_access *accesses, int n, uint64_t epoch);

/* profile.c: a NULL profile measures nothing */
struct gpu_profile;
enum gpu_host_event { GPU_HOST_BEGINS, GPU_HOST_WAITS, GPU_HOST_WAITED, GPU_HOST_ENDS };
int gpu_profile_start(struct gpu_profile **profile, struct gpu_device *device, struct error *error);
/* *profile is NULL after the last stop. The device is idle. */
void gpu_profile_stop(struct gpu_profile **profile);
void gpu_profile_destroy(struct gpu_profile *profile);
/* Command buffer `ring` is begun; its earlier submission has ended. */
int gpu_profile_begin(struct gpu_profile *profile, int ring, VkCommandBuffer commands,
                      struct error *error);
/* A command was recorded. row: a kernel, or behind them the copies and fills. */
void gpu_profile_command(struct gpu_profile *profile, int ring, VkCommandBuffer commands, int row,
                         double flops, double read, double written);
/* Its commands were never submitted. */
void gpu_profile_discard(struct gpu_profile *profile, int ring);
/* Adds up the command buffers whose submissions have all ended. */
void gpu_profile_collect(struct gpu_profile *profile);
void gpu_profile_host(struct gpu_profile *profile, enum gpu_host_event event);
/* The rows that were used; returns their number. */
int gpu_profile_rows(const struct gpu_profile *profile, struct gpu_profile_row *rows,
                     double *host_seconds);

/* pipeline.c */
/* Makes the pipeline layout and the pipeline cache, which is read from `cache_folder` (NULL or "":
 * not kept on disk). */
int gpu_pipelines_create(struct gpu_device *device, const char *cache_folder, struct error *error);
/* Writes the cache and destroys all pipelines, as far as they exist. */
void gpu_pipelines_destroy(struct gpu_device *device);
/* The pipeline of a kernel, compiled at the first call. Safe from several threads. */
int gpu_pipeline_get(struct gpu_device *device, int kernel, VkPipeline *out, struct error *error);

#endif
