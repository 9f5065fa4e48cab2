/* Attention in three steps whose middle result, the pattern, lies in memory: what is captured,
 * edited or frozen is what is used. */
#include "ops/ops.h"

/* vectors of lanes along keys or head columns that a subgroup takes (RN of the shaders) */
#define COLUMNS 2

static uint32_t blocks(const struct ops *ops, uint32_t n) {
    return (n + COLUMNS * ops->workgroup - 1) / (COLUMNS * ops->workgroup);
}

int op_rope(struct ops *ops, const struct rope_params *params, uint32_t n_tokens,
            struct error *error) {
    return gpu_queue_dispatch(
        ops->queue, KERNEL_rope, params, sizeof *params, n_tokens, 1, 1,
        10.0 * n_tokens * params->d_head * (params->n_heads + 2 * params->n_kv_heads), error);
}

int op_attn_scores(struct ops *ops, const struct scores_params *params, uint32_t n_tiles,
                   uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_scores, params, sizeof *params,
                              blocks(ops, n_keys), n_tiles, params->n_heads,
                              2.0 * OP_TILE * n_tiles * n_keys * params->n_heads * params->d_head,
                              error);
}

int op_attn_softmax(struct ops *ops, const struct softmax_params *params, uint32_t n_tokens,
                    uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_softmax, params, sizeof *params, n_tokens,
                              params->n_heads, 1, 20.0 * n_tokens * n_keys * params->n_heads,
                              error);
}

int op_attn_output(struct ops *ops, const struct attn_output_params *params, uint32_t n_tiles,
                   uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_output, params, sizeof *params,
                              blocks(ops, params->d_head), n_tiles, params->n_heads,
                              2.0 * OP_TILE * n_tiles * n_keys * params->n_heads * params->d_head,
                              error);
}

/* The kernel that takes so many query heads at once, or four of them. */
int op_attn_decode_kernel(uint32_t group) {
    static const int kernels[] = {KERNEL_attn_decode_1, KERNEL_attn_decode_2, KERNEL_attn_decode_3,
                                  KERNEL_attn_decode_4};
    return kernels[group < 4 ? group - 1 : 3];
}

int op_attn_decode(struct ops *ops, const struct decode_params *params, uint32_t n_tokens,
                   uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue,
                              op_attn_decode_kernel(params->n_heads / params->n_kv_heads), params,
                              sizeof *params, n_tokens, params->n_kv_heads, 1,
                              4.0 * n_tokens * n_keys * params->n_heads * params->d_head, error);
}

int op_rope_bwd(struct ops *ops, const struct rope_bwd_params *params, uint32_t n_tokens,
                struct error *error) {
    return gpu_queue_dispatch(
        ops->queue, KERNEL_rope_bwd, params, sizeof *params, n_tokens, 1, 1,
        16.0 * n_tokens * params->d_head * (params->n_heads + params->n_kv_heads), error);
}

int op_attn_softmax_bwd(struct ops *ops, const struct softmax_bwd_params *params, uint32_t n_tokens,
                        uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_softmax_bwd, params, sizeof *params, n_tokens,
                              params->n_heads, 1, 10.0 * n_tokens * n_keys * params->n_heads,
                              error);
}

/* n_keys: the most keys of a row, hence the most queries of one. */
int op_attn_output_bwd(struct ops *ops, const struct attn_output_bwd_params *params,
                       uint32_t n_tiles, uint32_t n_keys, struct error *error) {
    /* RN of the shader */
    uint32_t columns = (ops->subgroup <= 16 ? 4 : ops->subgroup == 32 ? 2 : 1) * ops->workgroup;
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_output_bwd, params, sizeof *params,
                              (params->d_head + columns - 1) / columns, n_tiles, params->n_kv_heads,
                              2.0 * OP_TILE * n_tiles * n_keys * params->n_heads * params->d_head,
                              error);
}
