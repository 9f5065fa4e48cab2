/* The ops of circuits that have several kernels. */
#include "ops/ops.h"

int op_circuit_inputs(struct ops *ops, const struct circuit_inputs_params *params,
                      uint32_t n_entries, uint32_t n_refs, struct error *error) {
    int kernel = kernel_circuit_inputs(params->kind);
    if (kernel < 0)
        return error_set(error, ERROR_VALUE, "inputs of circuits have no norm %u", params->kind);
    return gpu_queue_dispatch(
        ops->queue, kernel, params, sizeof *params, params->n_tokens, n_entries, 1,
        (8.0 * n_entries + 4.0 * n_refs) * params->n_tokens * params->width, error);
}

int op_circuit_place(struct ops *ops, const struct circuit_place_params *params, uint32_t n_entries,
                     struct error *error) {
    int kernel = kernel_circuit_place((params->flags & PLACE_INTERLEAVED) != 0);
    return gpu_queue_dispatch(ops->queue, kernel, params, sizeof *params, params->n_tokens,
                              n_entries, 1, 12.0 * n_entries * params->n_tokens * params->d_head,
                              error);
}
