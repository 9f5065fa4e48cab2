/* The matrix product. In prefill every kernel sums in the same order, so the choice among them is
 * one of speed alone; in decoding the tiled kernel family splits k. Either way the order depends on
 * phase, shape and kernel family, never on the number of rows. */
#include <string.h>

#include "ops/linear_matrix.h"

#define TILED_SIDE 64 /* rows and columns of a workgroup: BM, BN and BK of the tiled shaders */

struct variant {
    int kernel;
    uint32_t rows; /* of the result, for each workgroup */
    /* of the result: broadcast, for each lane (0: a subgroup takes one panel); tiled, for each
     * workgroup */
    uint32_t columns;
};

static const char *const family_names[LINEAR_FAMILIES] = {"broadcast", "texels", "tiled", "matrix"};

const char *op_kernel_family_name(int family) {
    return family >= 0 && family < LINEAR_FAMILIES ? family_names[family] : "unknown";
}

int op_kernel_family_find(const char *name) {
    for (int i = 0; i < LINEAR_FAMILIES; i++)
        if (strcmp(name, family_names[i]) == 0)
            return i;
    return -1;
}

/* Can the device start the workgroups of the families for GPUs? Of their kernels attn_step takes
 * the most shared memory, 22,016 bytes; Vulkan itself promises 16 KiB. */
static int decode_kernels_fit(const struct gpu_device_info *info) {
    return info->max_invocations >= 256 && info->max_shared_bytes >= 22016;
}

int op_kernel_family_offered(const struct ops *ops, int family) {
    const struct gpu_device_info *info = gpu_device_get_info(ops->device);
    switch (family) {
    case LINEAR_BROADCAST: return 1;
    case LINEAR_TEXELS:
        /* Texels avoid the gathers of software drivers, which GPUs do not have. */
        return info->type == GPU_SOFTWARE && info->has_int64 && info->max_texels > 0;
    case LINEAR_TILED: return decode_kernels_fit(info);
    case LINEAR_MATRIX:
        return decode_kernels_fit(info) &&
               gpu_pipeline_possible(ops->device, kernel_linear_matrix(WEIGHT_F32, 0, 0));
    default: return 0;
    }
}

/* The variant with the fewest rows that hold n_rows, or the one with the most rows. `find` looks a
 * variant up in the table; rows: [n] the numbers of rows that the table has, ascending. */
static struct variant variant_find(int (*find)(uint32_t weight, uint32_t rm, uint32_t texels),
                                   const uint32_t *rows, size_t n, uint32_t type, int texels,
                                   uint32_t n_rows) {
    struct variant found = {0};
    for (size_t i = 0; i < n && (i == 0 || found.rows < n_rows); i++) {
        int kernel = find(type, rows[i], (uint32_t)texels);
        if (kernel >= 0)
            found = (struct variant){.kernel = kernel, .rows = rows[i]};
    }
    return found;
}

static const uint32_t linear_rows[] = KERNEL_linear_RM, pairs_rows[] = KERNEL_linear_pairs_RM,
                      bwd_rows[] = KERNEL_linear_bwd_RM;
#define COUNT(array) (sizeof(array) / sizeof *(array))

static struct variant variant_choose(const struct ops *ops, uint32_t type, uint32_t n_rows) {
    if (ops->kernel_family == LINEAR_TILED)
        return (struct variant){kernel_linear_tiled(type), TILED_SIDE, TILED_SIDE};
    /* A lane that takes several columns (RN: 16 rows of 4 columns) has too many accumulators for
     * the 16 registers of 8 lanes of AVX2, where 8 rows of a panel are faster for any number of
     * rows. NVIDIA's driver (580.159) takes 30 s to compile that variant, and GPUs need this kernel
     * family only as the baseline of the tiled one. */
    int texels = ops->kernel_family == LINEAR_TEXELS;
    int narrow = ops->subgroup == 8 || gpu_device_get_info(ops->device)->type != GPU_SOFTWARE;
    size_t n = COUNT(linear_rows);
    while (narrow && kernel_linear_RN(type, linear_rows[n - 1], (uint32_t)texels))
        n--;
    struct variant variant = variant_find(kernel_linear, linear_rows, n, type, texels, n_rows);
    variant.columns = (uint32_t)kernel_linear_RN(type, variant.rows, (uint32_t)texels);
    return variant;
}

