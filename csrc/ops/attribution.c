/* The sums over tokens and steps of attribution. */
#include "ops/linear_matrix.h"

int op_head_inputs(struct ops *ops, const struct head_inputs_params *params,
                   uint32_t n_sample_tokens, struct error *error) {
    return gpu_queue_dispatch(ops->queue,
                              kernel_head_inputs((params->flags & HEAD_INPUTS_LAYER) != 0), params,
                              sizeof *params, n_sample_tokens, 1, 1,
                              8.0 * n_sample_tokens * params->n_sources *
                                  (params->width + params->n_inputs * params->d_head),
                              error);
}

int op_head_gradients(struct ops *ops, const struct head_gradients_params *params,
                      struct error *error) {
    return gpu_queue_dispatch(
        ops->queue, kernel_head_gradients((params->flags & HEAD_GRADIENTS_LAYER) != 0), params,
        sizeof *params, params->n_sample_tokens, (params->n_inputs + 7) / 8, 1,
        4.0 * params->n_sample_tokens * params->n_inputs * params->n_steps * params->width, error);
}

#define DOTS 8 /* rows of a and of b that a subgroup takes (R of the shader) */

int op_dots(struct ops *ops, const struct dots_params *params, struct error *error) {
    if (ops->kernel_family == LINEAR_MATRIX)
        return dots_matrix(ops, params, error);
    uint32_t columns = DOTS * (ops->workgroup / ops->subgroup);
    return gpu_queue_dispatch(ops->queue, KERNEL_dots, params, sizeof *params,
                              (params->n_a + DOTS - 1) / DOTS,
                              (params->n_b + columns - 1) / columns, 1,
                              2.0 * params->n_a * params->n_b * params->n_k, error);
}
