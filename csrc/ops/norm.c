/* RMS norm: one workgroup a row. */
#include "ops/ops.h"

int op_norm(struct ops *ops, const struct norm_params *params, uint32_t n_rows,
            struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_norm, params, sizeof *params, n_rows, 1, 1,
                              8.0 * n_rows * params->width, error);
}

int op_norm_bwd(struct ops *ops, const struct norm_bwd_params *params, uint32_t n_rows,
                struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_norm_bwd, params, sizeof *params, n_rows, 1, 1,
                              16.0 * n_rows * params->width, error);
}
