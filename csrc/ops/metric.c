/* Scalars of the final logits and their gradients: one workgroup a row. */
#include "ops/ops.h"

int op_pair_grad(struct ops *ops, const struct pair_grad_params *params, uint32_t n_rows,
                 struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_pair_grad, params, sizeof *params, n_rows, 1, 1,
                              8.0 * n_rows * params->width, error);
}

int op_logit_grad(struct ops *ops, const struct logit_grad_params *params, uint32_t n_rows,
                  struct error *error) {
    return gpu_queue_dispatch(
        ops->queue, KERNEL_logit_grad, params, sizeof *params, n_rows, 1, 1,
        (params->kind == LOGIT_GRAD_LOG_PROB ? 60.0 : 150.0) * n_rows * params->width, error);
}
