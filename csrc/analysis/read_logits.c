/* Metrics of final logits, a tile of tokens at a time; see read_logits.h. */
#include "analysis/read_logits.h"

#include <stdlib.h>
#include <string.h>

#define LOGITS_BYTES (UINT64_C(16) << 20)   /* logits of the rows that are computed at once */
#define REFERENCE_BYTES (UINT64_C(8) << 20) /* reference logits of one tile of tokens */
#define ROWS_A_GRID 32768                   /* rows of one dispatch with a workgroup a row */

/* Rows of logits that fit `bytes`: at least `least`, at most a grid. */
static uint32_t rows_in(const struct model_facts *f, uint64_t bytes, uint32_t least) {
    uint64_t rows = bytes / (4 * (uint64_t)op_row_stride(f->d_vocab));
    return rows < least ? least : rows > ROWS_A_GRID ? ROWS_A_GRID : (uint32_t)rows;
}

uint32_t read_tile(const struct model_facts *f) { return rows_in(f, REFERENCE_BYTES, 8); }

uint64_t read_bytes(const struct model_facts *f) {
    return 4 * (uint64_t)op_row_stride(f->d_vocab) *
           (rows_in(f, LOGITS_BYTES, 16) + 2 * (uint64_t)read_tile(f));
}

void read_memory_free(struct read_memory *memory) {
    struct gpu_buffer *buffers[] = {memory->rows, memory->logits, memory->reference};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        gpu_buffer_destroy(buffers[i]);
    memset(memory, 0, sizeof *memory);
}

/* Readback memory at *at for values [n_runs, n, each], which the next drain copies to `to`
 * [n_runs, all, each] from token `first` on. */
static int values_take(struct run_work *work, float *to, uint32_t all, uint32_t first, uint32_t n,
                       uint32_t each, uint32_t n_runs, uint64_t *at, struct error *error) {
    uint32_t one = 1;
    uint64_t offset;
    RUN(work_readback_take(work, &one, n_runs * n * each, &offset, error));
    *at = run_address(work->readback) + 4 * offset;
    for (uint32_t e = 0; e < n_runs; e++) {
        struct readback readback = {
            .to = to + ((size_t)e * all + first) * each,
            .offset = offset + (uint64_t)e * n * each,
            .n = n,
            .token_floats = each,
            .width = each,
            .plain = 1,
        };
        RUN(work_readback_push(work, &readback, error));
    }
    return 0;
}

int read_pairs(struct run_work *work, struct read_memory *memory, const struct read_request *read,
               uint32_t first, uint32_t n, uint64_t normed, uint32_t n_runs, struct error *error) {
    const struct model *model = work->model;
    uint64_t ids, values;
    struct token_meta *meta = calloc(2 * (size_t)n, sizeof *meta);
    if (!meta)
        return error_set(error, ERROR_MEMORY, "out of memory for a metric");
    for (uint32_t i = 0; i < n; i++) {
        meta[2 * i].id = read->a[first + i];
        meta[2 * i + 1].id = read->b[first + i];
    }
    int failed = work_upload(work, meta, 2 * (uint64_t)n * sizeof *meta, &ids, error);
    free(meta);
    if (failed)
        return -1;
    RUN(work_grow(work, &memory->rows, 8 * (uint64_t)n * work->d_stride, "rows of the unembedding",
                  error));
    struct op_embed_args rows_of = {
        .tokens = ids,
        .dst = run_address(memory->rows),
        .n_tokens = 2 * n,
        .stride = work->d_stride,
        .scale = 1,
    };
    RUN(op_embed(&work->model->ops, &model->unembed, &rows_of, error));
    RUN(values_take(work, read->pairs, read->n, first, n, 2, n_runs, &values, error));
    struct pair_logits_params params = {
        .normed = normed,
        .rows = run_address(memory->rows),
        .logits = values,
        .bias = model->b_unembed,
        .ids = ids,
        .has_bias = model->b_unembed != 0,
        .n = n,
        .width = model->facts.d_model,
        .stride = work->d_stride,
        .softcap = read->softcap,
    };
    return op_pair_logits(&work->model->ops, &params, n_runs, error);
}

/* Uploads rows [n, D], padded with zeros to [n, d_stride]. */
static int rows_upload(struct run_work *work, const float *rows, uint32_t n, uint64_t *address,
                       struct error *error) {
    uint32_t width = work->model->facts.d_model, stride = work->d_stride;
    float *padded = calloc((size_t)n * stride, sizeof *padded);
    if (!padded)
        return error_set(error, ERROR_MEMORY, "out of memory for final rows");
    for (uint32_t i = 0; i < n; i++)
        memcpy(padded + (size_t)i * stride, rows + (size_t)i * width, width * sizeof *padded);
    int failed = work_upload(work, padded, 4 * (uint64_t)n * stride, address, error);
    free(padded);
    return failed;
}

/* Logits [n, V] of normed rows; softcap 0: none. */
static int unembed(struct run_work *work, uint64_t rows, uint32_t n, uint64_t to, float softcap,
                   struct error *error) {
    struct op_linear_args args = {
        .x = rows,
        .dst = to,
        .bias = work->model->b_unembed,
        .n_rows = n,
        .x_stride = work->d_stride,
        .dst_stride = op_row_stride(work->model->facts.d_vocab),
        .softcap = softcap,
    };
    return op_linear(&work->model->ops, &work->model->unembed, &args, error);
}