static struct variant pairs_choose(const struct ops *ops, uint32_t type, uint32_t n_rows) {
    return variant_find(kernel_linear_pairs, pairs_rows, COUNT(pairs_rows), type,
                        ops->kernel_family == LINEAR_TEXELS, n_rows);
}

static uint32_t variant_columns(const struct ops *ops, const struct variant *variant) {
    if (op_decode_lean(ops))
        return variant->columns;
    return variant->columns ? variant->columns * ops->workgroup : op_panel_columns(ops);
}

static int segment_multiply(struct ops *ops, const struct op_matrix *matrix, uint32_t segment,
                            const struct op_linear_args *args, uint32_t n_inputs,
                            struct error *error) {
    struct variant variant = variant_choose(ops, matrix->type, args->n_rows);
    uint64_t first = matrix->segments[segment].first;
    uint32_t n_out = matrix->segments[segment].count, columns = variant_columns(ops, &variant),
             step = linear_rows_at_once(ops, variant.rows, n_out, n_inputs);
    uint32_t inputs = op_cell_inputs(matrix->type);
    for (uint32_t row = 0, n; row < args->n_rows; row += n) {
        n = args->n_rows - row < step ? args->n_rows - row : step;
        uint64_t out = 4 * (first + (uint64_t)row * args->dst_stride);
        struct linear_params params = {
            .x = args->x + 4 * (uint64_t)row * args->x_stride,
            .weights = matrix->segments[segment].address,
            .dst = args->dst + out,
            .bias = args->bias ? args->bias + 4 * first : 0,
            .add = args->add ? args->add + out : 0,
            .n_rows = n,
            .n_out = n_out,
            .k_cells = n_inputs / inputs,
            .panel_cells = matrix->k_cells,
            .first_cell = args->first_k / inputs,
            .x_stride = args->x_stride,
            .out_stride = args->dst_stride,
            .flags = (args->bias ? LINEAR_BIAS : 0) | (args->add ? LINEAR_ADD : 0) |
                     (args->softcap != 0 ? LINEAR_SOFTCAP : 0) | (args->gain ? LINEAR_NORM : 0) |
                     (matrix->scale != 0 ? LINEAR_SCALE : 0) | (args->clip != 0 ? LINEAR_CLIP : 0),
            .scale = matrix->scale,
            .clip = args->clip,
            .softcap = args->softcap,
            .gain = args->gain,
            .width = matrix->k,
            .eps = args->eps,
        };
        if (ops->kernel_family == LINEAR_TEXELS &&
            gpu_queue_texels(ops->queue, params.weights,
                             op_matrix_bytes(matrix->type, n_out, matrix->k), error))
            return -1;
        if (gpu_queue_dispatch(ops->queue, variant.kernel, &params, sizeof params,
                               (n + variant.rows - 1) / variant.rows,
                               (n_out + columns - 1) / columns, 1, 2.0 * n * n_out * n_inputs,
                               error))
            return -1;
    }
    return 0;
}

int op_linear_norms(const struct ops *ops, uint32_t n_rows) {
    return !op_decode_lean(ops) && ops->workgroup == ops->subgroup && n_rows <= 8;
}

/* The product of decoding on GPUs, whose kernel sums in its own order. */
static int decode_multiply(struct ops *ops, const struct op_matrix *matrix,
                           const struct op_linear_args *args, struct error *error) {
    struct op_linear_decode_args decode = {
        .x = args->x,
        .dst = args->dst,
        .bias = args->bias,
        .add = args->add,
        .gain = args->gain,
        .n_rows = args->n_rows,
        .x_stride = args->x_stride,
        .dst_stride = args->dst_stride,
        .first_k = args->first_k,
        .n_k = args->n_k,
        .norm = args->gain ? NORM_KIND_RMS : NORM_KIND_NONE,
        .finish = FINISH_PLAIN,
        .softcap = args->softcap,
        .clip = args->clip,
        .eps = args->eps,
    };
    return op_linear_decode(ops, matrix, &decode, error);
}

