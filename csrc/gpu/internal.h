/* What the files of csrc/gpu share; no other module includes it. */
#ifndef VKSTEER_GPU_INTERNAL_H
#define VKSTEER_GPU_INTERNAL_H

#include <pthread.h>
#include <sys/types.h>
#include <volk.h>

#include "gpu/gpu.h"

#define GPU_PUSH_BYTES 128 /* push constants that every Vulkan device offers */

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
    int used; /* work was submitted to its queue */
    uint64_t allocated;
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
    struct gpu_buffer *buffers; /* all that exist, newest first */
    uint32_t texel_alignment;
    VkPipelineCache cache;
    char cache_path[1024];                     /* "" when there is no cache on disk */
    PFN_vkSetDebugUtilsObjectNameEXT set_name; /* NULL without VK_EXT_debug_utils */
};

struct gpu_buffer {
    struct gpu_device *device;
    VkBuffer handle;
    VkDeviceMemory memory;
    uint64_t bytes, allocated, address;
    void *map;
    struct gpu_buffer *next, **link; /* in the device's list */
    struct gpu_texels *texels;
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

/* pipeline.c */
/* Makes the pipeline layout and the pipeline cache, which is read from `cache_folder` (NULL or "":
 * not kept on disk). */
int gpu_pipelines_create(struct gpu_device *device, const char *cache_folder, struct error *error);
/* Writes the cache and destroys all pipelines, as far as they exist. */
void gpu_pipelines_destroy(struct gpu_device *device);
/* The pipeline of a kernel, compiled at the first call. Safe from several threads. */
int gpu_pipeline_get(struct gpu_device *device, int kernel, VkPipeline *out, struct error *error);

#endif
