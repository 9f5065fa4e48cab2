/* Embedding, norms, activation, copies: one workgroup for each row, or several (activation on GPUs,
 * a norm of parts of a row). */
#include "ops/ops.h"

int op_embed(struct ops *ops, const struct op_matrix *embedding, const struct op_embed_args *args,
             struct error *error) {
    if (args->add && !args->positions)
        return error_set(error, ERROR_VALUE, "only rows of positions are added to others");
    if (args->picked && (args->positions || args->share == 0))
        return error_set(error, ERROR_VALUE, "picked ids are of tokens, each of at least one");
    for (uint32_t c = 0; c < embedding->n_segments; c++) {
        struct embed_params params = {
            .tokens = args->tokens,
            .weights = embedding->segments[c].address,
            .dst = args->dst,
            .add = args->add,
            .picked = args->picked,
            .n_tokens = args->n_tokens,
            .width = embedding->k,
            .stride = args->stride,
            .k_cells = embedding->k_cells,
            .first_id = embedding->segments[c].first,
            .n_ids = embedding->segments[c].count,
            .weight_type = embedding->type,
            .flags = args->add ? EMBED_ADD : 0,
            .share = args->share,
            .scale = args->scale,
        };
        int kernel = args->picked ? KERNEL_embed_picked : kernel_embed(args->positions != 0);
        if (gpu_queue_dispatch(ops->queue, kernel, &params, sizeof params, args->n_tokens, 1, 1,
                               4.0 * args->n_tokens * embedding->k, error))
            return -1;
    }
    return 0;
}

int op_norm(struct ops *ops, const struct norm_params *params, uint32_t n_rows,
            struct error *error) {
    uint32_t layer = (params->flags & NORM_LAYER) != 0;
    uint32_t groups = params->n_groups > 1 ? params->n_groups : 1;
    if (!layer && (groups > 1 || params->flags & NORM_BIAS))
        return error_set(error, ERROR_VALUE, "an RMS norm has neither groups nor a bias");
    uint32_t decode = (params->flags & NORM_DECODE) != 0;
    return gpu_queue_dispatch(ops->queue, kernel_norm(layer, decode), params, sizeof *params,
                              n_rows, groups, 1, 8.0 * n_rows * groups * params->width, error);
}

int op_norm_bwd(struct ops *ops, const struct norm_bwd_params *params, uint32_t n_rows,
                struct error *error) {
    uint32_t layer = (params->flags & NORM_BWD_LAYER) != 0;
    uint32_t groups = params->n_groups > 1 ? params->n_groups : 1;
    if (!layer && groups > 1)
        return error_set(error, ERROR_VALUE, "an RMS norm has no groups");
    return gpu_queue_dispatch(ops->queue, kernel_norm_bwd(layer), params, sizeof *params, n_rows,
                              groups, 1, 16.0 * n_rows * groups * params->width, error);
}

/* On a software device the columns of a token are too few to pay for starting several workgroups;
 * on a GPU one workgroup for each token would leave most of the device idle. */
int op_act(struct ops *ops, const struct act_params *params, uint32_t n_tokens,
           struct error *error) {
    uint32_t columns = gpu_device_get_info(ops->device)->type == GPU_SOFTWARE ? params->width
                                                                              : 4 * ops->workgroup;
    return gpu_queue_dispatch(ops->queue, kernel_act(params->plain != 0), params, sizeof *params,
                              n_tokens, (params->width + columns - 1) / columns, 1,
                              30.0 * n_tokens * params->width, error);
}

int op_act_bwd(struct ops *ops, const struct act_bwd_params *params, uint32_t n_tokens,
               struct error *error) {
    return gpu_queue_dispatch(ops->queue, kernel_act_bwd(params->plain != 0), params,
                              sizeof *params, n_tokens, 1, 1, 60.0 * n_tokens * params->width,
                              error);
}

int op_copy(struct ops *ops, const struct copy_params *params, struct error *error) {
    uint32_t x = params->n_rows < 32768 ? params->n_rows : 32768;
    /* copies to parts of one buffer, such as captures, need not wait for each other */
    if (params->n_rows > 0) {
        const uint64_t last = params->n_rows - 1;
        OP_EXTENT(ops, copy_params, dst, 4 * (last * params->out_stride + params->width));
        if (!(params->flags & COPY_ROWS))
            OP_EXTENT(ops, copy_params, x, 4 * (last * params->x_stride + params->width));
    }
    return gpu_queue_dispatch(ops->queue, KERNEL_copy, params, sizeof *params, x,
                              x ? (params->n_rows + x - 1) / x : 0, 1,
                              4.0 * params->n_rows * params->width, error);
}
