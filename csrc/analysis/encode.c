/* Encoding with a sparse autoencoder: tiles of tokens times tiles of features. */
#include "analysis/encode.h"

#include <stdlib.h>
#include <string.h>

struct encoder {
    struct model *model;
    uint32_t n_features, width, kind, rows, columns, x_stride, stride, vector_stride;
    struct op_matrix matrix;
    struct gpu_buffer *weights[OP_MATRIX_SEGMENTS];
    struct gpu_buffer *vectors; /* three of vector_stride floats */
    struct gpu_buffer *range;   /* of the matrix, measured before its first product that needs it */
    struct gpu_buffer *input, *tile;
};

void encoder_destroy(struct encoder *e) {
    if (!e)
        return;
    for (int i = 0; i < OP_MATRIX_SEGMENTS; i++)
        gpu_buffer_destroy(e->weights[i]);
    gpu_buffer_destroy(e->vectors);
    gpu_buffer_destroy(e->range);
    gpu_buffer_destroy(e->input);
    gpu_buffer_destroy(e->tile);
    free(e);
}

static int matrix_make(struct encoder *e, struct error *error) {
    struct gpu_device *device = e->model->ops.device;
    uint64_t panel = op_matrix_bytes(WEIGHT_F32, OP_PANEL, e->width);
    uint32_t each = (uint32_t)(GPU_BUFFER_MAX / 2 / panel) * OP_PANEL;
    struct op_matrix *m = &e->matrix;
    *m = (struct op_matrix){
        .type = WEIGHT_F32,
        .n = e->n_features,
        .k = e->width,
        .k_cells = op_matrix_cells(WEIGHT_F32, e->width),
    };
    for (uint32_t first = 0; first < e->n_features; first += each, m->n_segments++) {
        uint32_t s = m->n_segments, n = e->n_features - first < each ? e->n_features - first : each;
        if (s == OP_MATRIX_SEGMENTS)
            return error_set(error, ERROR_VALUE, "%u features of width %u are too many",
                             e->n_features, e->width);
        if (gpu_buffer_create(&e->weights[s], device, op_matrix_bytes(WEIGHT_F32, n, e->width),
                              GPU_DEVICE_LOCAL, "encoder", error))
            return -1;
        m->segments[s].address = gpu_buffer_address(e->weights[s]);
        m->segments[s].first = first;
        m->segments[s].count = n;
    }
    return 0;
}

int encoder_create(struct encoder **out, struct model *model, uint32_t n_features, uint32_t width,
                   uint32_t kind, uint32_t rows, uint32_t columns, struct error *error) {
    struct gpu_device *device = model->ops.device;
    *out = NULL;
    if (n_features == 0 || n_features > 1u << 24 || width == 0 || width > 1u << 20 ||
        kind >= ENCODER_KINDS || rows == 0 || rows > 1u << 16 || columns == 0 ||
        columns % OP_PANEL || columns > 1u << 20)
        return error_set(error, ERROR_VALUE,
                         "no encoder of %u features, width %u, kind %u in tiles of %u x %u",
                         n_features, width, kind, rows, columns);
    struct encoder *e = calloc(1, sizeof *e);
    if (!e)
        return error_set(error, ERROR_MEMORY, "out of memory for an encoder");
    e->model = model;
    e->n_features = n_features;
    e->width = width;
    e->kind = kind;
    e->rows = rows;
    e->columns = columns;
    e->x_stride = op_row_stride(width);
    e->stride = op_row_stride(columns);
    e->vector_stride = op_row_stride(n_features);
    if (matrix_make(e, error) ||
        gpu_buffer_create(&e->vectors, device, 12 * (uint64_t)e->vector_stride, GPU_DEVICE_LOCAL,
                          "encoder's vectors", error) ||
        gpu_buffer_create(&e->range, device, 4, GPU_DEVICE_LOCAL, "encoder's range", error) ||
        gpu_buffer_create(&e->input, device, 4 * (uint64_t)rows * e->x_stride, GPU_UPLOAD,
                          "encoder's input", error) ||
        gpu_buffer_create(&e->tile, device, 4 * (uint64_t)rows * e->stride, GPU_DEVICE_LOCAL,
                          "features", error)) {
        encoder_destroy(e);
        return -1;
    }
    memset(gpu_buffer_map(e->input), 0, 4 * (size_t)rows * e->x_stride); /* pads stay zero */
    *out = e;
    return 0;
}

