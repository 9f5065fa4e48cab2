/* Decoding on GPUs: products of few rows with the steps before and after them, and the attention of
 * single tokens. These kernels sum in an order of their own; the separate kernels that replace them
 * where a step between must be seen sum in the same one (NORM_DECODE, softmax_params.decode). */
#include "ops/ops.h"

/* Rows of W from which on a workgroup takes 32 columns at once: smaller matrices would not fill a
 * GPU. Part of the order of sums, so it depends on the matrix alone: a gate sums as its two halves
 * do where they are computed as outputs of their own. */
#define WIDE_ROWS 16384

/* The kernel families for GPUs share their kernels of decoding. */
int op_decode_lean(const struct ops *ops) {
    return ops->kernel_family == LINEAR_TILED || ops->kernel_family == LINEAR_MATRIX;
}

int op_attn_step_offered(const struct ops *ops, uint32_t d_head) {
    return op_decode_lean(ops) && d_head % 4 == 0 && d_head <= STEP_D_HEAD_MAX;
}

int op_linear_decode_offered(const struct ops *ops, const struct op_matrix *matrix,
                             uint32_t finish) {
    return op_decode_lean(ops) && (finish == FINISH_PLAIN || matrix->n_segments == 1);
}

int op_linear_decode_post_offered(uint32_t norm, uint32_t finish) {
    return finish == FINISH_GATE && norm != NORM_KIND_LAYER;
}

static const uint32_t decode_rows[] = KERNEL_linear_decode_RM;
#define N_ROWS (sizeof decode_rows / sizeof decode_rows[0])

/* The variant with the fewest rows that hold n_rows, or the one with the most. */
static uint32_t rows_choose(uint32_t n_rows) {
    size_t i = 0;
    while (i + 1 < N_ROWS && decode_rows[i] < n_rows)
        i++;
    return decode_rows[i];
}

static int arguments_check(const struct ops *ops, const struct op_matrix *matrix,
                           const struct op_linear_decode_args *args, uint32_t n_inputs,
                           struct error *error) {
    uint32_t padded = (matrix->k + 15) / 16 * 16;
    if (args->first_k % 16 || args->n_k % 16 || args->first_k > padded ||
        n_inputs > padded - args->first_k || args->x_stride < n_inputs || args->x_stride % 4 ||
        args->x % 16)
        return error_set(error, ERROR_VALUE, "a product over inputs %u to %u of a matrix with %u",
                         args->first_k, args->first_k + n_inputs, matrix->k);
    int normed = args->norm != NORM_KIND_NONE;
    if (!op_linear_decode_offered(ops, matrix, args->finish) || args->finish > FINISH_GATE ||
        args->norm > NORM_KIND_NONE || (normed && (args->n_k || !args->gain)) ||
        (args->finish == FINISH_GATE && matrix->n % 2) ||
        (args->finish != FINISH_PLAIN && args->add) ||
        (args->sub && (!op_linear_decode_post_offered(args->norm, args->finish) || args->n_k ||
                       !args->post_gain || !args->mid || args->sub % 16)))
        return error_set(error, ERROR_VALUE, "a product with %u outputs cannot be finished so here",
                         matrix->n);
    return 0;
}

static uint32_t flags_of(const struct op_matrix *matrix, const struct op_linear_decode_args *args) {
    return (args->bias ? LINEAR_BIAS : 0) | (args->add ? LINEAR_ADD : 0) |
           (args->softcap != 0 ? LINEAR_SOFTCAP : 0) | (matrix->scale != 0 ? LINEAR_SCALE : 0) |
           (args->clip != 0 ? LINEAR_CLIP : 0) | (args->finish == FINISH_ACT ? LINEAR_ACT : 0) |
           (args->norm_bias ? LINEAR_NORM_BIAS : 0) |
           (args->finish == FINISH_GATE ? LINEAR_GATE : 0);
}

/* Rows [row, row + n) of a product that begins with a post-norm. */
static int post_multiply(struct ops *ops, const struct op_matrix *matrix,
                         const struct op_linear_decode_args *args, uint32_t rm, uint32_t lanes,
                         uint32_t row, uint32_t n, struct error *error) {
    uint64_t in = 4 * (uint64_t)row * args->x_stride;
    struct linear_decode_post_params params = {
        .x = args->x + in,
        .out_ = args->sub + in,
        .post_gain = args->post_gain,
        .mid = args->mid + in,
        .weights = matrix->segments[0].address,
        .dst = args->dst + 4 * (uint64_t)row * args->dst_stride,
        .bias = args->bias,
        .gain = args->gain,
        .n_rows = n,
        .n_out = matrix->n / 2,
        .k_cells = matrix->k_cells,
        .panel_cells = matrix->k_cells,
        .x_stride = args->x_stride,
        .out_stride = args->dst_stride,
        .flags = flags_of(matrix, args),
        .lanes = lanes,
        .width = matrix->k,
        .act = args->act,
        .eps = args->eps,
        .scale = matrix->scale,
        .clip = args->clip,
        .softcap = args->softcap,
    };
    return gpu_queue_dispatch(
        ops->queue, kernel_linear_decode_post(matrix->type, rm, args->norm), &params, sizeof params,
        (n + rm - 1) / rm, (params.n_out + lanes - 1) / lanes, 1,
        2.0 * n * matrix->n * matrix->k_cells * op_cell_inputs(matrix->type), error);
}

