/* The ops that kernels.def describes completely: one dispatch of one kernel each. */
#include "ops/ops.h"

#define NONE
#define ONE(size) , uint32_t size
#define TWO(first, second) , uint32_t first, uint32_t second
#define OP(name, params, ...)
#define OP_GRID(name, params, sizes, x, y, z, flops) \
    int op_##name(struct ops *ops, const struct params *p sizes, struct error *error) { \
        return gpu_queue_dispatch(ops->queue, KERNEL_##name, p, sizeof *p, x, y, z, flops, error); \
    }
#include "ops/kernels.def"
