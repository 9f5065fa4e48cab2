/* Compute pipelines: one per kernel, made at its first dispatch or ahead of time in parallel, with
 * a cache on disk for each driver.
 *
 * Every kernel gets specialisation constants: 0 is the subgroup size, 1 the workgroup size (a
 * multiple of it); 2, 3 and 4 are the rows, columns and depth of the device's matrix units, 5 and 6
 * the sizes of workgroups of four and eight subgroups. All kernels share one layout: 128 bytes of
 * push constants, and one texel buffer, which few of them read. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gpu/internal.h"

#define CACHE_MAX (64u << 20)
#define CONSTANTS 7

/* The contents of a file of at most CACHE_MAX bytes, for the caller to free; NULL if it is empty,
 * too large or cannot be read. */
static void *file_read(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    void *data = NULL;
    *size = 0;
    if (!file)
        return NULL;
    if (fseek(file, 0, SEEK_END) == 0) {
        long end = ftell(file);
        if (end > 0 && (unsigned long)end <= CACHE_MAX && fseek(file, 0, SEEK_SET) == 0 &&
            (data = malloc((size_t)end)) != NULL) {
            if (fread(data, 1, (size_t)end, file) == (size_t)end) {
                *size = (size_t)end;
            } else {
                free(data);
                data = NULL;
            }
        }
    }
    fclose(file);
    return data;
}

int gpu_pipelines_create(struct gpu_device *device, const char *cache_folder, struct error *error) {
    device->pipelines = calloc((size_t)device->n_kernels, sizeof *device->pipelines);
    if (!device->pipelines)
        return error_set(error, ERROR_MEMORY, "out of memory for pipelines");
    pthread_mutex_init(&device->pipeline_lock, NULL);
    device->pipeline_lock_made = 1;
    if (gpu_texels_layout_create(device, error))
        return -1;
    VkPushConstantRange range = {.stageFlags = VK_SHADER_STAGE_COMPUTE_BIT, .size = GPU_PUSH_BYTES};
    VkPipelineLayoutCreateInfo layout = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO,
        .pushConstantRangeCount = 1,
        .pPushConstantRanges = &range,
        .setLayoutCount = 1,
        .pSetLayouts = &device->set_layout,
    };
    if (gpu_result_check(
            device,
            device->vk.vkCreatePipelineLayout(device->handle, &layout, NULL, &device->layout),
            "creating a layout", error))
        return -1;
    size_t size = 0;
    void *data = NULL;
    if (cache_folder && cache_folder[0]) {
        snprintf(device->cache_path, sizeof device->cache_path, "%s/pipelines-%s.bin", cache_folder,
                 device->info.uuid);
        data = file_read(device->cache_path, &size);
    }
    /* The driver checks the header (vendor, device, its own UUID) and ignores data of others. */
    VkPipelineCacheCreateInfo cache = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO,
        .initialDataSize = size,
        .pInitialData = data,
    };
    VkResult result = device->vk.vkCreatePipelineCache(device->handle, &cache, NULL,
                                                       &device->cache);
    free(data);
    return gpu_result_check(device, result, "creating the pipeline cache", error);
}

/* Writes the pipeline cache to a new file and renames it, so that a process killed meanwhile leaves
 * the old file intact. Errors are ignored: without a cache, compiling takes time again. */
static void cache_save(struct gpu_device *device) {
    size_t size = 0;
    if (!device->cache_path[0] ||
        device->vk.vkGetPipelineCacheData(device->handle, device->cache, &size, NULL) !=
            VK_SUCCESS ||
        size == 0)
        return;
    void *data = malloc(size);
    char temporary[1100];
    snprintf(temporary, sizeof temporary, "%s.%ld", device->cache_path, (long)getpid());
    FILE *file = NULL;
    if (data &&
        device->vk.vkGetPipelineCacheData(device->handle, device->cache, &size, data) ==
            VK_SUCCESS &&
        (file = fopen(temporary, "wb")) != NULL) {
        size_t written = fwrite(data, 1, size, file);
        if (fclose(file) != 0 || written != size || rename(temporary, device->cache_path) != 0)
            remove(temporary);
    }
    free(data);
}

void gpu_pipelines_destroy(struct gpu_device *device) {
    if (device->cache) {
        if (!device->lost)
            cache_save(device);
        device->vk.vkDestroyPipelineCache(device->handle, device->cache, NULL);
    }
    if (device->pipelines && device->handle)
        for (int i = 0; i < device->n_kernels; i++)
            if (device->pipelines[i].handle)
                device->vk.vkDestroyPipeline(device->handle, device->pipelines[i].handle, NULL);
    free(device->pipelines);
    if (device->layout)
        device->vk.vkDestroyPipelineLayout(device->handle, device->layout, NULL);
    gpu_texels_layout_destroy(device);
    if (device->pipeline_lock_made)
        pthread_mutex_destroy(&device->pipeline_lock);
}

