/* What the OV circuit is read with: values sent through the heads' outputs, norms of a matrix's
 * rows, the largest of many columns. */
#include "ops/ops.h"

static int share_check(const struct op_matrix *matrix, const struct op_head_out_args *args,
                       struct error *error) {
    if (args->n_heads == 0 || args->n_kv_heads == 0 || args->n_heads % args->n_kv_heads ||
        (uint64_t)args->n_heads * args->d_head != matrix->k)
        return error_set(
            error, ERROR_VALUE,
            "%u heads of %u over %u key/value heads do not make the %u inputs of the matrix",
            args->n_heads, args->d_head, args->n_kv_heads, matrix->k);
    return 0;
}

int op_head_out(struct ops *ops, const struct op_matrix *matrix,
                const struct op_head_out_args *args, struct error *error) {
    int texels = ops->kernel_family == LINEAR_TEXELS;
    /* A software device has few workers, and each is fastest when it reads its panel in order; a
     * GPU needs every (panel, head) at once to be filled. */
    uint32_t each = gpu_device_get_info(ops->device)->type == GPU_SOFTWARE ? args->n_heads : 1;
    uint32_t columns = op_panel_columns(ops);
    if (share_check(matrix, args, error))
        return -1;
    for (uint32_t c = 0; c < matrix->n_segments; c++) {
        uint64_t first = matrix->segments[c].first;
        uint32_t n_out = matrix->segments[c].count;
        struct head_out_params params = {
            .x = args->x,
            .weights = matrix->segments[c].address,
            .dst = args->dst + 4 * first,
            .gain = args->gain ? args->gain + 4 * first : 0,
            .n_heads = args->n_heads,
            .group = args->n_heads / args->n_kv_heads,
            .d_head = args->d_head,
            .heads_each = each,
            .n_out = n_out,
            .panel_cells = matrix->k_cells,
            .out_stride = args->dst_stride,
            .has_gain = args->gain != 0,
            .scale = matrix->scale != 0 ? matrix->scale : 1,
        };
        if (texels && gpu_queue_texels(ops->queue, params.weights,
                                       op_matrix_bytes(matrix->type, n_out, matrix->k), error))
            return -1;
        if (gpu_queue_dispatch(ops->queue, kernel_head_out(matrix->type, texels), &params,
                               sizeof params, (args->n_heads + each - 1) / each,
                               (n_out + columns - 1) / columns, 1, 2.0 * n_out * matrix->k, error))
            return -1;
    }
    return 0;
}

int op_row_norms(struct ops *ops, const struct op_matrix *matrix, uint64_t dst,
                 struct error *error) {
    for (uint32_t c = 0; c < matrix->n_segments; c++) {
        uint32_t n_out = matrix->segments[c].count;
        struct row_norms_params params = {
            .weights = matrix->segments[c].address,
            .dst = dst + 4 * (uint64_t)matrix->segments[c].first,
            .n_out = n_out,
            .panel_cells = matrix->k_cells,
        };
        if (gpu_queue_dispatch(ops->queue, kernel_row_norms(matrix->type), &params, sizeof params,
                               (n_out + ops->workgroup - 1) / ops->workgroup, 1, 1,
                               2.0 * n_out * matrix->k, error))
            return -1;
    }
    return 0;
}

/* Operations that a row takes, by which submissions are bounded: the scan, the values that enter
 * the list (about 7 k of the first columns and k of later ones, each of which costs as much as
 * thousands of operations on a software device), and the sort. */
static double topk_work(const struct topk_params *p) {
    double k = p->k, entering = (p->flags & TOPK_BEGIN ? 7 : 1) * k;
    return 4.0 * p->n_columns + entering * 7500 * (1 + k / TOPK_MAX) + 60 * k * k;
}

int op_topk(struct ops *ops, const struct topk_params *params, struct error *error) {
    /* rows of a workgroup, as in topk.comp */
    uint32_t rows = ops->workgroup / ops->subgroup < 4 ? ops->workgroup / ops->subgroup : 4;
    if (params->k == 0 || params->k > TOPK_MAX || params->x_stride < params->n_columns ||
        (uint64_t)params->first + params->n_columns > 1u << 24)
        return error_set(error, ERROR_VALUE,
                         "the %u largest of columns %u to %u, rows of %u: a list holds 1 to %d, "
                         "and an index is below 2^24",
                         params->k, params->first, params->first + params->n_columns,
                         params->x_stride, TOPK_MAX);
    if (params->n_columns == 0 && !(params->flags & TOPK_BEGIN))
        return 0;
    double at_once = gpu_queue_flops_bound(ops->queue) / topk_work(params);
    uint32_t step = at_once < 1 ? 1 : at_once < params->n_rows ? (uint32_t)at_once : params->n_rows;
    for (uint32_t row = 0, n; row < params->n_rows; row += n) {
        struct topk_params part = *params;
        n = params->n_rows - row < step ? params->n_rows - row : step;
        part.n_rows = n;
        part.x += 4 * (uint64_t)row * params->x_stride;
        part.values += 4 * (uint64_t)row * params->k;
        part.indices += 4 * (uint64_t)row * params->k;
        if (gpu_queue_dispatch(ops->queue, KERNEL_topk, &part, sizeof part, (n + rows - 1) / rows,
                               1, 1, n * topk_work(params), error))
            return -1;
    }
    return 0;
}
