/* Turns results of Vulkan calls into errors, names Vulkan objects for debuggers, and checks that a
 * device may still be used. */
#include <unistd.h>

#include "gpu/internal.h"

int gpu_result_check(struct gpu_device *device, VkResult result, const char *what,
                     struct error *error) {
    switch (result) {
    case VK_SUCCESS: return 0;
    case VK_ERROR_DEVICE_LOST:
        /* Buffers may be freed next, so the device must be idle. Vulkan promises that this call
         * returns in finite time on a lost device. */
        if (!device->lost && device->used)
            device->vk.vkDeviceWaitIdle(device->handle);
        device->lost = 1;
        return error_set(error, ERROR_DEVICE,
                         "the device was lost during %s (a driver reset or a watchdog): close the "
                         "model and load it again",
                         what);
    case VK_ERROR_OUT_OF_DEVICE_MEMORY:
    case VK_ERROR_OUT_OF_HOST_MEMORY:
        return error_set(error, ERROR_DEVICE,
                         "out of %s memory during %s: use a smaller batch, shorter prompts or "
                         "fewer captured sites",
                         result == VK_ERROR_OUT_OF_DEVICE_MEMORY ? "device" : "host", what);
    default:
        return error_set(error, ERROR_DEVICE, "%s failed with Vulkan error %d on %s", what,
                         (int)result, device->info.name);
    }
}

void gpu_name_set(struct gpu_device *device, VkObjectType type, uint64_t handle, const char *name) {
    if (!device->set_name || !name)
        return;
    VkDebugUtilsObjectNameInfoEXT info = {
        .sType = VK_STRUCTURE_TYPE_DEBUG_UTILS_OBJECT_NAME_INFO_EXT,
        .objectType = type,
        .objectHandle = handle,
        .pObjectName = name,
    };
    device->set_name(device->handle, &info);
}

int gpu_device_check(const struct gpu_device *device, struct error *error) {
    if (device->owner != getpid())
        return error_set(error, ERROR_DEVICE,
                         "this device was opened before fork(): open it in the child, or use "
                         "multiprocessing's \"spawn\"");
    if (device->lost)
        return error_set(error, ERROR_DEVICE,
                         "the device was lost earlier: close the model and load it again");
    return 0;
}