int encoder_load(struct encoder *e, uint32_t first, uint32_t n, const float *rows,
                 struct error *error) {
    struct gpu_queue *queue = e->model->ops.queue;
    struct gpu_buffer *staging = NULL;
    if (first % OP_PANEL || n == 0 || first > e->n_features || n > e->n_features - first ||
        (n % OP_PANEL && first + n != e->n_features))
        return error_set(error, ERROR_VALUE, "features %u to %u of %u are no whole panels of %d",
                         first, first + n, e->n_features, OP_PANEL);
    if (gpu_buffer_create(&staging, e->model->ops.device, op_matrix_bytes(WEIGHT_F32, n, e->width),
                          GPU_UPLOAD, "encoder's rows", error))
        return -1;
    struct weight_source source = {
        .data = rows, .type = WEIGHT_F32, .rows = n, .columns = e->width};
    weight_panels_pack(&source, WEIGHT_F32, gpu_buffer_map(staging));
    int failed = 0;
    e->matrix.range = 0; /* that of the rows before */
    for (uint32_t s = 0; s < e->matrix.n_segments && !failed; s++) {
        uint32_t begin = e->matrix.segments[s].first, end = begin + e->matrix.segments[s].count,
                 from = first > begin ? first : begin, to = first + n < end ? first + n : end;
        if (from < to)
            failed =
                gpu_queue_copy(queue, staging, op_matrix_bytes(WEIGHT_F32, from - first, e->width),
                               e->weights[s], op_matrix_bytes(WEIGHT_F32, from - begin, e->width),
                               op_matrix_bytes(WEIGHT_F32, to - from, e->width), error);
    }
    failed = failed || gpu_queue_wait(queue, error);
    if (failed)
        gpu_queue_abandon(queue);
    gpu_buffer_destroy(staging);
    return failed ? -1 : 0;
}

int encoder_vectors(struct encoder *e, const float *const vectors[3], struct error *error) {
    struct gpu_queue *queue = e->model->ops.queue;
    struct gpu_buffer *staging = NULL;
    uint64_t bytes = gpu_buffer_size(e->vectors);
    if (gpu_buffer_create(&staging, e->model->ops.device, bytes, GPU_UPLOAD, "encoder's vectors",
                          error))
        return -1;
    float *to = gpu_buffer_map(staging);
    memset(to, 0, bytes);
    for (int i = 0; i < 3; i++)
        if (vectors[i])
            memcpy(to + (size_t)i * e->vector_stride, vectors[i], 4 * (size_t)e->n_features);
    int failed = gpu_queue_copy(queue, staging, 0, e->vectors, 0, bytes, error) ||
                 gpu_queue_wait(queue, error);
    if (failed)
        gpu_queue_abandon(queue);
    gpu_buffer_destroy(staging);
    return failed ? -1 : 0;
}

static void rows_upload(struct encoder *e, const float *x, uint32_t n) {
    float *to = gpu_buffer_map(e->input);
    for (uint32_t i = 0; i < n; i++)
        memcpy(to + (size_t)i * e->x_stride, x + (size_t)i * e->width, 4 * (size_t)e->width);
}

/* Measures the range of the whole matrix where products on matrix units need one and it is not
 * known: tiles of features have no range of their own, so that results do not depend on tiles. */
static int range_measure(struct encoder *e, struct error *error) {
    struct ops *ops = &e->model->ops;
    if (e->matrix.range || ops->kernel_family != LINEAR_MATRIX)
        return 0;
    if (ops_matrix_range(ops, &e->matrix, e->range, 0, error) || gpu_queue_wait(ops->queue, error))
        return -1;
    e->matrix.range = gpu_buffer_address(e->range);
    return 0;
}

