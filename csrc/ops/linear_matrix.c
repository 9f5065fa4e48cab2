/* Products on matrix units (VK_KHR_cooperative_matrix). The float32 rows are split into float16
 * parts first, in memory that belongs to the ops. params_matrix.h says what a split row is, and
 * shaders/linear_matrix.comp in which order a product sums. */
#include "ops/linear_matrix.h"

/* Split rows of one dispatch: 2,048 tokens of 8,192 values. */
#define SPLIT_BYTES (UINT64_C(64) << 20)
#define DOTS_SLICE 4096 /* values of a slice of dots; a multiple of MATRIX_BLOCK */

/* Rows of x, in parts on the device. */
struct parts {
    uint64_t cells, scales;
    uint32_t part_cells, n_parts;
};

/* Tiles of a workgroup: the constants of the shader. */
struct tiles {
    uint32_t rows, columns;
    int large;
};

static uint32_t n_parts(const struct ops *ops) { return ops->fast ? 1 : 2; }

/* Cells of 8 float16 of one part of a row of n values. */
static uint32_t part_cells(uint32_t n) {
    return (n + MATRIX_BLOCK - 1) / MATRIX_BLOCK * (MATRIX_BLOCK / 8);
}

static uint64_t align(uint64_t bytes) { return (bytes + 255) & ~UINT64_C(255); }

/* Bytes of a split row of n_k values with its scale, and the most rows that are split at once. */
static uint64_t row_bytes(int fast, uint32_t n_k) {
    return (uint64_t)part_cells(n_k) * (fast ? 1 : 2) * 16 + 4;
}
static uint32_t rows_most(uint64_t row) {
    uint32_t most = SPLIT_BYTES / row > 128 ? (uint32_t)(SPLIT_BYTES / row) / 128 * 128 : 128;
    return most < 65535 / 128 * 128 ? most : 65535 / 128 * 128;
}
#define SCALES_AT 256 /* in the memory of a product; the range of its matrix lies before */

uint64_t op_split_bytes(uint64_t n_rows, uint32_t n_k) {
    uint64_t row = row_bytes(0, n_k), rows = rows_most(row);
    rows = rows < n_rows ? rows : n_rows;
    return SCALES_AT + align(4 * rows) + rows * (row - 4);
}

int ops_split_release(struct ops *ops, struct error *error) {
    if (ops->scratch.n && gpu_queue_wait(ops->queue, error))
        return -1;
    while (ops->scratch.n)
        gpu_buffer_destroy(ops->scratch.buffers[--ops->scratch.n]);
    return 0;
}

int ops_split_expect(struct ops *ops, uint64_t bytes, struct error *error) {
    if (bytes <= ops->scratch.expected)
        return 0;
    ops->scratch.expected = bytes;
    return ops_split_release(ops, error);
}

/* Memory for `bytes` until the next call: a buffer that grows. Buffers that have become too small
 * may still be in use and are kept; all together are less than twice the largest. */
static int scratch_get(struct ops *ops, uint64_t bytes, struct gpu_buffer **out,
                       struct error *error) {
    struct op_scratch *scratch = &ops->scratch;
    *out = scratch->n ? scratch->buffers[scratch->n - 1] : NULL;
    if (*out && gpu_buffer_size(*out) >= bytes)
        return 0;
    uint64_t size = UINT64_C(1) << 20;
    while (size < bytes)
        size *= 2;
    if (bytes <= scratch->expected)
        size = scratch->expected;
    if (size > GPU_BUFFER_MAX)
        return error_set(error, ERROR_VALUE, "a product needs %llu bytes to split its rows",
                         (unsigned long long)bytes);
    if (gpu_buffer_create(out, ops->device, size, GPU_DEVICE_LOCAL, "split rows", error))
        return -1;
    scratch->buffers[scratch->n++] = *out;
    return 0;
}

/* Splits slices of `slice_k` values of the rows of x, which end at n_k, into the memory that `to`
 * names: [slices, n_rows] rows. */
