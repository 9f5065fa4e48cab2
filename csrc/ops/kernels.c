/* The one table of kernels, with the SPIR-V that the build embedded. */
#include <stddef.h>
#include <string.h>

#include "kernels_spirv.h"
#include "ops/ops.h"

#define ROW(name, params) \
    _Static_assert(sizeof(struct params) <= OP_PARAMS_MAX, "push constants of " #name); \
    _Static_assert(sizeof(struct params) % 4 == 0, "push constants of " #name);
KERNEL_ROWS(ROW)
#undef ROW

/* Addresses come first, so that address i lies at byte 8 i. */
#define CHECK(params, field, i) \
    _Static_assert(offsetof(struct params, field) == 8 * i, #params "." #field);
#define ROW(name, params) ADDRESSES_##params(CHECK)
KERNEL_ROWS(ROW)
#undef ROW
#undef CHECK

/* --- bytes that a dispatch moves: the rows BYTES of the table --- */
#define FLOATS(n) (4.0 * (n))
#define TOKENS(n) ((double)sizeof(struct token_meta) * (n))
#define WEIGHTS(n, cells) (16.0 * (((n) + OP_PANEL - 1) / OP_PANEL * OP_PANEL) * (cells))
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
/* inputs of a product, the keys of a tile: sizes that are no argument, from the operations */
#define INPUTS(rows, outputs) (flops / (2.0 * (rows) * (outputs)))
/* rows of W that a product of decoding takes */
#define DECODE_ROWS ((p->flags & LINEAR_GATE ? 2 : 1) * p->n_out)
#define TILE_KEYS (flops / (2.0 * OP_TILE * y * p->n_heads * p->d_head))
#define MATRIX_KEYS (flops / (2.0 * OP_TILE * p->n_tiles * p->n_heads * p->d_head))
#define BYTES(params, reads, writes) \
    static void bytes_##params(const void *arguments, const uint32_t grid[3], double flops, \
                               double *read, double *written) { \
        const struct params *p = arguments; \
        const double x = grid[0], y = grid[1], z = grid[2]; \
        (void)p, (void)x, (void)y, (void)z, (void)flops; \
        *read = (reads); \
        *written = (writes); \
    }
#include "ops/kernels.def"

const struct gpu_kernel *op_kernels_get(void) {
    static struct gpu_kernel table[KERNEL_COUNT];
    static int filled;
    if (!filled) { /* callers hold the GIL */
#define ADDRESS_NAME(params, field, i) #field,
#define ROW(kernel, params) \
    table[KERNEL_##kernel] = (struct gpu_kernel){ \
        .name = #kernel, \
        .spirv = spirv_##kernel, \
        .spirv_bytes = spirv_##kernel##_size, \
        .params_bytes = sizeof(struct params), \
        .addresses = {ADDRESSES_##params(ADDRESS_NAME)}, \
        .written = WRITTEN_##params, \
        .bytes = bytes_##params, \
    };
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
    ops->large_from = OP_LARGE_COLUMNS;
    ops->kernel_family = LINEAR_BROADCAST; /* until the device's own is chosen */
    return gpu_queue_create(&ops->queue, device, error);
}

void ops_destroy(struct ops *ops) {
    gpu_queue_destroy(ops->queue);
    while (ops->scratch.n)
        gpu_buffer_destroy(ops->scratch.buffers[--ops->scratch.n]);
    ops->queue = NULL;
}