/* The features [first, first + count) of the n rows that were uploaded, into the tile. */
static int tile_encode(struct encoder *e, uint32_t first, uint32_t count, uint32_t n,
                       struct error *error) {
    struct ops *ops = &e->model->ops;
    struct op_matrix part;
    uint64_t vectors = gpu_buffer_address(e->vectors) + 4 * (uint64_t)first,
             each = 4 * (uint64_t)e->vector_stride;
    struct op_linear_args product = {
        .x = gpu_buffer_address(e->input),
        .dst = gpu_buffer_address(e->tile),
        .bias = e->kind == ENCODER_GATE ? 0 : vectors,
        .n_rows = n,
        .x_stride = e->x_stride,
        .dst_stride = e->stride,
    };
    struct feature_act_params act = {
        .x = product.dst,
        .threshold = vectors + each,
        .gate = vectors,
        .scale = vectors + each,
        .bias = vectors + 2 * each,
        .width = count,
        .stride = e->stride,
        .kind = e->kind == ENCODER_GATE ? FEATURE_GATE : FEATURE_JUMP,
    };
    if (range_measure(e, error) || op_matrix_rows(&e->matrix, first, count, &part, error) ||
        op_linear(ops, &part, &product, error))
        return -1;
    return e->kind == ENCODER_LINEAR ? 0 : op_feature_act(ops, &act, n, error);
}

struct sums {
    struct gpu_buffer *sums, *back, *segments;
    uint32_t stride, n_segments;
    const uint32_t *counts;
    uint32_t segment, taken; /* the segment that comes next, and its tokens that are done */
};

/* The parts of segments that the next n tokens are; returns how many. */
static uint32_t segments_next(struct sums *s, uint32_t n) {
    uint32_t *to = gpu_buffer_map(s->segments), parts = 0;
    for (uint32_t at = 0; at < n; parts++) {
        uint32_t left = s->counts[s->segment] - s->taken, take = left < n - at ? left : n - at;
        to[3 * parts] = at;
        to[3 * parts + 1] = take;
        to[3 * parts + 2] = s->segment;
        at += take;
        s->taken += take;
        if (s->taken == s->counts[s->segment]) {
            s->segment++;
            s->taken = 0;
        }
    }
    return parts;
}

static int sums_rows(struct encoder *e, struct sums *s, const float *x, uint32_t n,
                     struct error *error) {
    rows_upload(e, x, n);
    uint32_t parts = segments_next(s, n);
    for (uint32_t first = 0, count; first < e->n_features; first += count) {
        count = e->n_features - first < e->columns ? e->n_features - first : e->columns;
        struct feature_sums_params params = {
            .x = gpu_buffer_address(e->tile),
            .segments = gpu_buffer_address(s->segments),
            .sums = gpu_buffer_address(s->sums) + 4 * (uint64_t)first,
            .width = count,
            .x_stride = e->stride,
            .out_stride = s->stride,
        };
        if (tile_encode(e, first, count, n, error) ||
            op_feature_sums(&e->model->ops, &params, parts, n, error))
            return -1;
    }
    return gpu_queue_wait(e->model->ops.queue, error);
}

