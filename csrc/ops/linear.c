/* The matrix product. Every kernel sums in the same order, so the choice among them is one of speed alone. */
#include "ops/ops.h"

struct variant {
    int kernel;
    uint32_t rows, columns; /* of the result, a workgroup; columns in units of the workgroup's lanes for LINEAR_BROADCAST */
};

static const struct variant broadcast[3][3] = {
    [WEIGHT_F32] = {{KERNEL_linear_f32_1, 1, 4}, {KERNEL_linear_f32_8, 8, 4}, {KERNEL_linear_f32_16, 16, 2}},
    [WEIGHT_BF16] = {{KERNEL_linear_bf16_1, 1, 4}, {KERNEL_linear_bf16_8, 8, 4}, {KERNEL_linear_bf16_16, 16, 2}},
    [WEIGHT_F16] = {{KERNEL_linear_f16_1, 1, 4}, {KERNEL_linear_f16_8, 8, 4}, {KERNEL_linear_f16_16, 16, 2}},
};

static const struct variant *variant_choose(const struct ops *ops, uint32_t type, uint32_t n_rows) {
    (void)ops;
    return &broadcast[type][n_rows == 1 ? 0 : n_rows <= 8 ? 1 : 2];
}

int op_linear(struct ops *ops, const struct op_matrix *matrix, const struct op_linear_args *args, struct error *error) {
    uint32_t n_quads = args->n_k ? op_matrix_quads(args->n_k) : matrix->k_quads;
    if (args->first_k % 16 || args->n_k % 16 || args->first_k / 4 + n_quads > matrix->k_quads || args->x_stride < 4 * n_quads)
        return error_set(error, ERROR_VALUE, "a product over inputs %u to %u of a matrix with %u", args->first_k, args->first_k + 4 * n_quads,
                         matrix->k);
    const struct variant *variant = variant_choose(ops, matrix->type, args->n_rows);
    for (uint32_t c = 0; c < matrix->n_chunks; c++) {
        uint32_t first = matrix->chunks[c].first;
        struct linear_params params = {
            .x = args->x, .weights = matrix->chunks[c].address, .dst = args->dst + 4 * (uint64_t)first,
            .bias = args->bias ? args->bias + 4 * (uint64_t)first : 0, .add = args->add ? args->add + 4 * (uint64_t)first : 0,
            .n_rows = args->n_rows, .n_out = matrix->chunks[c].count, .k_quads = n_quads, .panel_quads = matrix->k_quads,
            .first_quad = args->first_k / 4, .x_stride = args->x_stride, .out_stride = args->dst_stride,
            .flags = (args->bias ? LINEAR_BIAS : 0) | (args->add ? LINEAR_ADD : 0) | (args->softcap != 0 ? LINEAR_SOFTCAP : 0),
            .softcap = args->softcap};
        uint32_t columns = variant->columns * ops->workgroup;
        if (gpu_stream_dispatch(ops->stream, variant->kernel, &params, sizeof params, (args->n_rows + variant->rows - 1) / variant->rows,
                                (params.n_out + columns - 1) / columns, 1, 8.0 * args->n_rows * params.n_out * n_quads, error))
            return -1;
    }
    return 0;
}
