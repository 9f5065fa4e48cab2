/* What the two runs of an attribution predict at chosen tokens: final rows, greedy tokens and the
 * KL divergence between the runs. */
#include <stdlib.h>
#include <string.h>

#include "analysis/attribution.h"

/* What one tile of picks needs on the device and on the host. */
struct picks_tile {
    const struct attribution_picks *picks;
    uint32_t first, n;     /* picks */
    uint32_t v_stride;     /* floats of a row of logits on the device */
    uint64_t rows[2];      /* device, of each run: [n, d_stride] final rows, */
    uint64_t logits[2];    /* [n, v_stride] */
    float *normed[2];      /* host, of each run: [n, D], */
    float *host_logits[2]; /* [n, V] */
};

/* The rows of run 0 or 1 that the tile reads, after the final norm, and their logits. */
static int rows_compute(struct attribution *a, const struct picks_tile *tile, int run,
                        struct error *error) {
    struct run_work *work = a->work;
    const struct model *model = work->model;
    uint32_t *tokens = malloc(tile->n * sizeof *tokens);
    uint64_t uploaded;
    if (!tokens)
        return error_set(error, ERROR_MEMORY, "out of memory for a metric");
    for (uint32_t i = 0; i < tile->n; i++)
        tokens[i] = tile->picks->tokens[2 * (size_t)(tile->first + i) + (size_t)run];
    int failed = work_upload(work, tokens, tile->n * sizeof *tokens, &uploaded, error);
    free(tokens);
    if (failed)
        return -1;
    struct copy_params copy = {
        .x = run_address(work->norm),
        .dst = tile->rows[run],
        .rows = uploaded,
        .n_rows = tile->n,
        .width = model->facts.d_model,
        .x_stride = work->d_stride,
        .out_stride = work->d_stride,
        .flags = COPY_ROWS,
    };
    struct op_linear_args linear = {
        .x = tile->rows[run],
        .dst = tile->logits[run],
        .bias = model->b_unembed,
        .n_rows = tile->n,
        .x_stride = work->d_stride,
        .dst_stride = tile->v_stride,
    };
    RUN(op_copy(&work->model->ops, &copy, error));
    return op_linear(&work->model->ops, &model->unembed, &linear, error);
}

/* Rows [n, stride] of the device to the host array `to` [n, width], at the next drain. */
static int rows_read(struct run_work *work, uint64_t from, uint32_t n, uint32_t stride,
                     uint32_t width, float *to, struct error *error) {
    uint32_t taken = n;
    uint64_t offset;
    RUN(work_readback_take(work, &taken, width, &offset, error));
    if (taken < n)
        return error_set(error, ERROR_DEVICE, "%u rows of logits do not fit the readback memory",
                         n);
    struct copy_params pack = {
        .x = from,
        .dst = run_address(work->readback) + 4 * offset,
        .n_rows = n,
        .width = width,
        .x_stride = stride,
        .out_stride = width,
    };
    struct readback readback = {
        .to = to,
        .offset = offset,
        .n = n,
        .token_floats = width,
        .width = width,
        .plain = 1,
    };
    RUN(op_copy(&work->model->ops, &pack, error));
    return work_readback_push(work, &readback, error);
}

/* The greedy token of a row, the lowest id of equals, and its distance to the second. */
static void greedy(const float *logits, uint32_t width, int32_t *top, float *margin) {
    float best = logits[0], second = -3.402823466e38f;
    *top = 0;
    for (uint32_t i = 1; i < width; i++) {
        if (logits[i] > best) {
            second = best;
            best = logits[i];
            *top = (int32_t)i;
        } else if (logits[i] > second) {
            second = logits[i];
        }
    }
    *margin = best - second;
}

/* KL(second || first) of the tile's picks, at the next drain. */
static int kl_compute(struct attribution *a, const struct picks_tile *tile, struct error *error) {
    struct run_work *work = a->work;
    const struct model_facts *f = &work->model->facts;
    const struct attribution_picks *picks = tile->picks;
    uint64_t uploaded, values;
    float *weights = calloc(tile->n, sizeof *weights); /* zero: the values, without gradients */
    if (!weights)
        return error_set(error, ERROR_MEMORY, "out of memory for a metric");
    int failed = work_upload(work, weights, tile->n * sizeof *weights, &uploaded, error);
    free(weights);
    if (failed || work_readback_floats(work, tile->n, picks->kl + tile->first, &values, error))
        return -1;
    struct logit_grad_params kl = {
        .logits = tile->logits[0],
        .reference = tile->logits[1],
        .weights = uploaded,
        .values = values,
        .width = f->d_vocab,
        .stride = tile->v_stride,
        .kind = LOGIT_GRAD_KL,
        .softcap = picks->capped ? f->final_softcap : 0,
        .reference_softcap = picks->capped ? f->final_softcap : 0,
    };
    return op_logit_grad(&work->model->ops, &kl, tile->n, error);
}

