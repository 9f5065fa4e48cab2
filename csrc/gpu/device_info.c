/* The physical devices of this machine, their facts, and whether they offer the baseline that the
 * kernels need. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu/internal.h"

static const char *vendor_name(uint32_t id) {
    switch (id) {
    case 0x1002: return "AMD";
    case 0x8086: return "Intel";
    case 0x10de: return "NVIDIA";
    case 0x106b: return "Apple";
    case 0x13b5: return "ARM";
    case 0x5143: return "Qualcomm";
    case 0x1ae0: return "Google";
    case 0x10005: return "Mesa";
    default: return "unknown";
    }
}

static enum gpu_device_type device_type(VkPhysicalDeviceType type) {
    switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU: return GPU_DISCRETE;
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU: return GPU_INTEGRATED;
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU: return GPU_VIRTUAL;
    default: return GPU_SOFTWARE;
    }
}

static int device_extension_offered(VkPhysicalDevice physical, const char *name) {
    uint32_t count = 0;
    if (vkEnumerateDeviceExtensionProperties(physical, NULL, &count, NULL) != VK_SUCCESS ||
        count == 0)
        return 0;
    VkExtensionProperties *list = calloc(count, sizeof *list);
    int found = 0;
    if (list && vkEnumerateDeviceExtensionProperties(physical, NULL, &count, list) >= 0)
        for (uint32_t i = 0; i < count && !found; i++)
            found = strcmp(list[i].extensionName, name) == 0;
    free(list);
    return found;
}

uint32_t gpu_compute_family_find(VkPhysicalDevice physical) {
    VkQueueFamilyProperties families[32];
    uint32_t count = 32;
    vkGetPhysicalDeviceQueueFamilyProperties(physical, &count, families);
    for (uint32_t i = 0; i < count; i++)
        if (families[i].queueFlags & VK_QUEUE_COMPUTE_BIT)
            return i;
    return UINT32_MAX;
}

/* Names the first part of the baseline that the device lacks; NULL if it has them all. */
static const char *baseline_missing(VkPhysicalDevice physical,
                                    const VkPhysicalDeviceProperties *properties,
                                    const VkPhysicalDeviceSubgroupProperties *subgroup) {
    if (properties->apiVersion < VK_API_VERSION_1_2)
        return "Vulkan 1.2";
    VkPhysicalDeviceVulkan12Features v12 = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES,
    };
    VkPhysicalDeviceFeatures2 features = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2,
        .pNext = &v12,
    };
    vkGetPhysicalDeviceFeatures2(physical, &features);
    if (!v12.bufferDeviceAddress)
        return "bufferDeviceAddress";
    if (!v12.scalarBlockLayout)
        return "scalarBlockLayout";
    if (!v12.timelineSemaphore)
        return "timelineSemaphore";
    const VkSubgroupFeatureFlags needed = VK_SUBGROUP_FEATURE_BASIC_BIT |
                                          VK_SUBGROUP_FEATURE_ARITHMETIC_BIT |
                                          VK_SUBGROUP_FEATURE_BALLOT_BIT |
                                          VK_SUBGROUP_FEATURE_SHUFFLE_BIT;
    if (!(subgroup->supportedStages & VK_SHADER_STAGE_COMPUTE_BIT) ||
        (subgroup->supportedOperations & needed) != needed)
        return "subgroup arithmetic, ballot and shuffle in compute shaders";
    if (subgroup->subgroupSize < 4 || subgroup->subgroupSize > 64)
        return "a subgroup size of 4 to 64";
    if (properties->limits.maxPushConstantsSize < GPU_PUSH_BYTES)
        return "128 bytes of push constants";
    if (gpu_compute_family_find(physical) == UINT32_MAX)
        return "a compute queue";
    return NULL;
}

