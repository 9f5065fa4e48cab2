/* A libvulkan.so.1 whose functions fail on demand: the real loader, of which some functions are
 * wrapped. The tests that use it build it.
 *
 * fault_arm("vkQueueSubmit", n, result, stays): the n-th call from now on (1 is the next) is not
 * made and returns `result`. With `stays`, every later call of any wrapped function fails in the
 * same way. fault_pending(): whether that call is still to come. fault_count(): wrapped calls so
 * far. The variable REAL_VULKAN is the path of the real loader. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* All wrapped functions return VkResult and take at most six integers or pointers. On x86-64 and
 * arm64 one function type can call them all. */
typedef int (*call)(void *, void *, void *, void *, void *, void *);
typedef void *(*get)(void *, const char *);

#define WRAPPED(X) \
    X(vkAllocateMemory) \
    X(vkCreateBuffer) \
    X(vkBindBufferMemory) \
    X(vkMapMemory) \
    X(vkCreateSemaphore) \
    X(vkCreateCommandPool) \
    X(vkAllocateCommandBuffers) \
    X(vkResetCommandPool) \
    X(vkBeginCommandBuffer) \
    X(vkEndCommandBuffer) \
    X(vkQueueSubmit) \
    X(vkWaitSemaphores) \
    X(vkCreateShaderModule) \
    X(vkCreateComputePipelines) \
    X(vkCreatePipelineLayout) \
    X(vkCreatePipelineCache) \
    X(vkCreateBufferView) \
    X(vkCreateDescriptorPool) \
    X(vkAllocateDescriptorSets)

static const char *armed;
static int countdown, result, lost, failing;
static long count;

static int fault(const char *name) {
    count++;
    if (failing)
        return 1;
    if (!armed || strcmp(name, armed) != 0 || --countdown > 0)
        return 0;
    armed = NULL;
    failing = lost;
    return 1;
}

#define WRAPPER(name) \
    static call real_##name; \
    static int wrap_##name(void *a, void *b, void *c, void *d, void *e, void *f) { \
        return fault(#name) ? result : real_##name(a, b, c, d, e, f); \
    }
WRAPPED(WRAPPER)

__attribute__((visibility("default"))) int fault_arm(const char *name, int n, int r, int stays) {
#define NAMED(f) \
    if (strcmp(name, #f) == 0) \
        armed = #f;
    armed = NULL;
    WRAPPED(NAMED)
    countdown = n;
    result = r;
    lost = stays;
    failing = 0;
    return armed != NULL;
}

__attribute__((visibility("default"))) int fault_pending(void) { return armed != NULL; }

__attribute__((visibility("default"))) long fault_count(void) { return count; }

static void *loader(const char *name) {
    static void *real;
    if (!real)
        real = dlopen(getenv("REAL_VULKAN"), RTLD_NOW | RTLD_LOCAL);
    return real ? dlsym(real, name) : NULL;
}

static void *device_get(void *device, const char *name) {
    static get real;
    if (!real)
        real = (get)loader("vkGetDeviceProcAddr");
    void *found = real(device, name);
#define LOOKED_UP(f) \
    if (strcmp(name, #f) == 0 && found) { \
        real_##f = (call)found; \
        return (void *)wrap_##f; \
    }
    WRAPPED(LOOKED_UP)
    return found;
}

__attribute__((visibility("default"))) void *vkGetInstanceProcAddr(void *instance,
                                                                   const char *name) {
    if (strcmp(name, "vkGetDeviceProcAddr") == 0)
        return (void *)device_get;
    get real = (get)loader("vkGetInstanceProcAddr");
    return real ? real(instance, name) : NULL;
}