int op_linear(struct ops *ops, const struct op_matrix *matrix, const struct op_linear_args *args,
              struct error *error) {
    if (args->decode && op_decode_lean(ops))
        return decode_multiply(ops, matrix, args, error);
    uint32_t padded = (matrix->k + 15) / 16 * 16, n_inputs = args->n_k ? args->n_k : padded;
    if (args->first_k % 16 || args->n_k % 16 || args->first_k > padded ||
        n_inputs > padded - args->first_k || args->x_stride < n_inputs)
        return error_set(error, ERROR_VALUE, "a product over inputs %u to %u of a matrix with %u",
                         args->first_k, args->first_k + n_inputs, matrix->k);
    if (args->gain && (!op_linear_norms(ops, args->n_rows) || args->n_k))
        return error_set(error, ERROR_VALUE, "a product of %u rows cannot normalise its input here",
                         args->n_rows);
    if (ops->kernel_family == LINEAR_MATRIX && !args->decode)
        return linear_matrix(ops, matrix, args, n_inputs, error);
    for (uint32_t c = 0; c < matrix->n_segments; c++)
        if (segment_multiply(ops, matrix, c, args, n_inputs, error))
            return -1;
    return 0;
}

int op_linear_pairs_offered(const struct ops *ops, const struct op_matrix *matrix,
                            uint32_t n_rows) {
    double flops = 2.0 * n_rows * matrix->n * matrix->k;
    return op_linear_norms(ops, n_rows) && matrix->n_segments == 1 && matrix->scale == 0 &&
           flops <= gpu_queue_flops_bound(ops->queue);
}

int op_linear_pairs(struct ops *ops, const struct op_matrix *matrix,
                    const struct op_linear_pairs_args *args, struct error *error) {
    uint32_t n_rows = args->n_rows, n_pairs = matrix->n / 2, columns = op_panel_columns(ops),
             heads = args->n_heads + 2 * args->n_kv_heads;
    int rotate = args->kind == PAIRS_ROTATE, texels = ops->kernel_family == LINEAR_TEXELS;
    struct variant variant = pairs_choose(ops, matrix->type, n_rows);
    if (args->kind > PAIRS_ROTATE || matrix->n % 2 || matrix->n_segments != 1 || matrix->scale ||
        args->x_stride < (matrix->k + 15) / 16 * 16 ||
        (rotate && (args->d_head % 2 || (uint64_t)heads * args->d_head != matrix->n ||
                    args->dst_stride < args->n_heads * args->d_head)) ||
        (!rotate && args->dst_stride < n_pairs))
        return error_set(
            error, ERROR_VALUE,
            "%u outputs in %u segments cannot be finished in pairs: %u heads of %u, rows of %u",
            matrix->n, matrix->n_segments, heads, args->d_head, args->dst_stride);
    struct linear_pairs_params params = {
        .x = args->x,
        .weights = matrix->segments[0].address,
        .dst = args->dst,
        .bias = args->bias,
        .gain = args->gain,
        .angles = args->angles,
        .tokens = args->tokens,
        .k_cache = args->k_cache,
        .v_cache = args->v_cache,
        .n_rows = n_rows,
        .n_out = n_pairs,
        .half_ = rotate ? args->d_head / 2 : n_pairs,
        .k_cells = matrix->k_cells,
        .panel_cells = matrix->k_cells,
        .x_stride = args->x_stride,
        .out_stride = args->dst_stride,
        .flags = LINEAR_NORM | (args->bias ? LINEAR_BIAS : 0),
        .width = matrix->k,
        .eps = args->eps,
        .kind = args->kind,
        .act = args->act,
        .n_heads = args->n_heads,
        .n_kv_heads = args->n_kv_heads,
    };
    if (texels && gpu_queue_texels(ops->queue, params.weights,
                                   op_matrix_bytes(matrix->type, matrix->n, matrix->k), error))
        return -1;
    return gpu_queue_dispatch(ops->queue, variant.kernel, &params, sizeof params,
                              (n_rows + variant.rows - 1) / variant.rows,
                              (n_pairs + columns - 1) / columns, 1,
                              2.0 * n_rows * matrix->n * matrix->k, error);
}

