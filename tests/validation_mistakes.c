/* A program with two known mistakes, for test_validation.py: a missing barrier between two writes
 * and a fill of a size that is no multiple of four. */
#include <vulkan/vulkan.h>
int main(void) {
    VkApplicationInfo application = {.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO,
                                     .apiVersion = VK_API_VERSION_1_2};
    VkInstanceCreateInfo instance_info = {.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO,
                                          .pApplicationInfo = &application};
    VkInstance instance;
    VkPhysicalDevice physical;
    VkDevice device;
    VkBuffer buffer;
    VkDeviceMemory memory;
    VkCommandPool pool;
    VkCommandBuffer commands;
    uint32_t one = 1, type = 0;
    float priority = 1;
    if (vkCreateInstance(&instance_info, NULL, &instance) ||
        vkEnumeratePhysicalDevices(instance, &one, &physical) < 0)
        return 3;
    VkDeviceQueueCreateInfo queue = {.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO,
                                     .queueCount = 1,
                                     .pQueuePriorities = &priority};
    VkDeviceCreateInfo device_info = {.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
                                      .queueCreateInfoCount = 1,
                                      .pQueueCreateInfos = &queue};
    VkBufferCreateInfo buffer_info = {.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO,
                                      .size = 256,
                                      .usage = VK_BUFFER_USAGE_TRANSFER_DST_BIT};
    if (vkCreateDevice(physical, &device_info, NULL, &device) ||
        vkCreateBuffer(device, &buffer_info, NULL, &buffer))
        return 4;
    VkMemoryRequirements needs;
    vkGetBufferMemoryRequirements(device, buffer, &needs);
    while (!(needs.memoryTypeBits >> type & 1))
        type++;
    VkMemoryAllocateInfo memory_info = {.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
                                        .allocationSize = needs.size,
                                        .memoryTypeIndex = type};
    VkCommandPoolCreateInfo pool_info = {.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO};
    if (vkAllocateMemory(device, &memory_info, NULL, &memory) ||
        vkBindBufferMemory(device, buffer, memory, 0) ||
        vkCreateCommandPool(device, &pool_info, NULL, &pool))
        return 5;
    VkCommandBufferAllocateInfo allocate = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
                                            .commandPool = pool,
                                            .commandBufferCount = 1};
    VkCommandBufferBeginInfo begin = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO};
    if (vkAllocateCommandBuffers(device, &allocate, &commands) ||
        vkBeginCommandBuffer(commands, &begin))
        return 6;
    vkCmdFillBuffer(commands, buffer, 0, 256, 1);
    vkCmdFillBuffer(commands, buffer, 0, 256, 2); /* no barrier between: a hazard */
    vkCmdFillBuffer(commands, buffer, 0, 254, 2); /* not a multiple of four: invalid */
    vkEndCommandBuffer(commands);
    return 0;
}
