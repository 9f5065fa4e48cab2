/* Texel buffers: views of parts of buffers as arrays of 16-byte texels. A view is made at its first
 * use and destroyed with its buffer. */
#include <stdlib.h>

#include "gpu/internal.h"

#define SETS_A_POOL 256

int gpu_texels_layout_create(struct gpu_device *device, struct error *error) {
    VkDescriptorSetLayoutBinding binding = {
        .descriptorType = VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER,
        .descriptorCount = 1,
        .stageFlags = VK_SHADER_STAGE_COMPUTE_BIT,
    };
    VkDescriptorSetLayoutCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO,
        .bindingCount = 1,
        .pBindings = &binding,
    };
    return gpu_result_check(
        device,
        device->vk.vkCreateDescriptorSetLayout(device->handle, &create, NULL, &device->set_layout),
        "creating a descriptor layout", error);
}

void gpu_texels_layout_destroy(struct gpu_device *device) {
    for (uint32_t i = 0; i < device->n_texel_pools; i++)
        device->vk.vkDestroyDescriptorPool(device->handle, device->texel_pools[i].pool, NULL);
    free(device->texel_pools);
    if (device->set_layout)
        device->vk.vkDestroyDescriptorSetLayout(device->handle, device->set_layout, NULL);
}

/* The index of the first descriptor pool with a free set; a new pool if all are full. */
static int pool_find(struct gpu_device *device, uint32_t *index, struct error *error) {
    for (uint32_t i = 0; i < device->n_texel_pools; i++)
        if (device->texel_pools[i].used < SETS_A_POOL) {
            *index = i;
            return 0;
        }
    void *grown = realloc(device->texel_pools,
                          (device->n_texel_pools + 1) * sizeof *device->texel_pools);
    if (!grown)
        return error_set(error, ERROR_MEMORY, "out of memory for descriptors");
    device->texel_pools = grown;
    VkDescriptorPoolSize size = {
        .type = VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER,
        .descriptorCount = SETS_A_POOL,
    };
    VkDescriptorPoolCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO,
        .maxSets = SETS_A_POOL,
        .poolSizeCount = 1,
        .pPoolSizes = &size,
        .flags = VK_DESCRIPTOR_POOL_CREATE_FREE_DESCRIPTOR_SET_BIT,
    };
    *index = device->n_texel_pools;
    device->texel_pools[*index].used = 0;
    if (gpu_result_check(device,
                         device->vk.vkCreateDescriptorPool(device->handle, &create, NULL,
                                                           &device->texel_pools[*index].pool),
                         "creating a descriptor pool", error))
        return -1;
    device->n_texel_pools++;
    return 0;
}

static void view_destroy(struct gpu_device *device, struct gpu_texels *texels) {
    if (texels->set) {
        device->vk.vkFreeDescriptorSets(device->handle, texels->pool, 1, &texels->set);
        for (uint32_t i = 0; i < device->n_texel_pools; i++)
            device->texel_pools[i].used -= device->texel_pools[i].pool == texels->pool;
    }
    if (texels->view)
        device->vk.vkDestroyBufferView(device->handle, texels->view, NULL);
    free(texels);
}

static int view_create(struct gpu_buffer *buffer, uint64_t address, uint64_t bytes,
                       struct gpu_texels **out, struct error *error) {
    struct gpu_device *device = buffer->device;
    uint32_t pool = 0;
    struct gpu_texels *texels = calloc(1, sizeof *texels);
    if (!texels)
        return error_set(error, ERROR_MEMORY, "out of memory for a texel buffer");
    texels->address = address;
    texels->bytes = bytes;
    VkBufferViewCreateInfo view = {
        .sType = VK_STRUCTURE_TYPE_BUFFER_VIEW_CREATE_INFO,
        .buffer = buffer->handle,
        .format = VK_FORMAT_R32G32B32A32_UINT,
        .offset = address - buffer->address,
        .range = bytes,
    };
    if (gpu_result_check(device,
                         device->vk.vkCreateBufferView(device->handle, &view, NULL, &texels->view),
                         "creating a texel buffer", error) ||
        pool_find(device, &pool, error))
        goto fail;
    VkDescriptorSetAllocateInfo allocate = {
        .sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO,
        .descriptorSetCount = 1,
        .descriptorPool = device->texel_pools[pool].pool,
        .pSetLayouts = &device->set_layout,
    };
    if (gpu_result_check(
            device, device->vk.vkAllocateDescriptorSets(device->handle, &allocate, &texels->set),
            "allocating a descriptor", error))
        goto fail;
    texels->pool = device->texel_pools[pool].pool;
    device->texel_pools[pool].used++;
    VkWriteDescriptorSet write = {
        .sType = VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET,
        .dstSet = texels->set,
        .descriptorCount = 1,
        .descriptorType = VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER,
        .pTexelBufferView = &texels->view,
    };
    device->vk.vkUpdateDescriptorSets(device->handle, 1, &write, 0, NULL);
    *out = texels;
    return 0;
fail:
    view_destroy(device, texels);
    return -1;
}

int gpu_texels_get(struct gpu_device *device, uint64_t address, uint64_t bytes,
                   VkDescriptorSet *set, struct error *error) {
    struct gpu_buffer *buffer = gpu_buffer_at(device, address);
    if (gpu_device_check(device, error))
        return -1;
    if (!buffer || bytes > buffer->bytes - (address - buffer->address) || bytes % 16 ||
        bytes / 16 > device->info.max_texels ||
        (address - buffer->address) % device->texel_alignment)
        return error_set(error, ERROR_DEVICE,
                         "no texel buffer of %.1f MB can begin at this address", bytes / 1e6);
    for (struct gpu_texels *texels = buffer->texels; texels; texels = texels->next)
        if (texels->address == address && texels->bytes == bytes) {
            *set = texels->set;
            return 0;
        }
    struct gpu_texels *made = NULL;
    if (view_create(buffer, address, bytes, &made, error))
        return -1;
    made->next = buffer->texels;
    buffer->texels = made;
    *set = made->set;
    return 0;
}

void gpu_texels_destroy(struct gpu_buffer *buffer) {
    while (buffer->texels) {
        struct gpu_texels *next = buffer->texels->next;
        view_destroy(buffer->device, buffer->texels);
        buffer->texels = next;
    }
}
