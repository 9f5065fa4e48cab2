/* Attention in three steps. The pattern lies in memory between them, so that the pattern which is
 * captured, edited or frozen is the one that is used. In prefill the two products run on matrix
 * units where the kernel family uses them (shaders/attn_matrix.comp). */
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

/* Tiles and columns of a workgroup of attn_matrix.comp: four tiles of the matrix units a side. */
struct sides {
    uint32_t tiles, columns;
};

static struct sides sides_of(const struct ops *ops) {
    const struct gpu_device_info *info = gpu_device_get_info(ops->device);
    return (struct sides){4 * info->matrix_m / OP_TILE, 4 * info->matrix_n};
}

/* Bytes of shared memory that the kernel of the outputs takes, which needs more than that of the
 * scores. */
static uint32_t shared_bytes(const struct ops *ops) {
    struct sides sides = sides_of(ops);
    uint32_t rows = sides.tiles * OP_TILE, span = 8 * MATRIX_BLOCK;
    return 16 * (ops->fast ? 1 : 2) * (rows + sides.columns) * (MATRIX_BLOCK / 8 + 1) +
           4 * (5 * rows + 2 * span);
}

int op_attn_matrix_offered(const struct ops *ops, uint32_t d_head, int decode) {
    return ops->kernel_family == LINEAR_MATRIX && !decode && d_head % 4 == 0 &&
           shared_bytes(ops) <= gpu_device_get_info(ops->device)->max_shared_bytes &&
           gpu_pipeline_possible(ops->device, kernel_attn_scores_matrix(0));
}

void op_attn_kernels(const struct ops *ops, int *kernels) {
    uint32_t fast = ops->fast != 0;
    int units = op_attn_matrix_offered(ops, 4, 0);
    kernels[0] = units ? kernel_attn_scores_matrix(fast) : KERNEL_attn_scores;
    kernels[1] = units ? kernel_attn_output_matrix(fast) : KERNEL_attn_output;
}

/* One of both products on matrix units; x: workgroups along keys or columns. */
static int multiply(struct ops *ops, int kernel, const struct attn_matrix_params *params,
                    uint32_t columns, uint32_t n_keys, struct error *error) {
    struct sides sides = sides_of(ops);
    if ((params->a | params->b) % 16 || params->a_stride % 4)
        return error_set(error, ERROR_VALUE, "attention's rows do not begin at 16 bytes");
    return gpu_queue_dispatch(
        ops->queue, kernel, params, sizeof *params, (columns + sides.columns - 1) / sides.columns,
        (params->n_tiles + sides.tiles - 1) / sides.tiles, params->n_heads,
        2.0 * OP_TILE * params->n_tiles * n_keys * params->n_heads * params->d_head, error);
}

int op_attn_scores(struct ops *ops, const struct scores_params *params, uint32_t n_tiles,
                   uint32_t n_keys, struct error *error) {
    if (op_attn_matrix_offered(ops, params->d_head, params->decode != 0)) {
        struct attn_matrix_params product = {
            .a = params->qkv,
            .b = params->k_cache,
            .tokens = params->tokens,
            .tiles = params->tiles,
            .dst = params->scores,
            .n_tiles = n_tiles,
            .first_token = params->first_token,
            .n_heads = params->n_heads,
            .n_kv_heads = params->n_kv_heads,
            .d_head = params->d_head,
            .a_stride = params->stride,
            .dst_stride = params->key_stride,
            .scale = params->scale,
            .softcap = params->softcap,
        };
        return multiply(ops, kernel_attn_scores_matrix(ops->fast != 0), &product, n_keys, n_keys,
                        error);
    }
    return gpu_queue_dispatch(ops->queue, KERNEL_attn_scores, params, sizeof *params,
                              spans(ops, n_keys), n_tiles, params->n_heads,
                              2.0 * OP_TILE * n_tiles * n_keys * params->n_heads * params->d_head,
                              error);
}

int op_attn_output(struct ops *ops, const struct attn_output_params *params, uint32_t n_tiles,
                   uint32_t n_keys, struct error *error) {
    if (op_attn_matrix_offered(ops, params->d_head, params->decode != 0)) {
        struct attn_matrix_params product = {
            .a = params->pattern,
            .b = params->v_cache,
            .tokens = params->tokens,
            .tiles = params->tiles,
            .dst = params->z,
            .n_tiles = n_tiles,
            .first_token = params->first_token,
            .n_heads = params->n_heads,
            .n_kv_heads = params->n_kv_heads,
            .d_head = params->d_head,
            .a_stride = params->key_stride,
            .dst_stride = params->z_stride,
            .window = params->window,
        };
        return multiply(ops, kernel_attn_output_matrix(ops->fast != 0), &product, params->d_head,
                        n_keys, error);
    }
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