int encoder_sums(struct encoder *e, const float *x, const uint32_t *counts, uint32_t n_segments,
                 float *out, struct error *error) {
    struct gpu_device *device = e->model->ops.device;
    struct gpu_queue *queue = e->model->ops.queue;
    struct sums s = {.stride = e->vector_stride, .n_segments = n_segments, .counts = counts};
    uint64_t bytes = 4 * (uint64_t)n_segments * s.stride, total = 0;
    for (uint32_t i = 0; i < n_segments; i++) {
        if (counts[i] == 0)
            return error_set(error, ERROR_VALUE, "segment %u has no tokens", i);
        total += counts[i];
    }
    if (n_segments == 0)
        return 0;
    int failed =
        gpu_buffer_create(&s.sums, device, bytes, GPU_DEVICE_LOCAL, "feature sums", error) ||
        gpu_buffer_create(&s.back, device, bytes, GPU_READBACK, "feature sums, back", error) ||
        gpu_buffer_create(&s.segments, device, 12 * (uint64_t)e->rows, GPU_UPLOAD, "segments",
                          error) ||
        gpu_queue_zero(queue, s.sums, 0, bytes, error);
    for (uint64_t first = 0; first < total && !failed; first += e->rows) {
        uint32_t n = total - first < e->rows ? (uint32_t)(total - first) : e->rows;
        failed = sums_rows(e, &s, x + first * e->width, n, error);
    }
    failed = failed || gpu_queue_copy(queue, s.sums, 0, s.back, 0, bytes, error) ||
             gpu_queue_wait(queue, error);
    if (failed)
        gpu_queue_abandon(queue);
    else
        for (uint32_t i = 0; i < n_segments; i++)
            memcpy(out + (size_t)i * e->n_features,
                   (float *)gpu_buffer_map(s.back) + (size_t)i * s.stride,
                   4 * (size_t)e->n_features);
    gpu_buffer_destroy(s.sums);
    gpu_buffer_destroy(s.back);
    gpu_buffer_destroy(s.segments);
    return failed ? -1 : 0;
}

/* The lists of n rows: values [n, k], then indices, in `lists` and `back`. */
static int top_rows(struct encoder *e, const float *x, uint32_t n, uint32_t k,
                    struct gpu_buffer *lists, struct gpu_buffer *back, struct error *error) {
    uint64_t half = 4 * (uint64_t)n * k;
    rows_upload(e, x, n);
    for (uint32_t first = 0, count; first < e->n_features; first += count) {
        count = e->n_features - first < e->columns ? e->n_features - first : e->columns;
        struct topk_params merge = {
            .x = gpu_buffer_address(e->tile),
            .values = gpu_buffer_address(lists),
            .indices = gpu_buffer_address(lists) + half,
            .n_rows = n,
            .n_columns = count,
            .x_stride = e->stride,
            .first = first,
            .k = k,
            .flags = first == 0 ? TOPK_BEGIN : 0,
        };
        if (tile_encode(e, first, count, n, error) || op_topk(&e->model->ops, &merge, error))
            return -1;
    }
    return gpu_queue_copy(e->model->ops.queue, lists, 0, back, 0, 2 * half, error) ||
                   gpu_queue_wait(e->model->ops.queue, error)
               ? -1
               : 0;
}

int encoder_top(struct encoder *e, const float *x, uint32_t n, uint32_t k, float *values,
                float *indices, struct error *error) {
    struct gpu_device *device = e->model->ops.device;
    struct gpu_buffer *lists = NULL, *back = NULL;
    if (k == 0 || k > TOPK_MAX || k > e->n_features)
        return error_set(error, ERROR_VALUE,
                         "the %u largest of %u features: 1 to %d, and no more "
                         "than there are",
                         k, e->n_features, TOPK_MAX);
    uint32_t rows = n < e->rows ? n : e->rows;
    uint64_t bytes = 8 * (uint64_t)rows * k;
    if (n == 0)
        return 0;
    int failed =
        gpu_buffer_create(&lists, device, bytes, GPU_DEVICE_LOCAL, "feature lists", error) ||
        gpu_buffer_create(&back, device, bytes, GPU_READBACK, "feature lists, back", error);
    for (uint32_t first = 0, some; first < n && !failed; first += some) {
        some = n - first < rows ? n - first : rows;
        failed = top_rows(e, x + (size_t)first * e->width, some, k, lists, back, error);
        if (!failed) {
            const float *from = gpu_buffer_map(back);
            memcpy(values + (size_t)first * k, from, 4 * (size_t)some * k);
            memcpy(indices + (size_t)first * k, from + (size_t)some * k, 4 * (size_t)some * k);
        }
    }
    if (failed)
        gpu_queue_abandon(e->model->ops.queue);
    gpu_buffer_destroy(lists);
    gpu_buffer_destroy(back);
    return failed ? -1 : 0;
}