static int split(struct ops *ops, uint64_t x, uint32_t n_rows, uint32_t x_stride, uint32_t n_k,
                 uint32_t slice_k, const struct parts *to, struct error *error) {
    struct matrix_split_params params = {
        .x = x,
        .parts = to->cells,
        .scales = to->scales,
        .n_rows = n_rows,
        .n_k = n_k,
        .slice_k = slice_k,
        .x_stride = x_stride,
        .part_cells = to->part_cells,
        .n_parts = to->n_parts,
    };
    return gpu_queue_dispatch(ops->queue, KERNEL_matrix_split, &params, sizeof params, n_rows,
                              (n_k + slice_k - 1) / slice_k, 1, 8.0 * n_rows * n_k, error);
}

/* Bytes of shared memory that the kernel takes. */
static uint32_t shared_bytes(const struct ops *ops, const struct tiles *tiles, uint32_t type,
                             int backward) {
    uint32_t row = MATRIX_BLOCK / 8 + 1, w_parts = !ops->fast && type == WEIGHT_F32 ? 2 : 1,
             w = backward ? MATRIX_BLOCK * (tiles->columns / 8 + 1) : tiles->columns * row;
    return 16 * (n_parts(ops) * tiles->rows * row + w_parts * w);
}

/* Depends on the matrix and the device alone, never on the number of rows. */
static struct tiles tiles_choose(const struct ops *ops, uint32_t n, uint32_t type, int backward) {
    const struct gpu_device_info *info = gpu_device_get_info(ops->device);
    struct tiles large = {8 * info->matrix_m, 8 * info->matrix_n, 1},
                 small = {4 * info->matrix_m, 4 * info->matrix_n, 0};
    return n >= ops->large_from &&
                   shared_bytes(ops, &large, type, backward) <= info->max_shared_bytes
               ? large
               : small;
}

static int kernel_choose(const struct ops *ops, const struct tiles *tiles, uint32_t type,
                         int backward) {
    uint32_t large = (uint32_t)tiles->large, fast = ops->fast != 0;
    return backward ? kernel_linear_bwd_matrix(type, large, fast)
                    : kernel_linear_matrix(type, large, fast);
}

int linear_matrix_kernels(const struct ops *ops, uint32_t type, int backward, int *kernels) {
    int n = 0;
    kernels[n++] = KERNEL_matrix_split;
    kernels[n++] = KERNEL_matrix_range;
    for (uint32_t columns = 0; columns <= 1; columns++) {
        struct tiles tiles = tiles_choose(ops, columns * ops->large_from, type, backward);
        kernels[n++] = kernel_choose(ops, &tiles, type, backward);
    }
    return n;
}

int ops_matrix_range(struct ops *ops, const struct op_matrix *matrix, struct gpu_buffer *buffer,
                     uint64_t offset, struct error *error) {
    if (gpu_queue_zero(ops->queue, buffer, offset, 4, error))
        return -1;
    for (uint32_t c = 0; c < matrix->n_segments && matrix->type != WEIGHT_F16; c++) {
        uint64_t cells = op_matrix_bytes(matrix->type, matrix->segments[c].count, matrix->k) / 16;
        uint64_t groups = (cells + ops->workgroup * 16 - 1) / (ops->workgroup * 16);
        groups = groups < 1024 ? groups : 1024;
        struct matrix_range_params params = {
            .weights = matrix->segments[c].address,
            .range = gpu_buffer_address(buffer) + offset,
            .n_cells = (uint32_t)cells,
            .weight_type = matrix->type,
            .n_invocations = (uint32_t)groups * ops->workgroup,
        };
        if (gpu_queue_dispatch(ops->queue, KERNEL_matrix_range, &params, sizeof params,
                               (uint32_t)groups, 1, 1, 8.0 * (double)cells, error))
            return -1;
    }
    return 0;
}