int read_distributions(struct run_work *work, struct read_memory *memory,
                       const struct read_request *read, uint32_t first, uint32_t n, uint64_t normed,
                       uint32_t n_runs, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint32_t width = f->d_model, v_stride = op_row_stride(f->d_vocab),
             at_once = rows_in(f, LOGITS_BYTES, 16);
    uint64_t rows = (uint64_t)n_runs * n, targets, uploaded, values,
             row_bytes = 4 * (uint64_t)v_stride;
    RUN(work_grow(work, &memory->logits, at_once * row_bytes, "logits", error));
    RUN(work_grow(work, &memory->reference, 2 * (uint64_t)read_tile(f) * row_bytes,
                  "reference logits", error));
    uint64_t reference = run_address(memory->reference),
             other = reference + read_tile(f) * row_bytes;
    RUN(rows_upload(work, read->reference + (size_t)first * width, n, &uploaded, error));
    RUN(unembed(work, uploaded, n, reference, 0, error));
    RUN(rows_upload(work, read->other + (size_t)first * width, n, &uploaded, error));
    RUN(unembed(work, uploaded, n, other, 0, error));
    RUN(work_upload(work, read->targets + first, 4 * (uint64_t)n, &targets, error));
    RUN(values_take(work, read->distributions, read->n, first, n, 4, n_runs, &values, error));
    for (uint64_t row = 0, some; row < rows; row += some) {
        some = rows - row < at_once ? rows - row : at_once;
        RUN(unembed(work, normed + 4 * row * work->d_stride, (uint32_t)some,
                    run_address(memory->logits), 0, error));
        struct logit_metrics_params params = {
            .logits = run_address(memory->logits),
            .reference = reference,
            .other = other,
            .targets = targets,
            .values = values + 16 * row,
            .first = (uint32_t)(row % n),
            .n = n,
            .width = f->d_vocab,
            .stride = v_stride,
            .softcap = read->softcap,
        };
        RUN(op_logit_metrics(&work->model->ops, &params, (uint32_t)some, error));
    }
    return 0;
}

int read_logits(struct run_work *work, struct read_memory *memory, const struct read_request *read,
                uint32_t first, uint32_t n, uint64_t normed, uint32_t n_runs, struct error *error) {
    uint32_t v = work->model->facts.d_vocab, stride = op_row_stride(v);
    uint64_t offset;
    (void)memory;
    for (uint32_t e = 0; e < n_runs; e++)
        for (uint32_t done = 0, some; done < n; done += some) {
            some = n - done;
            RUN(work_readback_take(work, &some, stride, &offset, error));
            RUN(unembed(work, normed + 4 * ((uint64_t)e * n + done) * work->d_stride, some,
                        run_address(work->readback) + 4 * offset, read->softcap, error));
            for (uint32_t i = 0; i < some; i++) { /* without the pad columns */
                struct readback readback = {
                    .to = read->logits + ((size_t)e * read->n + first + done + i) * v,
                    .offset = offset + (uint64_t)i * stride,
                    .n = 1,
                    .token_floats = v,
                    .width = v,
                    .plain = 1,
                };
                RUN(work_readback_push(work, &readback, error));
            }
        }
    return 0;
}

/* Uploads the rows of tokens [first, first + n) of every run: [n_runs, n, d_stride]. */
static int tile_upload(struct run_work *work, const struct read_request *read, const float *rows,
                       uint32_t n_runs, uint32_t first, uint32_t n, uint64_t *address,
                       struct error *error) {
    size_t width = work->model->facts.d_model;
    float *tile = malloc((size_t)n_runs * n * width * sizeof *tile);
    if (!tile)
        return error_set(error, ERROR_MEMORY, "out of memory for final rows");
    for (uint32_t e = 0; e < n_runs; e++)
        memcpy(tile + (size_t)e * n * width, rows + ((size_t)e * read->n + first) * width,
               n * width * sizeof *tile);
    int failed = rows_upload(work, tile, n_runs * n, address, error);
    free(tile);
    return failed;
}

/* Uploads rows a tile at a time and reads their metrics. */
static int measure(struct run_work *work, struct read_memory *memory,
                   const struct read_request *read, const float *rows, uint32_t n_runs,
                   struct error *error) {
    uint32_t at_once = read_tile(&work->model->facts) < 256 ? read_tile(&work->model->facts) : 256;
    for (uint32_t first = 0, n; first < read->n; first += n) {
        uint64_t normed;
        n = read->n - first < at_once ? read->n - first : at_once;
        RUN(work_upload_reset(work, error));
        RUN(tile_upload(work, read, rows, n_runs, first, n, &normed, error));
        if (read->pairs)
            RUN(read_pairs(work, memory, read, first, n, normed, n_runs, error));
        if (read->distributions)
            RUN(read_distributions(work, memory, read, first, n, normed, n_runs, error));
        RUN(work_readback_drain(work, error));
    }
    return 0;
}

int read_measure(struct run_work *work, const struct read_request *read, const float *rows,
                 uint32_t n_runs, struct error *error) {
    struct read_memory memory = {0};
    work->n_pending = 0;
    work->readback_used = 0;
    int failed = measure(work, &memory, read, rows, n_runs, error);
    if (failed)
        gpu_queue_abandon(work->model->ops.queue);
    read_memory_free(&memory);
    return failed;
}
