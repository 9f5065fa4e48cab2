/* Opening and closing devices, and the facts of an open one. */
#include <stdlib.h>
#include <unistd.h>

#include "gpu/internal.h"

/* Optional extensions that the device offers, at most four; returns their number. */
static uint32_t extensions_list(const struct gpu_device_info *info, const char **extensions) {
    uint32_t n = 0;
    if (info->has_budget)
        extensions[n++] = VK_EXT_MEMORY_BUDGET_EXTENSION_NAME;
    if (info->has_subgroup_control)
        extensions[n++] = VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME;
    if (info->has_executable_info)
        extensions[n++] = VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME;
    if (info->matrix_m)
        extensions[n++] = VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME;
    return n;
}

/* vkCreateDevice with one compute queue and `features` (VkPhysicalDeviceFeatures2). */
static int handle_create(struct gpu_device *device, const void *features, struct error *error) {
    const char *extensions[4];
    const float priority = 1.0f;
    device->queue_family = gpu_compute_family_find(device->physical);
    VkDeviceQueueCreateInfo queue = {
        .sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO,
        .queueFamilyIndex = device->queue_family,
        .queueCount = 1,
        .pQueuePriorities = &priority,
    };
    VkDeviceCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
        .pNext = features,
        .queueCreateInfoCount = 1,
        .pQueueCreateInfos = &queue,
        .enabledExtensionCount = extensions_list(&device->info, extensions),
        .ppEnabledExtensionNames = extensions,
    };
    return gpu_result_check(device,
                            vkCreateDevice(device->physical, &create, NULL, &device->handle),
                            "opening the device", error);
}

/* The Vulkan device with the baseline features and the optional ones that `info` names. */
static int logical_device_create(struct gpu_device *device, struct error *error) {
    VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR executable = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PIPELINE_EXECUTABLE_PROPERTIES_FEATURES_KHR,
        .pipelineExecutableInfo = VK_TRUE,
    };
    VkPhysicalDeviceSubgroupSizeControlFeaturesEXT control = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES_EXT,
        .subgroupSizeControl = VK_TRUE,
        .computeFullSubgroups = VK_TRUE,
    };
    VkPhysicalDeviceVulkan12Features v12 = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES,
        .bufferDeviceAddress = VK_TRUE,
        .scalarBlockLayout = VK_TRUE,
        .timelineSemaphore = VK_TRUE,
        .shaderFloat16 = device->info.matrix_m != 0,
        .vulkanMemoryModel = device->info.matrix_m != 0,
    };
    VkPhysicalDeviceCooperativeMatrixFeaturesKHR matrix = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR,
        .cooperativeMatrix = VK_TRUE,
    };
    void **next = &v12.pNext;
    if (device->info.has_subgroup_control) {
        *next = &control;
        next = &control.pNext;
    }
    if (device->info.has_executable_info) {
        *next = &executable;
        next = &executable.pNext;
    }
    if (device->info.matrix_m)
        *next = &matrix;
    VkPhysicalDeviceFeatures2 features = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2,
        .pNext = &v12,
        .features = {.shaderInt64 = device->info.has_int64 ? VK_TRUE : VK_FALSE},
    };
    if (handle_create(device, &features, error))
        return -1;
    volkLoadDeviceTable(&device->vk, device->handle);
    device->vk.vkGetDeviceQueue(device->handle, device->queue_family, 0, &device->queue);
    vkGetPhysicalDeviceMemoryProperties(device->physical, &device->memory);
    if (gpu_instance_has_debug_names())
        device->set_name = (PFN_vkSetDebugUtilsObjectNameEXT)(void (*)(void))vkGetInstanceProcAddr(
            gpu_instance_get(NULL), "vkSetDebugUtilsObjectNameEXT");
    return 0;
}

int gpu_device_open(struct gpu_device **out, int index, const struct gpu_kernel *kernels,
                    int n_kernels, const char *cache_folder, struct error *error) {
    VkPhysicalDevice list[64];
    uint32_t n = 0;
    *out = NULL;
    if (gpu_physical_devices(list, &n, error))
        return -1;
    if (index < 0 || index >= (int)n)
        return error_set(error, ERROR_DEVICE, "no Vulkan device %d: there are %u", index, n);
    struct gpu_device *device = calloc(1, sizeof *device);
    if (!device)
        return error_set(error, ERROR_MEMORY, "out of memory for a device");
    gpu_device_describe(list[index], index, &device->info);
    device->physical = list[index];
    VkPhysicalDeviceProperties properties;
    vkGetPhysicalDeviceProperties(device->physical, &properties);
    device->texel_alignment = (uint32_t)properties.limits.minTexelBufferOffsetAlignment;
    device->owner = getpid();
    device->kernels = kernels;
    device->n_kernels = n_kernels;
    if (!device->info.suitable) {
        error_set(error, ERROR_DEVICE, "%s does not offer %s, which the kernels need",
                  device->info.name, device->info.missing);
        goto fail;
    }
    /* A software device runs a workgroup on one core, so one subgroup is enough. A GPU gets four
     * subgroups of 32 or two of 64. */
    device->workgroup = device->info.type == GPU_SOFTWARE ? device->info.subgroup_size : 128;
    if (device->workgroup > device->info.max_invocations)
        device->workgroup = device->info.max_invocations / device->info.subgroup_size *
                            device->info.subgroup_size;
    if (logical_device_create(device, error) || gpu_pipelines_create(device, cache_folder, error))
        goto fail;
    *out = device;
    return 0;
fail:
    gpu_device_close(device);
    return -1;
}

void gpu_device_close(struct gpu_device *device) {
    if (!device)
        return;
    if (device->owner == getpid()) { /* a forked child owns no Vulkan object */
        /* Only a device that ran work is waited for: Mesa's null devices compile kernels, but
         * crash in vkDeviceWaitIdle. */
        if (device->handle && device->used && !device->lost)
            device->vk.vkDeviceWaitIdle(device->handle);
        gpu_pipelines_destroy(device);
        if (device->handle)
            device->vk.vkDestroyDevice(device->handle, NULL);
    }
    free(device->placed);
    free(device);
}

const struct gpu_device_info *gpu_device_get_info(const struct gpu_device *device) {
    return &device->info;
}

uint32_t gpu_device_workgroup(const struct gpu_device *device) { return device->workgroup; }

uint64_t gpu_device_available(const struct gpu_device *device) {
    if (device->owner != getpid())
        return 0;
    struct gpu_device_info now = device->info;
    now.memory_bytes = 0;
    gpu_memory_info(device->physical, &now);
    uint64_t available = now.available_bytes, held = device->allocated;
    /* without a budget the driver names the size of a heap, whatever is used of it */
    if (!now.has_budget && now.type != GPU_SOFTWARE && now.type != GPU_INTEGRATED)
        available -= held < available ? held : available;
    if (device->limit && available > device->limit - (held < device->limit ? held : device->limit))
        available = device->limit - (held < device->limit ? held : device->limit);
    return available;
}

void gpu_device_limit(struct gpu_device *device, uint64_t bytes) { device->limit = bytes; }

uint64_t gpu_device_allocated(const struct gpu_device *device) { return device->allocated; }

uint64_t gpu_device_peak(struct gpu_device *device, int reset) {
    uint64_t peak = device->peak;
    if (reset)
        device->peak = device->allocated;
    return peak;
}
