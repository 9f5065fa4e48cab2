/* Buffers. Each has its own memory allocation, because the engine makes few and large ones, and a
 * device address. */
#include <stdlib.h>
#include <unistd.h>

#include "gpu/internal.h"

/* A memory type of the bit set `allowed` that has all flags of `required` and, if one exists, those
 * of `preferred`; UINT32_MAX if there is none. */
static uint32_t memory_type_find(const struct gpu_device *device, uint32_t allowed,
                                 VkMemoryPropertyFlags required, VkMemoryPropertyFlags preferred) {
    uint32_t found = UINT32_MAX;
    for (uint32_t i = 0; i < device->memory.memoryTypeCount; i++) {
        VkMemoryPropertyFlags flags = device->memory.memoryTypes[i].propertyFlags;
        if (!(allowed & (1u << i)) || (flags & required) != required)
            continue;
        if ((flags & preferred) == preferred)
            return i;
        if (found == UINT32_MAX)
            found = i;
    }
    return found;
}

/* Allocates and binds the buffer's memory, and maps it unless it is device-local. What was made
 * before a failure is freed by gpu_buffer_destroy. */
static int memory_allocate(struct gpu_buffer *buffer, enum gpu_memory kind, const char *name,
                           struct error *error) {
    struct gpu_device *device = buffer->device;
    VkMemoryRequirements needs;
    device->vk.vkGetBufferMemoryRequirements(device->handle, buffer->handle, &needs);
    VkMemoryPropertyFlags required = kind == GPU_DEVICE_LOCAL
                                         ? VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
                                         : VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT |
                                               VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
    uint32_t type = memory_type_find(device, needs.memoryTypeBits, required,
                                     kind == GPU_READBACK ? VK_MEMORY_PROPERTY_HOST_CACHED_BIT : 0);
    if (type == UINT32_MAX)
        return error_set(error, ERROR_DEVICE, "%s has no memory type for %s", device->info.name,
                         name);
    VkMemoryAllocateFlagsInfo flags = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO,
        .flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT,
    };
    VkMemoryAllocateInfo allocate = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
        .pNext = &flags,
        .allocationSize = needs.size,
        .memoryTypeIndex = type,
    };
    int over = device->limit && device->allocated + needs.size > device->limit;
    VkResult result = over ? VK_ERROR_OUT_OF_DEVICE_MEMORY
                           : device->vk.vkAllocateMemory(device->handle, &allocate, NULL,
                                                         &buffer->memory);
    if (result == VK_ERROR_OUT_OF_DEVICE_MEMORY || result == VK_ERROR_OUT_OF_HOST_MEMORY)
        return error_set(error, ERROR_DEVICE,
                         "out of device memory: %s needs %.1f MB, %.1f MB are held already on %s; "
                         "use a smaller batch, shorter prompts, fewer captures or a smaller dtype",
                         name, needs.size / 1e6, device->allocated / 1e6, device->info.name);
    if (gpu_result_check(device, result, "allocating memory", error))
        return -1;
    buffer->allocated = needs.size;
    device->allocated += needs.size;
    if (device->allocated > device->peak)
        device->peak = device->allocated;
    if (gpu_result_check(
            device,
            device->vk.vkBindBufferMemory(device->handle, buffer->handle, buffer->memory, 0),
            "binding memory", error))
        return -1;
    if (device->memory.memoryTypes[type].propertyFlags & VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT &&
        kind != GPU_DEVICE_LOCAL)
        return gpu_result_check(device,
                                device->vk.vkMapMemory(device->handle, buffer->memory, 0,
                                                       VK_WHOLE_SIZE, 0, &buffer->map),
                                "mapping memory", error);
    return 0;
}

int gpu_buffer_create(struct gpu_buffer **out, struct gpu_device *device, uint64_t bytes,
                      enum gpu_memory kind, const char *name, struct error *error) {
    *out = NULL;
    if (gpu_device_check(device, error))
        return -1;
    if (bytes == 0 || bytes > GPU_BUFFER_MAX)
        return error_set(error, ERROR_DEVICE,
                         "%s needs %.1f MB in one buffer; a buffer holds 1 byte to %.0f MB: use a "
                         "smaller batch or shorter prompts",
                         name, bytes / 1e6, GPU_BUFFER_MAX / 1e6);
    struct gpu_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer)
        return error_set(error, ERROR_MEMORY, "out of memory for a buffer");
    buffer->device = device;
    buffer->bytes = (bytes + 15) & ~UINT64_C(15);
    VkBufferCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO,
        .size = buffer->bytes,
        .sharingMode = VK_SHARING_MODE_EXCLUSIVE,
        .usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT |
                 VK_BUFFER_USAGE_UNIFORM_TEXEL_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT |
                 VK_BUFFER_USAGE_TRANSFER_DST_BIT,
    };
    if (gpu_result_check(device,
                         device->vk.vkCreateBuffer(device->handle, &create, NULL, &buffer->handle),
                         "creating a buffer", error) ||
        memory_allocate(buffer, kind, name, error))
        goto fail;
    gpu_name_set(device, VK_OBJECT_TYPE_BUFFER, (uint64_t)buffer->handle, name);
    VkBufferDeviceAddressInfo info = {
        .sType = VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO,
        .buffer = buffer->handle,
    };
    buffer->address = device->vk.vkGetBufferDeviceAddress(device->handle, &info);
    if (gpu_buffer_register(buffer, error))
        goto fail;
    *out = buffer;
    return 0;
fail:
    gpu_buffer_destroy(buffer);
    return -1;
}

void gpu_buffer_destroy(struct gpu_buffer *buffer) {
    if (!buffer)
        return;
    struct gpu_device *device = buffer->device;
    gpu_buffer_unregister(buffer);
    if (device->owner == getpid()) {
        gpu_texels_destroy(buffer);
        if (buffer->handle)
            device->vk.vkDestroyBuffer(device->handle, buffer->handle, NULL);
        if (buffer->memory)
            device->vk.vkFreeMemory(device->handle, buffer->memory, NULL);
        device->allocated -= buffer->allocated;
    }
    free(buffer);
}

uint64_t gpu_buffer_address(const struct gpu_buffer *buffer) { return buffer->address; }

uint64_t gpu_buffer_size(const struct gpu_buffer *buffer) { return buffer->bytes; }

void *gpu_buffer_map(struct gpu_buffer *buffer) { return buffer->map; }