void gpu_memory_info(VkPhysicalDevice physical, struct gpu_device_info *info) {
    VkPhysicalDeviceMemoryBudgetPropertiesEXT budget = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT,
    };
    VkPhysicalDeviceMemoryProperties2 memory = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2,
        .pNext = info->has_budget ? &budget : NULL,
    };
    vkGetPhysicalDeviceMemoryProperties2(physical, &memory);
    for (uint32_t i = 0; i < memory.memoryProperties.memoryHeapCount; i++) {
        const VkMemoryHeap *heap = &memory.memoryProperties.memoryHeaps[i];
        if (!(heap->flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) || heap->size <= info->memory_bytes)
            continue;
        info->memory_bytes = heap->size;
        info->available_bytes = heap->size;
        if (info->has_budget)
            info->available_bytes = budget.heapBudget[i] > budget.heapUsage[i]
                                        ? budget.heapBudget[i] - budget.heapUsage[i]
                                        : 0;
    }
    if (info->type == GPU_SOFTWARE || info->type == GPU_INTEGRATED) {
        /* Drivers of devices that share the host's memory report all of RAM. What can be allocated
         * is what the operating system calls available. */
        FILE *file = fopen("/proc/meminfo", "r");
        char line[128];
        unsigned long long kib;
        while (file && fgets(line, sizeof line, file))
            if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1 &&
                kib * 1024 < info->available_bytes)
                info->available_bytes = kib * 1024;
        if (file)
            fclose(file);
    }
}

/* The optional features. A driver may offer an extension without its feature, so both are
 * checked. */
static void optional_features(VkPhysicalDevice physical, struct gpu_device_info *info) {
    int control_offered = device_extension_offered(physical,
                                                   VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME);
    int executable_offered =
        device_extension_offered(physical, VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME);
    VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR executable = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PIPELINE_EXECUTABLE_PROPERTIES_FEATURES_KHR,
    };
    VkPhysicalDeviceSubgroupSizeControlFeaturesEXT control = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES_EXT,
        .pNext = executable_offered ? &executable : NULL,
    };
    VkPhysicalDeviceFeatures2 features = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2};
    features.pNext = control_offered ? (void *)&control : control.pNext;
    vkGetPhysicalDeviceFeatures2(physical, &features);
    VkPhysicalDeviceSubgroupSizeControlPropertiesEXT sizes = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES_EXT,
    };
    VkPhysicalDeviceProperties2 properties = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2,
        .pNext = control_offered ? &sizes : NULL,
    };
    vkGetPhysicalDeviceProperties2(physical, &properties);
    info->has_subgroup_control = control.subgroupSizeControl && control.computeFullSubgroups &&
                                 (sizes.requiredSubgroupSizeStages & VK_SHADER_STAGE_COMPUTE_BIT);
    info->has_executable_info = executable.pipelineExecutableInfo != 0;
    info->has_int64 = features.features.shaderInt64 != 0;
}

/* Does the driver offer what kernels for matrix units declare, beside the units themselves? */
static int matrix_features(VkPhysicalDevice physical) {
    if (!device_extension_offered(physical, VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME))
        return 0;
    VkPhysicalDeviceCooperativeMatrixFeaturesKHR matrix = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR,
    };
    VkPhysicalDeviceVulkan12Features v12 = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES,
        .pNext = &matrix,
    };
    VkPhysicalDeviceFeatures2 features = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2,
        .pNext = &v12,
    };
    vkGetPhysicalDeviceFeatures2(physical, &features);
    return matrix.cooperativeMatrix && v12.shaderFloat16 && v12.vulkanMemoryModel;
}

/* Can kernels use units of this shape? Their tiles of shared memory hold cells of 8 float16, and a
 * step along k is 32. */
static int matrix_suits(const VkCooperativeMatrixPropertiesKHR *shape) {
    return shape->scope == VK_SCOPE_SUBGROUP_KHR && shape->AType == VK_COMPONENT_TYPE_FLOAT16_KHR &&
           shape->BType == VK_COMPONENT_TYPE_FLOAT16_KHR &&
           shape->CType == VK_COMPONENT_TYPE_FLOAT32_KHR &&
           shape->ResultType == VK_COMPONENT_TYPE_FLOAT32_KHR && shape->MSize % 8 == 0 &&
           (shape->NSize == 8 || shape->NSize == 16) && shape->MSize <= 16 &&
           (shape->KSize == 8 || shape->KSize == 16 || shape->KSize == 32);
}

/* Chooses the largest shape of the matrix units, if there are any. A software driver is trusted
 * with subgroups of 8 only: with 16 Mesa 26.1 offers the feature and crashes when it compiles. */
