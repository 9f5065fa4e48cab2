/* The one table of kernels, with the SPIR-V that the build embedded. */
#include <string.h>

#include "kernels_spirv.h"
#include "ops/ops.h"

#define ROW(name, params) \
    _Static_assert(sizeof(struct params) <= OP_PARAMS_MAX, "push constants of " #name); \
    _Static_assert(sizeof(struct params) % 4 == 0, "push constants of " #name);
KERNEL_ROWS(ROW)
#undef ROW

const struct gpu_kernel *op_kernels_get(void) {
    static struct gpu_kernel table[KERNEL_COUNT];
    static int filled;
    if (!filled) { /* callers hold the GIL */
#define ROW(name, params) \
    table[KERNEL_##name] = (struct gpu_kernel){#name, spirv_##name, spirv_##name##_size, \
                                               sizeof(struct params)};
        KERNEL_ROWS(ROW)
#undef ROW
        filled = 1;
    }
    return table;
}

int op_kernel_find(const char *name) {
    const struct gpu_kernel *table = op_kernels_get();
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (strcmp(table[i].name, name) == 0)
            return i;
    return -1;
}

int ops_create(struct ops *ops, struct gpu_device *device, struct error *error) {
    memset(ops, 0, sizeof *ops);
    ops->device = device;
    ops->subgroup = gpu_device_get_info(device)->subgroup_size;
    ops->workgroup = gpu_device_workgroup(device);
    ops->kernel_family = LINEAR_BROADCAST; /* until the device's own is chosen */
    return gpu_queue_create(&ops->queue, device, error);
}

void ops_destroy(struct ops *ops) {
    gpu_queue_destroy(ops->queue);
    ops->queue = NULL;
}
