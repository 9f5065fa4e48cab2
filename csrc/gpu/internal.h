/* What the files of this room share. Nobody outside csrc/gpu includes it. */
#ifndef VKSTEER_GPU_INTERNAL_H
#define VKSTEER_GPU_INTERNAL_H

#include <pthread.h>
#include <sys/types.h>
#include <volk.h>

#include "gpu/gpu.h"

#define GPU_PUSH_BYTES 128

struct gpu_texels { /* one view of a part of a buffer */
    uint64_t address, bytes;
    VkBufferView view;
    VkDescriptorSet set;
    VkDescriptorPool pool;
    struct gpu_texels *next; /* of the same buffer */
};

struct gpu_pipeline {
    VkPipeline handle; /* VK_NULL_HANDLE until first asked for */
};

struct gpu_device {
    struct gpu_device_info info;
    VkPhysicalDevice physical;
    VkDevice handle;
    VkQueue queue;
    uint32_t queue_family;
    VkPhysicalDeviceMemoryProperties memory;
    struct VolkDeviceTable vk;
    /* the process that opened it: after fork() the child must not touch it */
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
    struct gpu_buffer *buffers; /* all that live, newest first */
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

/* The instance is made once per process and kept. NULL on error. */
VkInstance gpu_instance_get(struct error *error);
int gpu_instance_has_debug_names(void);
/* device_info.c */
uint32_t gpu_compute_family_find(VkPhysicalDevice physical);
void gpu_memory_info(VkPhysicalDevice physical, struct gpu_device_info *info);
void gpu_device_describe(VkPhysicalDevice physical, int index, struct gpu_device_info *info);
int gpu_physical_devices(VkPhysicalDevice *list, uint32_t *count, struct error *error);

/* check.c */
int gpu_result_check(struct gpu_device *device, VkResult result, const char *what,
                     struct error *error);
void gpu_name_set(struct gpu_device *device, VkObjectType type, uint64_t handle, const char *name);

/* texels.c */
int gpu_texels_get(struct gpu_device *device, uint64_t address, uint64_t bytes,
                   VkDescriptorSet *set, struct error *error);
void gpu_texels_destroy(struct gpu_buffer *buffer); /* all views of a buffer */
int gpu_texels_layout_create(struct gpu_device *device, struct error *error);
void gpu_texels_layout_destroy(struct gpu_device *device);

int gpu_pipelines_create(struct gpu_device *device, const char *cache_folder, struct error *error);
void gpu_pipelines_destroy(struct gpu_device *device);
int gpu_pipeline_get(struct gpu_device *device, int kernel, VkPipeline *out, struct error *error);

#endif