/* One segment of the matrix: rows of x in as many dispatches as the bound on their time needs. */
static int segment_multiply(struct ops *ops, const struct op_matrix *matrix, uint32_t segment,
                            const struct op_linear_decode_args *args, uint32_t n_inputs,
                            struct error *error) {
    const uint32_t gate = args->finish == FINISH_GATE, inputs = op_cell_inputs(matrix->type),
                   rm = rows_choose(args->n_rows), count = matrix->segments[segment].count,
                   n_out = gate ? count / 2 : count, lanes = count < WIDE_ROWS ? 8 : 32,
                   columns = lanes * (gate || rm < 8 ? 1 : 2);
    const int kernel = kernel_linear_decode(matrix->type, rm, args->norm, gate);
    double fit = gpu_queue_flops_bound(ops->queue) / (2.0 * count * n_inputs * rm);
    uint32_t step = fit < 1 ? rm : fit > 65535 ? 65535 * rm : (uint32_t)fit * rm;
    for (uint32_t row = 0, n; row < args->n_rows; row += n) {
        n = args->n_rows - row < step ? args->n_rows - row : step;
        if (args->sub) {
            if (post_multiply(ops, matrix, args, rm, lanes, row, n, error))
                return -1;
            continue;
        }
        uint64_t first = matrix->segments[segment].first,
                 out = 4 * (first + (uint64_t)row * args->dst_stride),
                 x = args->x + 4 * (uint64_t)row * args->x_stride;
        struct linear_decode_params params = {
            .x = x,
            .x_floats = x,
            .weights = matrix->segments[segment].address,
            .dst = args->dst + out,
            .bias = args->bias ? args->bias + 4 * first : 0,
            .add = args->add ? args->add + out : 0,
            .gain = args->gain,
            .norm_bias = args->norm_bias,
            .n_rows = n,
            .n_out = n_out,
            .k_cells = n_inputs / inputs,
            .panel_cells = matrix->k_cells,
            .first_cell = args->first_k / inputs,
            .x_stride = args->x_stride,
            .out_stride = args->dst_stride,
            .flags = flags_of(matrix, args),
            .lanes = lanes,
            .width = matrix->k,
            .act = args->act,
            .eps = args->eps,
            .scale = matrix->scale,
            .clip = args->clip,
            .softcap = args->softcap,
        };
        if (gpu_queue_dispatch(ops->queue, kernel, &params, sizeof params, (n + rm - 1) / rm,
                               (n_out + columns - 1) / columns, 1, 2.0 * n * count * n_inputs,
                               error))
            return -1;
    }
    return 0;
}

int op_linear_decode(struct ops *ops, const struct op_matrix *matrix,
                     const struct op_linear_decode_args *args, struct error *error) {
    uint32_t n_inputs = args->n_k ? args->n_k : (matrix->k + 15) / 16 * 16;
    if (arguments_check(ops, matrix, args, n_inputs, error))
        return -1;
    for (uint32_t c = 0; c < matrix->n_segments; c++)
        if (segment_multiply(ops, matrix, c, args, n_inputs, error))
            return -1;
    return 0;
}

static int step_kernel(uint32_t group, uint32_t *heads) {
    static const uint32_t all[] = KERNEL_attn_step_HEADS;
    uint32_t most = all[sizeof all / sizeof all[0] - 1];
    *heads = group < most ? group : most;
    return kernel_attn_step(*heads);
}

int op_attn_step(struct ops *ops, const struct attn_step_params *params, uint32_t n_tokens,
                 uint32_t n_keys, struct error *error) {
    uint32_t heads, group = params->n_heads / params->n_kv_heads;
    int kernel = step_kernel(group, &heads);
    if (params->d_head % 4 || params->d_head > STEP_D_HEAD_MAX || params->d_rot > params->d_head)
        return error_set(error, ERROR_VALUE, "attention of single tokens with heads of %u",
                         params->d_head);
    return gpu_queue_dispatch(ops->queue, kernel, params, sizeof *params, n_tokens,
                              params->n_kv_heads * ((group + heads - 1) / heads), 1,
                              4.0 * n_tokens * n_keys * params->n_heads * params->d_head, error);
}

int op_decode_kernels(const struct op_kernels_needed *needed, int *kernels) {
    const uint32_t norm = needed->layer_norm ? NORM_KIND_LAYER : NORM_KIND_RMS,
                   before = needed->pre_norms ? norm : NORM_KIND_NONE,
                   finish = needed->gated ? FINISH_GATE : FINISH_ACT;
    int n = 0;
    uint32_t heads;
    for (size_t i = 0; i < N_ROWS; i++) {
        kernels[n++] = kernel_linear_decode(needed->type, decode_rows[i], NORM_KIND_NONE, 0);
        kernels[n++] = kernel_linear_decode(needed->type, decode_rows[i], norm, 0);
        if (needed->gated)
            kernels[n++] = kernel_linear_decode(needed->type, decode_rows[i], norm, 1);
        if (needed->post_norms && op_linear_decode_post_offered(before, finish))
            kernels[n++] = kernel_linear_decode_post(needed->type, decode_rows[i], before);
    }
    kernels[n++] = step_kernel(needed->group, &heads);
    kernels[n++] = kernel_norm(norm == NORM_KIND_LAYER, 1);
    kernels[n++] = KERNEL_pick;
    kernels[n++] = KERNEL_embed_picked;
    return n;
}