/* What a product of rows needs of scratch memory: the range of the matrix where it is not known,
 * then the split rows. At most *step rows at once, of which there are n_rows. */
static int parts_make(struct ops *ops, const struct op_matrix *matrix, uint32_t n_k,
                      uint32_t n_rows, uint32_t *step, struct parts *parts, uint64_t *range,
                      struct error *error) {
    parts->part_cells = part_cells(n_k);
    parts->n_parts = n_parts(ops);
    uint64_t row = row_bytes(ops->fast, n_k);
    uint32_t most = rows_most(row);
    *step = *step < most ? *step : most;
    *step = *step < n_rows ? *step : n_rows;
    struct gpu_buffer *buffer;
    uint64_t scales = SCALES_AT, cells = scales + align(4 * (uint64_t)*step);
    if (scratch_get(ops, cells + *step * (row - 4), &buffer, error))
        return -1;
    parts->scales = gpu_buffer_address(buffer) + scales;
    parts->cells = gpu_buffer_address(buffer) + cells;
    *range = matrix->range ? matrix->range : gpu_buffer_address(buffer);
    return matrix->range || matrix->type == WEIGHT_F16
               ? 0
               : ops_matrix_range(ops, matrix, buffer, 0, error);
}

static int segment_forward(struct ops *ops, const struct op_matrix *matrix, uint32_t segment,
                           const struct op_linear_args *args, const struct parts *parts,
                           uint64_t range, uint32_t n_inputs, uint32_t row, uint32_t n,
                           struct error *error) {
    struct tiles tiles = tiles_choose(ops, matrix->n, matrix->type, 0);
    uint32_t inputs = op_cell_inputs(matrix->type), n_out = matrix->segments[segment].count;
    uint64_t first = matrix->segments[segment].first,
             out = 4 * (first + (uint64_t)row * args->dst_stride);
    struct linear_matrix_params params = {
        .x = parts->cells,
        .scales = parts->scales,
        .weights = matrix->segments[segment].address,
        .range = range,
        .dst = args->dst + out,
        .bias = args->bias ? args->bias + 4 * first : 0,
        .add = args->add ? args->add + out : 0,
        .n_rows = n,
        .n_out = n_out,
        .part_cells = parts->part_cells,
        .n_parts = parts->n_parts,
        .panel_cells = matrix->k_cells,
        .first_cell = args->first_k / inputs,
        .n_cells = n_inputs / inputs,
        .out_stride = args->dst_stride,
        .flags = (args->bias ? LINEAR_BIAS : 0) | (args->add ? LINEAR_ADD : 0) |
                 (args->softcap != 0 ? LINEAR_SOFTCAP : 0) |
                 (matrix->scale != 0 ? LINEAR_SCALE : 0) | (args->clip != 0 ? LINEAR_CLIP : 0),
        .softcap = args->softcap,
        .scale = matrix->scale,
        .clip = args->clip,
    };
    return gpu_queue_dispatch(ops->queue, kernel_choose(ops, &tiles, matrix->type, 0), &params,
                              sizeof params, (n + tiles.rows - 1) / tiles.rows,
                              (n_out + tiles.columns - 1) / tiles.columns, 1,
                              2.0 * n * n_out * n_inputs, error);
}

int linear_matrix(struct ops *ops, const struct op_matrix *matrix,
                  const struct op_linear_args *args, uint32_t n_inputs, struct error *error) {
    struct parts parts;
    uint64_t range;
    uint32_t step = linear_rows_at_once(ops, 128, matrix->n, n_inputs);
    if (args->n_rows == 0)
        return 0;
    if (parts_make(ops, matrix, n_inputs, args->n_rows, &step, &parts, &range, error))
        return -1;
    for (uint32_t row = 0, n; row < args->n_rows; row += n) {
        n = args->n_rows - row < step ? args->n_rows - row : step;
        if (split(ops, args->x + 4 * (uint64_t)row * args->x_stride, n, args->x_stride, n_inputs,
                  n_inputs, &parts, error))
            return -1;
        for (uint32_t c = 0; c < matrix->n_segments; c++)
            if (segment_forward(ops, matrix, c, args, &parts, range, n_inputs, row, n, error))
                return -1;
    }
    return 0;
}