/* Both runs' logits of the tile's picks, and what is read of them. */
static int tile_run(struct attribution *a, const struct picks_tile *tile, struct error *error) {
    const struct model_facts *f = &a->work->model->facts;
    const struct attribution_picks *picks = tile->picks;
    for (int run = 0; run < 2; run++) {
        RUN(rows_compute(a, tile, run, error));
        RUN(rows_read(a->work, tile->rows[run], tile->n, a->work->d_stride, f->d_model,
                      tile->normed[run], error));
        RUN(rows_read(a->work, tile->logits[run], tile->n, tile->v_stride, f->d_vocab,
                      tile->host_logits[run], error));
    }
    if (picks->kl)
        RUN(kl_compute(a, tile, error));
    RUN(work_readback_drain(a->work, error));
    for (uint32_t i = 0; i < tile->n; i++)
        for (uint32_t run = 0; run < 2; run++) {
            size_t to = 2 * (size_t)(tile->first + i) + run;
            greedy(tile->host_logits[run] + (size_t)i * f->d_vocab, f->d_vocab, &picks->top[to],
                   &picks->margin[to]);
            if (picks->normed)
                memcpy(picks->normed + to * f->d_model, tile->normed[run] + (size_t)i * f->d_model,
                       f->d_model * sizeof *picks->normed);
        }
    return 0;
}

/* Lays a tile of n picks out in a->picks and in `host`, room for 2 n (D + V) floats. */
static struct picks_tile tile_at(const struct attribution *a, const struct attribution_picks *picks,
                                 uint32_t first, uint32_t n, uint32_t v_stride, float *host) {
    const struct model_facts *f = &a->work->model->facts;
    uint64_t at = run_address(a->picks), rows = 4 * (uint64_t)n * a->work->d_stride,
             logits = 4 * (uint64_t)n * v_stride;
    float *host_logits = host + 2 * (size_t)n * f->d_model;
    return (struct picks_tile){
        .picks = picks,
        .first = first,
        .n = n,
        .v_stride = v_stride,
        .rows = {at, at + rows},
        .logits = {at + 2 * rows, at + 2 * rows + logits},
        .normed = {host, host + (size_t)n * f->d_model},
        .host_logits = {host_logits, host_logits + (size_t)n * f->d_vocab},
    };
}

uint64_t attribution_picks_bytes(const struct model_facts *f, uint32_t n, uint32_t *at_once) {
    uint64_t pick = 8 * ((uint64_t)op_row_stride(f->d_model) + op_row_stride(f->d_vocab)),
             most = ATTRIBUTION_PICKS_BYTES / pick;
    most = most < ATTRIBUTION_PICKS_ROWS ? ATTRIBUTION_PICKS_ROWS : most;
    *at_once = most < n ? (uint32_t)most : n;
    return *at_once * pick;
}

int attribution_picks_read(struct attribution *a, const struct attribution_picks *picks,
                           struct error *error) {
    struct run_work *work = a->work;
    const struct model_facts *f = &work->model->facts;
    uint32_t v_stride = op_row_stride(f->d_vocab), at_once;
    if (!picks || picks->m == 0)
        return gpu_queue_wait(work->model->ops.queue, error);
    uint64_t bytes = attribution_picks_bytes(f, picks->m, &at_once);
    float *host = malloc(2 * (size_t)at_once * (f->d_model + (size_t)f->d_vocab) * sizeof *host);
    if (!host)
        return error_set(error, ERROR_MEMORY, "out of memory for logits");
    int failed = work_grow(work, &a->picks, bytes, "logits of two runs", error) ||
                 run_final_norm(work, error);
    for (uint32_t first = 0, n; first < picks->m && !failed; first += n) {
        n = picks->m - first < at_once ? picks->m - first : at_once;
        struct picks_tile tile = tile_at(a, picks, first, n, v_stride, host);
        failed = tile_run(a, &tile, error);
    }
    free(host);
    return failed ? -1 : 0;
}