/* The capabilities of SPIR-V that a device may lack. */
#define CAPABILITY_INT64 11
#define CAPABILITY_MATRIX 6022

/* Does the SPIR-V module declare a capability? The declarations (opcode 17) are the first
 * instructions of a module, after its five-word header. */
static int declares(const struct gpu_kernel *source, uint32_t capability) {
    const size_t n_words = source->spirv_bytes / 4;
    for (size_t i = 5; i + 1 < n_words && (source->spirv[i] & 0xffff) == 17;
         i += source->spirv[i] >> 16)
        if (source->spirv[i + 1] == capability)
            return 1;
    return 0;
}

/* Names a capability that the kernel needs and this device lacks; NULL if there is none. */
static const char *capability_missing(const struct gpu_device *device,
                                      const struct gpu_kernel *source) {
    if (!device->info.has_int64 && declares(source, CAPABILITY_INT64))
        return "64-bit integers";
    if (!device->info.matrix_m && declares(source, CAPABILITY_MATRIX))
        return "matrix units";
    return NULL;
}

int gpu_kernel_on_matrix_units(const struct gpu_kernel *kernel) {
    return declares(kernel, CAPABILITY_MATRIX);
}

int gpu_pipeline_possible(const struct gpu_device *device, int kernel) {
    return device->kernels[kernel].spirv_bytes != 0 &&
           capability_missing(device, &device->kernels[kernel]) == NULL;
}

/* The shader module of a kernel that this build contains and the device can run. */
static int module_create(struct gpu_device *device, const struct gpu_kernel *source,
                         VkShaderModule *module, struct error *error) {
    if (source->spirv_bytes == 0)
        return error_set(error, ERROR_DEVICE,
                         "kernel %s was left out of this build (its shader compiler was too old)",
                         source->name);
    const char *missing = capability_missing(device, source);
    if (missing)
        return error_set(error, ERROR_DEVICE, "kernel %s needs %s, which %s does not offer",
                         source->name, missing, device->info.name);
    VkShaderModuleCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO,
        .codeSize = source->spirv_bytes,
        .pCode = source->spirv,
    };
    return gpu_result_check(device,
                            device->vk.vkCreateShaderModule(device->handle, &create, NULL, module),
                            source->name, error);
}

/* Compiles a kernel. The caller owns *out; `flags` go to vkCreateComputePipelines. */
static int pipeline_make(struct gpu_device *device, int kernel, VkPipelineCreateFlags flags,
                         VkPipeline *out, struct error *error) {
    const struct gpu_kernel *source = &device->kernels[kernel];
    VkShaderModule module;
    if (gpu_device_check(device, error) || module_create(device, source, &module, error))
        return -1;
    const struct gpu_device_info *info = &device->info;
    const uint32_t constants[CONSTANTS] = {
        info->subgroup_size, device->workgroup,       info->matrix_m,         info->matrix_n,
        info->matrix_k,      4 * info->subgroup_size, 8 * info->subgroup_size};
    VkSpecializationMapEntry entries[CONSTANTS];
    for (uint32_t i = 0; i < CONSTANTS; i++)
        entries[i] = (VkSpecializationMapEntry){.constantID = i, .offset = 4 * i, .size = 4};
    VkSpecializationInfo specialization = {
        .mapEntryCount = CONSTANTS,
        .pMapEntries = entries,
        .dataSize = sizeof constants,
        .pData = constants,
    };
    VkPipelineShaderStageRequiredSubgroupSizeCreateInfoEXT required = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO_EXT,
        .requiredSubgroupSize = device->info.subgroup_size,
    };
    VkComputePipelineCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
        .flags = flags,
        .stage =
            {
                .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
                .stage = VK_SHADER_STAGE_COMPUTE_BIT,
                .module = module,
                .pName = "main",
                .pSpecializationInfo = &specialization,
                .pNext = device->info.has_subgroup_control ? &required : NULL,
                .flags = device->info.has_subgroup_control
                             ? VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT_EXT
                             : 0,
            },
        .layout = device->layout,
    };
    VkResult result = device->vk.vkCreateComputePipelines(device->handle, device->cache, 1, &create,
                                                          NULL, out);
    device->vk.vkDestroyShaderModule(device->handle, module, NULL);
    if (gpu_result_check(device, result, source->name, error))
        return -1;
    gpu_name_set(device, VK_OBJECT_TYPE_PIPELINE, (uint64_t)*out, source->name);
    return 0;
}