/* The part of a backward product that rows [from, from + n_sum) of a segment give; `first` of dy's
 * columns lie before theirs. */
struct back_step {
    uint32_t segment, from, n_sum, flags;
    uint64_t first;
};

static int segment_back(struct ops *ops, const struct op_matrix *matrix,
                        const struct op_linear_bwd_args *args, const struct back_step *part,
                        uint32_t n_k, struct error *error) {
    struct tiles tiles = tiles_choose(ops, n_k, matrix->type, 1);
    struct parts parts;
    uint64_t range;
    uint32_t step = linear_rows_at_once(ops, 128, part->n_sum, n_k),
             inputs = op_cell_inputs(matrix->type);
    if (parts_make(ops, matrix, part->n_sum, args->n_rows, &step, &parts, &range, error))
        return -1;
    for (uint32_t row = 0, n; row < args->n_rows; row += n) {
        n = args->n_rows - row < step ? args->n_rows - row : step;
        struct linear_matrix_params params = {
            .x = parts.cells,
            .scales = parts.scales,
            .weights = matrix->segments[part->segment].address,
            .range = range,
            .dst = args->dx + 4 * (uint64_t)row * args->x_stride,
            .n_rows = n,
            .n_out = n_k,
            .part_cells = parts.part_cells,
            .n_parts = parts.n_parts,
            .panel_cells = matrix->k_cells,
            .first_cell = args->first_k / inputs,
            .n_cells = n_k / inputs,
            .first_row = part->from,
            .n_sum = part->n_sum,
            .out_stride = args->x_stride,
            .flags = part->flags,
            .scale = matrix->scale,
        };
        if (split(ops, args->dy + 4 * ((uint64_t)row * args->y_stride + part->first), n,
                  args->y_stride, part->n_sum, part->n_sum, &parts, error) ||
            gpu_queue_dispatch(ops->queue, kernel_choose(ops, &tiles, matrix->type, 1), &params,
                               sizeof params, (n + tiles.rows - 1) / tiles.rows,
                               (n_k + tiles.columns - 1) / tiles.columns, 1,
                               2.0 * n * part->n_sum * n_k, error))
            return -1;
    }
    return 0;
}

int linear_bwd_matrix(struct ops *ops, const struct op_matrix *matrix,
                      const struct op_linear_bwd_args *args, uint32_t n_sum, uint32_t n_k,
                      struct error *error) {
    uint32_t add = args->add ? LINEAR_ADD : 0, end = args->first_n + n_sum;
    for (uint32_t c = 0; c < matrix->n_segments && args->n_rows; c++) {
        uint32_t first = matrix->segments[c].first, past = first + matrix->segments[c].count,
                 from = args->first_n > first ? args->first_n : first, to = end < past ? end : past;
        if (from >= to)
            continue;
        struct back_step part = {
            .segment = c,
            .from = from - first,
            .n_sum = to - from,
            .flags = add | (to == end && matrix->scale != 0 ? LINEAR_SCALE : 0),
            .first = from - args->first_n,
        };
        if (segment_back(ops, matrix, args, &part, n_k, error))
            return -1;
        add = LINEAR_ADD;
    }
    return 0;
}

/* What dots of rows need: slices, and bytes of their sums, scales and split rows. */
struct dots_memory {
    uint32_t n_slices, slice_k, step; /* step: slices that are multiplied at once */
    uint64_t row, sums, scales, bytes;
};