int op_matrix_rows(const struct op_matrix *matrix, uint32_t first, uint32_t count,
                   struct op_matrix *rows, struct error *error) {
    if (first % OP_PANEL || count == 0 || first > matrix->n || count > matrix->n - first)
        return error_set(error, ERROR_VALUE, "rows %u to %u of a matrix with %u", first,
                         first + count, matrix->n);
    *rows = *matrix;
    rows->n = count;
    rows->n_segments = 0;
    for (uint32_t c = 0; c < matrix->n_segments; c++) {
        uint32_t begin = matrix->segments[c].first, end = begin + matrix->segments[c].count;
        uint32_t from = begin > first ? begin : first,
                 to = end < first + count ? end : first + count;
        if (from >= to)
            continue;
        rows->segments[rows->n_segments].address =
            matrix->segments[c].address + op_matrix_bytes(matrix->type, from - begin, matrix->k);
        rows->segments[rows->n_segments].first = from - first;
        rows->segments[rows->n_segments++].count = to - from;
    }
    return 0;
}

/* --- backward --------------------------------------------------------------------------------- */

static struct variant backward_choose(const struct ops *ops, uint32_t type, uint32_t n_rows) {
    if (ops->kernel_family == LINEAR_TILED)
        return (struct variant){kernel_linear_bwd_tiled(type), TILED_SIDE, TILED_SIDE};
    return variant_find(kernel_linear_bwd, bwd_rows, COUNT(bwd_rows), type,
                        ops->kernel_family == LINEAR_TEXELS, n_rows);
}

static int segment_multiply_back(struct ops *ops, const struct op_matrix *matrix, uint32_t segment,
                                 const struct op_linear_bwd_args *args, uint32_t first_n,
                                 uint32_t n_sum, uint32_t flags, struct error *error) {
    struct variant variant = backward_choose(ops, matrix->type, args->n_rows);
    uint32_t inputs = op_cell_inputs(matrix->type),
             n_k = args->n_k ? args->n_k : matrix->k_cells * inputs, n_cells = n_k / inputs;
    uint32_t step = linear_rows_at_once(ops, variant.rows, n_sum, n_k),
             columns = variant.columns ? variant.columns : inputs * ops->workgroup;
    for (uint32_t row = 0, n; row < args->n_rows; row += n) {
        n = args->n_rows - row < step ? args->n_rows - row : step;
        struct linear_bwd_params params = {
            .dy = args->dy + 4 * ((uint64_t)row * args->y_stride + matrix->segments[segment].first +
                                  first_n - args->first_n),
            .weights = matrix->segments[segment].address,
            .dx = args->dx + 4 * (uint64_t)row * args->x_stride,
            .n_rows = n,
            .n_sum = (n_sum + 15) / 16 * 16,
            .first_n = first_n,
            .n_cells = n_cells,
            .first_cell = args->first_k / inputs,
            .panel_cells = matrix->k_cells,
            .y_stride = args->y_stride,
            .x_stride = args->x_stride,
            .flags = flags,
            .scale = matrix->scale,
        };
        if (ops->kernel_family == LINEAR_TEXELS &&
            gpu_queue_texels(
                ops->queue, params.weights,
                op_matrix_bytes(matrix->type, matrix->segments[segment].count, matrix->k), error))
            return -1;
        if (gpu_queue_dispatch(ops->queue, variant.kernel, &params, sizeof params,
                               (n + variant.rows - 1) / variant.rows, (n_k + columns - 1) / columns,
                               1, 2.0 * n * n_sum * n_k, error))
            return -1;
    }
    return 0;
}

/* Rows of W that one dispatch takes. A subgroup of 16 lanes reads 256 bytes of each, and a core's
 * cache keeps them for the next rows of dy. */
#define BACKWARD_STRIP 2048

