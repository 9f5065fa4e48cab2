/* Products on matrix units, for linear.c and attribution.c. */
#ifndef VKSTEER_LINEAR_MATRIX_H
#define VKSTEER_LINEAR_MATRIX_H

#include "ops/ops.h"

/* op_linear over n_inputs inputs, whose arguments are checked. */
int linear_matrix(struct ops *ops, const struct op_matrix *matrix,
                  const struct op_linear_args *args, uint32_t n_inputs, struct error *error);
/* op_linear_bwd over n_sum rows of the matrix and n_k inputs, whose arguments are checked. */
int linear_bwd_matrix(struct ops *ops, const struct op_matrix *matrix,
                      const struct op_linear_bwd_args *args, uint32_t n_sum, uint32_t n_k,
                      struct error *error);
int dots_matrix(struct ops *ops, const struct dots_params *params, struct error *error);

/* Rows of x that one dispatch may take, a multiple of `tile_rows`, so that a large product becomes
 * several dispatches of bounded time. Rows are independent, so the results are bit-identical. */
static inline uint32_t linear_rows_at_once(const struct ops *ops, uint32_t tile_rows,
                                           uint32_t n_out, uint32_t n_inputs) {
    double rows = gpu_queue_flops_bound(ops->queue) / (2.0 * n_out * n_inputs);
    if (rows >= 65536.0 * tile_rows)
        return 65535 * tile_rows;
    uint32_t groups = (uint32_t)(rows / tile_rows);
    return (groups ? groups : 1) * tile_rows;
}

/* The kernels of products on matrix units with weights of one type, for both tile sizes; returns
 * their number, at most 8. */
int linear_matrix_kernels(const struct ops *ops, uint32_t type, int backward, int *kernels);

#endif