static struct dots_memory dots_memory(int fast, uint32_t n_a, uint32_t n_b, uint32_t n_k) {
    struct dots_memory m = {.n_slices = (n_k + DOTS_SLICE - 1) / DOTS_SLICE};
    uint64_t rows = n_a + (uint64_t)n_b;
    m.slice_k = m.n_slices > 1 ? DOTS_SLICE : n_k;
    m.row = row_bytes(fast, m.slice_k) - 4;
    /* Slices are independent until they are added, so as many as fit are multiplied at once. */
    uint64_t fit = rows && n_k ? SPLIT_BYTES / (rows * m.row) : 0;
    m.step = fit < 1 ? 1 : fit < m.n_slices ? (uint32_t)fit : m.n_slices;
    m.sums = align(4 * (uint64_t)m.n_slices * n_a * n_b);
    m.scales = align(4 * rows * m.step);
    m.bytes = m.sums + m.scales + rows * m.row * m.step;
    return m;
}

uint64_t op_dots_bytes(uint32_t n_a, uint32_t n_b, uint32_t n_k) {
    return dots_memory(0, n_a, n_b, n_k).bytes;
}

int dots_matrix(struct ops *ops, const struct dots_params *params, struct error *error) {
    struct dots_memory memory = dots_memory(ops->fast, params->n_a, params->n_b, params->n_k);
    uint32_t n_slices = memory.n_slices, slice_k = memory.slice_k,
             n_dst = params->n_a * params->n_b;
    struct parts a = {.part_cells = part_cells(slice_k), .n_parts = n_parts(ops)}, b = a;
    uint64_t row = memory.row;
    if (n_dst == 0)
        return 0;
    if (params->n_k == 0 || n_slices > 65535)
        return error_set(error, ERROR_VALUE, "dots of rows of %u values", params->n_k);
    uint32_t step = memory.step;
    uint64_t sums = memory.sums, scales = memory.scales;
    struct gpu_buffer *buffer;
    if (scratch_get(ops, memory.bytes, &buffer, error))
        return -1;
    uint64_t base = gpu_buffer_address(buffer);
    a.scales = base + sums;
    b.scales = a.scales + 4 * (uint64_t)params->n_a * step;
    a.cells = base + sums + scales;
    b.cells = a.cells + params->n_a * row * step;
    const struct gpu_device_info *info = gpu_device_get_info(ops->device);
    const struct tiles tiles = {4 * info->matrix_m, 4 * info->matrix_n, 0};
    for (uint32_t slice = 0, n; slice < n_slices; slice += n) {
        n = n_slices - slice < step ? n_slices - slice : step;
        uint32_t first = slice * slice_k,
                 n_k = n * slice_k < params->n_k - first ? n * slice_k : params->n_k - first;
        struct linear_matrix_params product = {
            .x = a.cells,
            .scales = a.scales,
            .weights = b.cells,
            .range = b.scales,
            .dst = n_slices > 1 ? base + 4 * (uint64_t)slice * n_dst : params->dst,
            .n_rows = params->n_a,
            .n_out = params->n_b,
            .part_cells = a.part_cells,
            .n_parts = a.n_parts,
            .out_stride = params->n_b,
        };
        if (split(ops, params->a + 4 * (uint64_t)first, params->n_a, params->n_k, n_k, slice_k, &a,
                  error) ||
            split(ops, params->b + 4 * (uint64_t)first, params->n_b, params->n_k, n_k, slice_k, &b,
                  error) ||
            gpu_queue_dispatch(ops->queue, kernel_dots_matrix(ops->fast != 0), &product,
                               sizeof product, (params->n_a + tiles.rows - 1) / tiles.rows,
                               (params->n_b + tiles.columns - 1) / tiles.columns, n,
                               2.0 * n_dst * n_k, error))
            return -1;
    }
    struct sum_slices_params sum = {
        .src = base, .dst = params->dst, .n = n_dst, .n_slices = n_slices};
    return n_slices == 1 ? 0
                         : gpu_queue_dispatch(ops->queue, KERNEL_sum_slices, &sum, sizeof sum,
                                              (n_dst + ops->workgroup - 1) / ops->workgroup, 1, 1,
                                              1.0 * n_dst * n_slices, error);
}
