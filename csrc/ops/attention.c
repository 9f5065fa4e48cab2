/* Attention in three steps. The pattern lies in memory between them, so that the pattern which is
 * captured, edited or frozen is the one that is used. */
#include "ops/ops.h"

/* Workgroups that cover n keys or n columns of a head, two for each lane (RN of the shaders). */
static uint32_t spans(const struct ops *ops, uint32_t n) {
    return (n + 2 * ops->workgroup - 1) / (2 * ops->workgroup);
}

struct scores_params op_attn_scores_params(const struct decode_params *decode, uint64_t tiles) {
    return (struct scores_params){
        .qkv = decode->qkv,
        .k_cache = decode->k_cache,
        .tokens = decode->tokens,
        .tiles = tiles,
        .scores = decode->scores,
        .first_token = decode->first_token,
        .n_heads = decode->n_heads,
        .n_kv_heads = decode->n_kv_heads,
        .d_head = decode->d_head,
        .stride = decode->stride,
        .key_stride = decode->key_stride,
        .scale = decode->scale,
        .softcap = decode->softcap,
    };
}

struct softmax_params op_attn_softmax_params(const struct decode_params *decode) {
    return (struct softmax_params){
        .scores = decode->scores,
        .tokens = decode->tokens,
        .first_token = decode->first_token,
        .n_heads = decode->n_heads,
        .key_stride = decode->key_stride,
        .window = decode->window,
    };
}

struct attn_output_params op_attn_output_params(const struct decode_params *decode,
                                                uint64_t tiles) {
    return (struct attn_output_params){
        .pattern = decode->scores,
        .v_cache = decode->v_cache,
        .tokens = decode->tokens,
        .tiles = tiles,
        .z = decode->z,
        .first_token = decode->first_token,
        .n_heads = decode->n_heads,
        .n_kv_heads = decode->n_kv_heads,
        .d_head = decode->d_head,
        .z_stride = decode->z_stride,
        .key_stride = decode->key_stride,
        .window = decode->window,
    };
}

int op_attn_scores(struct ops *ops, const struct scores_params *params, uint32_t n_tiles,
                   uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_scores, params, sizeof *params,
                              spans(ops, n_keys), n_tiles, params->n_heads,
                              2.0 * OP_TILE * n_tiles * n_keys * params->n_heads * params->d_head,
                              error);
}

int op_attn_output(struct ops *ops, const struct attn_output_params *params, uint32_t n_tiles,
                   uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_output, params, sizeof *params,
                              spans(ops, params->d_head), n_tiles, params->n_heads,
                              2.0 * OP_TILE * n_tiles * n_keys * params->n_heads * params->d_head,
                              error);
}

int op_attn_softmax(struct ops *ops, const struct softmax_params *params, uint32_t n_tokens,
                    uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue, kernel_attn_softmax(params->decode != 0), params,
                              sizeof *params, n_tokens, params->n_heads, 1,
                              20.0 * n_tokens * n_keys * params->n_heads, error);
}

/* The kernel that takes the whole head group in one pass, or else the largest, in several passes.
 */
int op_attn_decode_kernel(uint32_t group) {
    static const uint32_t heads[] = KERNEL_attn_decode_HEADS;
    uint32_t most = heads[sizeof heads / sizeof heads[0] - 1];
    return kernel_attn_decode(group < most ? group : most);
}

int op_attn_decode(struct ops *ops, const struct decode_params *params, uint32_t n_tokens,
                   uint32_t n_keys, struct error *error) {
    return gpu_queue_dispatch(ops->queue,
                              op_attn_decode_kernel(params->n_heads / params->n_kv_heads), params,
                              sizeof *params, n_tokens, params->n_kv_heads, 1,
                              4.0 * n_tokens * n_keys * params->n_heads * params->d_head, error);
}

/* n_keys: the most keys of a row, which is also the most queries of one. */
int op_attn_output_bwd(struct ops *ops, const struct attn_output_bwd_params *params,
                       uint32_t n_tiles, uint32_t n_keys, struct error *error) {
    uint32_t columns = ATTN_OUTPUT_BWD_RN(ops->subgroup) * ops->workgroup;
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_output_bwd, params, sizeof *params,
                              (params->d_head + columns - 1) / columns, n_tiles, params->n_kv_heads,
                              2.0 * OP_TILE * n_tiles * n_keys * params->n_heads * params->d_head,
                              error);
}