int op_linear_bwd(struct ops *ops, const struct op_matrix *matrix,
                  const struct op_linear_bwd_args *args, struct error *error) {
    uint32_t padded = (matrix->k + 15) / 16 * 16, n_sum = args->n_sum ? args->n_sum : matrix->n,
             n_k = args->n_k ? args->n_k : padded;
    if (args->first_n % 16 || args->first_n > matrix->n || n_sum > matrix->n - args->first_n ||
        (args->n_sum % 16 && args->first_n + n_sum != matrix->n) || args->first_k % 16 ||
        n_k % 16 || args->first_k > padded || n_k > padded - args->first_k ||
        args->x_stride < n_k || args->y_stride < (n_sum + 15) / 16 * 16 || args->y_stride % 2)
        return error_set(error, ERROR_VALUE,
                         "a backward product over rows %u to %u of a matrix with %u", args->first_n,
                         args->first_n + n_sum, matrix->n);
    if (args->add && matrix->scale != 0)
        return error_set(error, ERROR_VALUE,
                         "a backward product with a scaled matrix cannot be added to a sum");
    if (ops->kernel_family == LINEAR_MATRIX)
        return linear_bwd_matrix(ops, matrix, args, n_sum, n_k, error);
    uint32_t at_once = ops->kernel_family == LINEAR_TILED || args->n_rows <= 16 ? UINT32_MAX
                                                                                : BACKWARD_STRIP;
    uint32_t add = args->add ? LINEAR_ADD : 0;
    for (uint32_t c = 0; c < matrix->n_segments; c++) {
        uint32_t first = matrix->segments[c].first,
                 from = args->first_n > first ? args->first_n - first : 0,
                 end = args->first_n + n_sum - first;
        if (args->first_n + n_sum <= first)
            break;
        end = end < matrix->segments[c].count ? end : matrix->segments[c].count;
        for (uint32_t n; from < end; from += n) {
            n = end - from < at_once ? end - from : at_once;
            int last = first + from + n == args->first_n + n_sum;
            uint32_t flags = add | (last && matrix->scale != 0 ? LINEAR_SCALE : 0);
            if (segment_multiply_back(ops, matrix, c, args, from, n, flags, error))
                return -1;
            add = LINEAR_ADD; /* continues the chain of the dispatch before */
        }
    }
    return 0;
}

int ops_kernels_prepare(struct ops *ops, const struct op_kernels_needed *needed,
                        struct error *error) {
    const uint32_t layer = needed->layer_norm != 0, type = needed->type;
    int attention[2];
    op_attn_kernels(ops, attention);
    const int always[] = {KERNEL_embed,
                          kernel_embed(needed->positions != 0),
                          kernel_norm(layer, 0),
                          KERNEL_rope,
                          attention[0],
                          KERNEL_attn_softmax,
                          attention[1],
                          kernel_act(!needed->gated),
                          KERNEL_edit,
                          KERNEL_copy,
                          op_attn_decode_kernel(needed->group)};
    int kernels[48], n = 0;
    for (size_t i = 0; i < sizeof always / sizeof always[0]; i++)
        if (i == 0 || always[i] != always[0])
            kernels[n++] = always[i];
    for (uint32_t rows = 1; rows <= 16 && ops->kernel_family != LINEAR_MATRIX; rows *= 2)
        kernels[n++] = variant_choose(ops, type, rows).kernel;
    if (ops->kernel_family == LINEAR_MATRIX)
        n += linear_matrix_kernels(ops, type, 0, kernels + n);
    for (size_t i = 0; i < COUNT(pairs_rows) && op_linear_norms(ops, 1) && !layer; i++)
        kernels[n++] = pairs_choose(ops, type, pairs_rows[i]).kernel;
    if (op_decode_lean(ops))
        n += op_decode_kernels(needed, kernels + n);
    return gpu_pipelines_prepare(ops->device, kernels, n, error);
}

int ops_backward_prepare(struct ops *ops, const struct op_kernels_needed *needed,
                         struct error *error) {
    const int always[] = {kernel_norm_bwd(needed->layer_norm != 0),
                          KERNEL_rope_bwd,
                          KERNEL_attn_softmax_bwd,
                          KERNEL_attn_output_bwd,
                          kernel_act_bwd(!needed->gated),
                          KERNEL_pair_grad,
                          KERNEL_logit_grad};
    int kernels[16], n = 0;
    for (size_t i = 0; i < sizeof always / sizeof always[0]; i++)
        kernels[n++] = always[i];
    if (ops->kernel_family == LINEAR_MATRIX)
        n += linear_matrix_kernels(ops, needed->type, 1, kernels + n);
    for (uint32_t rows = 1; rows <= 32 && ops->kernel_family != LINEAR_MATRIX; rows *= 2) {
        int kernel = backward_choose(ops, needed->type, rows).kernel;
        if (kernel != kernels[n - 1])
            kernels[n++] = kernel;
    }
    return gpu_pipelines_prepare(ops->device, kernels, n, error);
}
