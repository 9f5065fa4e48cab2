/* What circuits are run with: inputs assembled from kept edges, single heads placed and gathered,
 * differences from the base run, metrics of logits. */
#include "ops/ops.h"

int op_circuit_inputs(struct ops *ops, const struct circuit_inputs_params *params,
                      uint32_t n_entries, uint32_t n_refs, struct error *error) {
    return gpu_queue_dispatch(
        ops->queue, KERNEL_circuit_inputs, params, sizeof *params, params->n_tokens, n_entries, 1,
        (8.0 * n_entries + 4.0 * n_refs) * params->n_tokens * params->width, error);
}

int op_circuit_place(struct ops *ops, const struct circuit_place_params *params, uint32_t n_entries,
                     struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_circuit_place, params, sizeof *params,
                              params->n_tokens, n_entries, 1,
                              12.0 * n_entries * params->n_tokens * params->d_head, error);
}

int op_circuit_heads(struct ops *ops, const struct circuit_heads_params *params, uint32_t n_entries,
                     struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_circuit_heads, params, sizeof *params,
                              params->n_tokens, n_entries, 1,
                              6.0 * n_entries * params->n_tokens * params->d_head, error);
}

int op_circuit_outputs(struct ops *ops, const struct circuit_outputs_params *params,
                       uint32_t n_rows, struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_circuit_outputs, params, sizeof *params, n_rows, 1,
                              1, 8.0 * n_rows * params->width, error);
}

int op_pair_logits(struct ops *ops, const struct pair_logits_params *params, uint32_t n_entries,
                   struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_pair_logits, params, sizeof *params, params->n,
                              n_entries, 1, 6.0 * n_entries * params->n * params->width, error);
}

int op_logit_metrics(struct ops *ops, const struct logit_metrics_params *params, uint32_t n_rows,
                     struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_logit_metrics, params, sizeof *params, n_rows, 1,
                              1, 200.0 * n_rows * params->width, error);
}