int gpu_pipeline_get(struct gpu_device *device, int kernel, VkPipeline *out, struct error *error) {
    if (kernel < 0 || kernel >= device->n_kernels)
        return error_set(error, ERROR_VALUE, "no kernel %d", kernel);
    struct gpu_pipeline *pipeline = &device->pipelines[kernel];
    pthread_mutex_lock(&device->pipeline_lock);
    *out = pipeline->handle;
    pthread_mutex_unlock(&device->pipeline_lock);
    if (*out)
        return 0;
    VkPipeline made = VK_NULL_HANDLE;
    if (pipeline_make(device, kernel, 0, &made, error))
        return -1;
    pthread_mutex_lock(&device->pipeline_lock);
    if (pipeline->handle) { /* another thread was faster */
        device->vk.vkDestroyPipeline(device->handle, made, NULL);
    } else {
        pipeline->handle = made;
    }
    *out = pipeline->handle;
    pthread_mutex_unlock(&device->pipeline_lock);
    return 0;
}

/* Kernels that several threads compile; `lock` guards `next` and `error`. */
struct prepare {
    struct gpu_device *device;
    const int *kernels;
    int count, next;
    pthread_mutex_t lock;
    struct error error;
};

static void *prepare_run(void *argument) {
    struct prepare *work = argument;
    for (;;) {
        pthread_mutex_lock(&work->lock);
        int i = work->next++;
        pthread_mutex_unlock(&work->lock);
        if (i >= work->count)
            return NULL;
        VkPipeline pipeline;
        struct error error = {0};
        if (gpu_pipeline_get(work->device, work->kernels[i], &pipeline, &error)) {
            pthread_mutex_lock(&work->lock);
            work->error = error;
            pthread_mutex_unlock(&work->lock);
        }
    }
}

int gpu_pipelines_prepare(struct gpu_device *device, const int *kernels, int count,
                          struct error *error) {
    struct prepare work = {.device = device, .kernels = kernels, .count = count};
    pthread_t threads[16];
    int n_threads = 0;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    pthread_mutex_init(&work.lock, NULL);
    while (n_threads < 16 && n_threads < cores && n_threads < count &&
           pthread_create(&threads[n_threads], NULL, prepare_run, &work) == 0)
        n_threads++;
    if (n_threads == 0)
        prepare_run(&work); /* no thread could be started: compile in this one */
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&work.lock);
    if (work.error.kind == ERROR_NONE)
        return 0;
    if (error)
        *error = work.error;
    return -1;
}

int gpu_pipeline_describe(struct gpu_device *device, int kernel, char *out, size_t capacity,
                          struct error *error) {
    VkPipeline pipeline = VK_NULL_HANDLE;
    size_t used = 0;
    int failed = -1;
    if (capacity)
        out[0] = 0;
    if (!device->info.has_executable_info)
        return gpu_pipeline_get(device, kernel, &pipeline, error);
    /* A second pipeline is compiled for the statistics. Some drivers (RADV) bypass their caches
     * when statistics are captured, so the pipelines that run are compiled without. */
    if (pipeline_make(device, kernel, VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR, &pipeline,
                      error))
        return -1;
    VkPipelineInfoKHR info = {.sType = VK_STRUCTURE_TYPE_PIPELINE_INFO_KHR, .pipeline = pipeline};
    VkPipelineExecutablePropertiesKHR executables[8];
    uint32_t n = 8;
    memset(executables, 0, sizeof executables);
    for (int i = 0; i < 8; i++)
        executables[i].sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_PROPERTIES_KHR;
    if (gpu_result_check(
            device,
            device->vk.vkGetPipelineExecutablePropertiesKHR(device->handle, &info, &n, executables),
            "describing", error))
        goto done;
    for (uint32_t e = 0; e < n; e++) {
        VkPipelineExecutableInfoKHR which = {
            .sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR,
            .pipeline = pipeline,
            .executableIndex = e,
        };
        VkPipelineExecutableStatisticKHR statistics[64];
        uint32_t n_statistics = 64;
        memset(statistics, 0, sizeof statistics);
        for (int i = 0; i < 64; i++)
            statistics[i].sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR;
        if (device->vk.vkGetPipelineExecutableStatisticsKHR(device->handle, &which, &n_statistics,
                                                            statistics) < 0)
            continue;
        for (uint32_t i = 0; i < n_statistics && used + 300 < capacity; i++)
            used += (size_t)snprintf(out + used, capacity - used, "%s=%lld\n", statistics[i].name,
                                     statistics[i].format ==
                                             VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_FLOAT64_KHR
                                         ? (long long)statistics[i].value.f64
                                         : (long long)statistics[i].value.u64);
    }
    failed = 0;
done:
    device->vk.vkDestroyPipeline(device->handle, pipeline, NULL);
    return failed;
}
