/* The logit lens: normed vectors times the unembedding, a vocabulary tile at a time, without the
 * biases of either. The largest logits of each tile are merged into running lists. */
#include <string.h>

#include "analysis/ov.h"
#include "run/work.h"

/* columns of a vocabulary tile: whole panels, so that the matrix kernels can treat it as a matrix
 */
#define LENS_COLUMNS 8192

/* Buffers of one call. lists and back: values [rows, k], then indices. */
struct lens_memory {
    struct gpu_buffer *input, *normed, *tile, *lists, *back;
};

static void memory_free(struct lens_memory *m) {
    struct gpu_buffer *buffers[] = {m->input, m->normed, m->tile, m->lists, m->back};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        gpu_buffer_destroy(buffers[i]);
}

static uint32_t tile_columns(const struct run_work *work) {
    return work->model->facts.d_vocab < LENS_COLUMNS ? work->model->facts.d_vocab : LENS_COLUMNS;
}

static int memory_make(struct run_work *work, uint32_t rows, uint32_t k, struct lens_memory *m,
                       struct error *error) {
    struct gpu_device *device = work->model->ops.device;
    uint64_t vectors = 4 * (uint64_t)rows * work->d_stride, lists = 8 * (uint64_t)rows * k;
    return gpu_buffer_create(&m->input, device, vectors, GPU_UPLOAD, "lens vectors", error) ||
                   gpu_buffer_create(&m->normed, device, vectors, GPU_DEVICE_LOCAL, "lens, normed",
                                     error) ||
                   gpu_queue_zero(work->model->ops.queue, m->normed, 0, gpu_buffer_size(m->normed),
                                  error) ||
                   gpu_buffer_create(&m->tile, device,
                                     4 * (uint64_t)rows * op_row_stride(tile_columns(work)),
                                     GPU_DEVICE_LOCAL, "lens logits", error) ||
                   gpu_buffer_create(&m->lists, device, lists, GPU_DEVICE_LOCAL, "lens lists",
                                     error) ||
                   gpu_buffer_create(&m->back, device, lists, GPU_READBACK, "lens answer", error)
               ? -1
               : 0;
}

/* work->unembed_norms: 1 / |row| of the unembedding, computed once. */
static int norms_make(struct run_work *work, struct error *error) {
    struct model *model = work->model;
    if (work->unembed_norms)
        return 0;
    if (gpu_buffer_create(&work->unembed_norms, model->ops.device,
                          4 * (uint64_t)model->facts.d_vocab, GPU_DEVICE_LOCAL,
                          "unembedding's norms", error))
        return -1;
    if (op_row_norms(&model->ops, &model->unembed, gpu_buffer_address(work->unembed_norms),
                     error) ||
        gpu_queue_wait(model->ops.queue, error)) {
        gpu_queue_abandon(model->ops.queue);
        gpu_buffer_destroy(work->unembed_norms);
        work->unembed_norms = NULL;
        return -1;
    }
    return 0;
}

/* The lists of vectors [first, first + n); waits for the device. */
static int rows_run(struct run_work *work, const struct ov_lens *lens, uint32_t first, uint32_t n,
                    const struct lens_memory *m, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    struct ops *ops = &work->model->ops;
    uint32_t step = tile_columns(work), stride = op_row_stride(step);
    uint64_t lists = gpu_buffer_address(m->lists), half = 4 * (uint64_t)n * lens->k;
    float *to = gpu_buffer_map(m->input);
    memset(to, 0, 4 * (size_t)n * work->d_stride);
    for (uint32_t i = 0; i < n; i++)
        memcpy(to + (size_t)i * work->d_stride, lens->vectors + (size_t)(first + i) * f->d_model,
               f->d_model * sizeof *to);
    struct norm_params norm = {
        .x = gpu_buffer_address(m->input),
        .gain = work->model->ln_final,
        .dst = gpu_buffer_address(m->normed),
        .width = f->d_model,
        .stride = work->d_stride,
        .eps = f->norm_eps,
        .flags = f->norm == NORM_KIND_LAYER ? NORM_LAYER : 0,
    };
    if (op_norm(ops, &norm, n, error))
        return -1;
    for (uint32_t c = 0, count; c < f->d_vocab; c += count) {
        struct op_matrix part;
        count = f->d_vocab - c < step ? f->d_vocab - c : step;
        struct op_linear_args product = {
            .x = norm.dst,
            .dst = gpu_buffer_address(m->tile),
            .n_rows = n,
            .x_stride = work->d_stride,
            .dst_stride = stride,
        };
        struct topk_params merge = {
            .x = product.dst,
            .factor = lens->cosine ? gpu_buffer_address(work->unembed_norms) + 4 * (uint64_t)c : 0,
            .values = lists,
            .indices = lists + half,
            .n_rows = n,
            .n_columns = count,
            .x_stride = stride,
            .first = c,
            .k = lens->k,
            .flags = (c == 0 ? TOPK_BEGIN : 0) | (lens->cosine ? TOPK_SCALED : 0),
        };
        if (op_matrix_rows(&work->model->unembed, c, count, &part, error) ||
            op_linear(ops, &part, &product, error) || op_topk(ops, &merge, error))
            return -1;
    }
    if (gpu_queue_copy(ops->queue, m->lists, 0, m->back, 0, 2 * half, error) ||
        gpu_queue_wait(ops->queue, error))
        return -1;
    memcpy(lens->values + (size_t)first * lens->k, gpu_buffer_map(m->back), half);
    memcpy(lens->indices + (size_t)first * lens->k, (const char *)gpu_buffer_map(m->back) + half,
           half);
    return 0;
}

int ov_lens_run(struct run_work *work, const struct ov_lens *lens, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    struct lens_memory memory = {0};
    if (lens->k == 0 || lens->k > TOPK_MAX || lens->k > f->d_vocab)
        return error_set(
            error, ERROR_VALUE,
            "the %u largest of %u logits: 1 to %d can be asked for, and no more than there are",
            lens->k, f->d_vocab, TOPK_MAX);
    if (lens->cosine && norms_make(work, error))
        return -1;
    uint32_t rows = lens->n < LENS_ROWS ? lens->n : LENS_ROWS;
    int failed = lens->n ? memory_make(work, rows, lens->k, &memory, error) : 0;
    for (uint32_t first = 0, n; first < lens->n && !failed; first += n) {
        n = lens->n - first < rows ? lens->n - first : rows;
        failed = rows_run(work, lens, first, n, &memory, error);
    }
    if (failed)
        gpu_queue_abandon(work->model->ops.queue);
    memory_free(&memory);
    return failed;
}
