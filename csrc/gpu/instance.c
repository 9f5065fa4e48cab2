/* The Vulkan loader and the one instance of this process. It is made at first use and never
 * destroyed: library destructors must not call drivers, and an instance holds no device memory. */
#include <string.h>
#include <stdlib.h>
#include <unistd.h>

#include "gpu/internal.h"

static pthread_mutex_t instance_lock = PTHREAD_MUTEX_INITIALIZER;
static VkInstance instance;
static _Atomic pid_t instance_owner; /* 0: not made yet */
static int debug_names;

static int extension_offered(const char *name) {
    uint32_t count = 0;
    if (vkEnumerateInstanceExtensionProperties(NULL, &count, NULL) != VK_SUCCESS || count == 0)
        return 0;
    VkExtensionProperties *list = calloc(count, sizeof *list);
    int found = 0;
    if (list && vkEnumerateInstanceExtensionProperties(NULL, &count, list) >= 0)
        for (uint32_t i = 0; i < count && !found; i++)
            found = strcmp(list[i].extensionName, name) == 0;
    free(list);
    return found;
}

static VkInstance instance_create(struct error *error) {
    if (volkInitialize() != VK_SUCCESS) {
        error_set(error, ERROR_DEVICE,
                  "no Vulkan loader (libvulkan.so.1) on this machine: install it together with a "
                  "driver (Debian/Ubuntu: apt install libvulkan1 mesa-vulkan-drivers; NVIDIA: the "
                  "proprietary driver)");
        return VK_NULL_HANDLE;
    }
    const char *extensions[1];
    uint32_t n_extensions = 0;
    debug_names = extension_offered(VK_EXT_DEBUG_UTILS_EXTENSION_NAME);
    if (debug_names)
        extensions[n_extensions++] = VK_EXT_DEBUG_UTILS_EXTENSION_NAME;
    VkApplicationInfo application = {
        .sType = VK_STRUCTURE_TYPE_APPLICATION_INFO,
        .pApplicationName = "vksteer",
        .pEngineName = "vksteer",
        .apiVersion = VK_API_VERSION_1_2,
    };
    VkInstanceCreateInfo create = {
        .sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO,
        .pApplicationInfo = &application,
        .enabledExtensionCount = n_extensions,
        .ppEnabledExtensionNames = extensions,
    };
    VkInstance made = VK_NULL_HANDLE;
    VkResult result = vkCreateInstance(&create, NULL, &made);
    if (result != VK_SUCCESS) {
        error_set(error, ERROR_DEVICE,
                  "no Vulkan driver answered (vkCreateInstance: %d): install one (Debian/Ubuntu: "
                  "apt install mesa-vulkan-drivers; NVIDIA: the proprietary driver) or point "
                  "VK_DRIVER_FILES at its ICD file",
                  (int)result);
        return VK_NULL_HANDLE;
    }
    volkLoadInstanceOnly(made);
    return made;
}

VkInstance gpu_instance_get(struct error *error) {
    /* Checked before the lock is taken: in a forked child the thread that held it may not exist. */
    if (instance_owner != 0 && instance_owner != getpid()) {
        error_set(error, ERROR_DEVICE,
                  "Vulkan was opened by this process's parent before fork(): open devices after "
                  "the fork, or start workers with multiprocessing's \"spawn\" method");
        return VK_NULL_HANDLE;
    }
    pthread_mutex_lock(&instance_lock);
    if (instance == VK_NULL_HANDLE) {
        instance_owner = getpid();
        instance = instance_create(error);
        if (instance == VK_NULL_HANDLE)
            instance_owner = 0;
    }
    VkInstance result = instance;
    pthread_mutex_unlock(&instance_lock);
    return result;
}

int gpu_instance_has_debug_names(void) { return debug_names; }