static void matrix_describe(VkPhysicalDevice physical, struct gpu_device_info *info) {
    VkCooperativeMatrixPropertiesKHR shapes[64];
    uint32_t n = 64, most = 0;
    if ((info->type == GPU_SOFTWARE && info->subgroup_size != 8) ||
        (info->type != GPU_SOFTWARE && !info->has_subgroup_control) ||
        info->max_invocations < 8 * info->subgroup_size || !matrix_features(physical))
        return;
    memset(shapes, 0, sizeof shapes);
    for (int i = 0; i < 64; i++)
        shapes[i].sType = VK_STRUCTURE_TYPE_COOPERATIVE_MATRIX_PROPERTIES_KHR;
    if (vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR(physical, &n, shapes) < 0)
        return;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t volume = shapes[i].MSize * shapes[i].NSize * shapes[i].KSize;
        if (!matrix_suits(&shapes[i]) || volume <= most)
            continue;
        most = volume;
        info->matrix_m = shapes[i].MSize;
        info->matrix_n = shapes[i].NSize;
        info->matrix_k = shapes[i].KSize;
    }
}

void gpu_device_describe(VkPhysicalDevice physical, int index, struct gpu_device_info *info) {
    VkPhysicalDeviceSubgroupProperties subgroup = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES,
    };
    VkPhysicalDeviceDriverProperties driver = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRIVER_PROPERTIES,
        .pNext = &subgroup,
    };
    VkPhysicalDeviceIDProperties id = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES,
        .pNext = &driver,
    };
    VkPhysicalDeviceProperties2 properties = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2,
        .pNext = &id,
    };
    vkGetPhysicalDeviceProperties2(physical, &properties);
    const VkPhysicalDeviceProperties *base = &properties.properties;

    memset(info, 0, sizeof *info);
    info->index = index;
    snprintf(info->name, sizeof info->name, "%s", base->deviceName);
    snprintf(info->vendor, sizeof info->vendor, "%s", vendor_name(base->vendorID));
    info->type = device_type(base->deviceType);
    snprintf(info->driver, sizeof info->driver, "%s %s", driver.driverName, driver.driverInfo);
    for (int i = 0; i < (int)VK_UUID_SIZE; i++)
        snprintf(info->uuid + 2 * i, 3, "%02x", id.deviceUUID[i]);
    info->subgroup_size = subgroup.subgroupSize;
    info->max_push_bytes = base->limits.maxPushConstantsSize;
    info->max_shared_bytes = base->limits.maxComputeSharedMemorySize;
    info->max_invocations = base->limits.maxComputeWorkGroupInvocations;
    info->has_budget = device_extension_offered(physical, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
    optional_features(physical, info);
    matrix_describe(physical, info);
    VkFormatProperties texel;
    vkGetPhysicalDeviceFormatProperties(physical, VK_FORMAT_R32G32B32A32_UINT, &texel);
    if (texel.bufferFeatures & VK_FORMAT_FEATURE_UNIFORM_TEXEL_BUFFER_BIT)
        info->max_texels = base->limits.maxTexelBufferElements;
    const char *missing = baseline_missing(physical, base, &subgroup);
    info->suitable = missing == NULL;
    if (missing)
        snprintf(info->missing, sizeof info->missing, "%s", missing);
    gpu_memory_info(physical, info);
}

int gpu_physical_devices(VkPhysicalDevice *list, uint32_t *count, struct error *error) {
    VkInstance instance = gpu_instance_get(error);
    if (instance == VK_NULL_HANDLE)
        return -1;
    *count = 64;
    VkResult result = vkEnumeratePhysicalDevices(instance, count, list);
    if (result != VK_SUCCESS && result != VK_INCOMPLETE)
        return error_set(error, ERROR_DEVICE,
                         "the Vulkan driver lists no devices (%d): is it installed for this GPU?",
                         (int)result);
    return 0;
}

int gpu_devices_list(struct gpu_device_info *infos, int capacity, int *count, struct error *error) {
    VkPhysicalDevice list[64];
    uint32_t n = 0;
    *count = 0;
    if (gpu_physical_devices(list, &n, error))
        return -1;
    *count = (int)n;
    for (int i = 0; i < (int)n && i < capacity; i++)
        gpu_device_describe(list[i], i, &infos[i]);
    return 0;
}
