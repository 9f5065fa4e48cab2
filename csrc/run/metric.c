/* Metrics of the final logits and their gradients with respect to the final norm's output. A
 * difference of two logits needs two rows of the unembedding for each token; the other metrics need
 * whole distributions, computed for a few tokens at a time. */
#include <stdlib.h>
#include <string.h>

#include "run/tape.h"

#define LOGITS_BYTES (UINT64_C(64) << 20) /* of logits at once */

/* device: [n, d_stride], [n + 1, d_stride] with a zero row at the end, [n], [n] */
struct metric_rows {
    uint64_t normed, dnormed, weights, tokens;
};

static int pairs(struct run_work *work, struct run_tape *tape, const struct run_metric *metric,
                 const struct metric_rows *rows, struct error *error) {
    const struct model *model = work->model;
    uint32_t d = work->d_stride;
    uint64_t ids, values;
    struct token_meta *meta = calloc(2 * (size_t)metric->n, sizeof *meta);
    if (!meta)
        return error_set(error, ERROR_MEMORY, "out of memory for a metric");
    for (uint32_t i = 0; i < metric->n; i++) {
        meta[2 * i].id = metric->a[i];
        meta[2 * i + 1].id = metric->b[i];
    }
    int failed = work_upload(work, meta, 2 * (uint64_t)metric->n * sizeof *meta, &ids, error);
    free(meta);
    if (failed)
        return -1;
    RUN(work_grow(work, &tape->logits, 8 * (uint64_t)metric->n * d, "rows of the unembedding",
                  error));
    struct op_embed_args rows_of = {
        .tokens = ids,
        .dst = run_address(tape->logits),
        .n_tokens = 2 * metric->n,
        .stride = d,
        .scale = 1,
    };
    RUN(op_embed(&work->model->ops, &model->unembed, &rows_of, error));
    RUN(work_readback_floats(work, 2 * metric->n, metric->values, &values, error));
    struct pair_grad_params params = {
        .normed = rows->normed,
        .rows = run_address(tape->logits),
        .weights = rows->weights,
        .dnormed = rows->dnormed,
        .logits = values,
        .bias = model->b_unembed,
        .ids = ids,
        .has_bias = model->b_unembed != 0,
        .width = model->facts.d_model,
        .stride = d,
        .softcap = metric->capped ? model->facts.final_softcap : 0,
    };
    return op_pair_grad(&work->model->ops, &params, metric->n, error);
}

/* Logits before the cap of normed rows on the host, or the caller's logits, of metric tokens
 * [first, first + n): into `to`. */
static int reference(struct run_work *work, const float *normed, const float *given, uint32_t first,
                     uint32_t n, uint32_t v_stride, uint64_t to, struct error *error) {
    const struct model *model = work->model;
    uint32_t width = given ? model->facts.d_vocab : model->facts.d_model;
    uint32_t stride = given ? v_stride : work->d_stride;
    const float *from = (given ? given : normed) + (size_t)first * width;
    float *padded = calloc((size_t)n * stride, sizeof *padded);
    uint64_t rows;
    if (!padded)
        return error_set(error, ERROR_MEMORY, "out of memory for reference logits");
    for (uint32_t i = 0; i < n; i++)
        memcpy(padded + (size_t)i * stride, from + (size_t)i * width, width * sizeof *padded);
    int failed = work_upload(work, padded, 4 * (uint64_t)n * stride, &rows, error);
    free(padded);
    if (failed)
        return -1;
    if (given) {
        struct copy_params copy = {
            .x = rows,
            .dst = to,
            .n_rows = n,
            .width = width,
            .x_stride = stride,
            .out_stride = stride,
        };
        return op_copy(&work->model->ops, &copy, error);
    }
    struct op_linear_args args = {
        .x = rows,
        .dst = to,
        .bias = model->b_unembed,
        .n_rows = n,
        .x_stride = stride,
        .dst_stride = v_stride,
    };
    return op_linear(&work->model->ops, &model->unembed, &args, error);
}

/* Tokens whose logits are computed at once: equal shares of at most LOGITS_BYTES. */
static uint32_t tokens_at_once(uint32_t n, uint32_t v_stride) {
    uint32_t most = (uint32_t)(LOGITS_BYTES / (4 * (uint64_t)v_stride));
    most = most < 16 ? 16 : most > n ? n : most;
    uint32_t shares = (n + most - 1) / most;
    return (n + shares - 1) / shares;
}

/* The logits of n metric tokens become gradients, and their values go to the caller. others: b of
 * metric token 0, for METRIC_CHOICE. */
static int scalars(struct run_work *work, const struct run_metric *metric, uint32_t first,
                   uint32_t n, struct logit_grad_params *params, uint64_t others,
                   struct error *error) {
    struct ops *ops = &work->model->ops;
    if (metric->kind != METRIC_CHOICE) {
        RUN(work_readback_floats(work, n, metric->values + first, &params->values, error));
        return op_logit_grad(ops, params, n, error);
    }
    struct choice_grad_params choice = {
        .logits = params->logits,
        .reference = params->reference,
        .a = params->targets,
        .b = others + 4 * (uint64_t)first,
        .signs = params->weights,
        .width = params->width,
        .stride = params->stride,
        .margin = metric->margin,
        .faith = metric->faith,
        .softcap = params->softcap,
        .reference_softcap = params->reference_softcap,
    };
    RUN(work_readback_floats(work, 2 * n, metric->values + 2 * (size_t)first, &choice.values,
                             error));
    return op_choice_grad(ops, &choice, n, error);
}

/* The logits of other runs that the metric compares with, where it does. */
static int references(struct run_work *work, const struct run_metric *metric, uint32_t first,
                      uint32_t n, const struct logit_grad_params *params, struct error *error) {
    if (metric->kind != METRIC_LOG_PROB)
        RUN(reference(work, metric->reference, metric->reference_logits, first, n, params->stride,
                      params->reference, error));
    if (metric->kind == METRIC_DIRECTIONAL_KL)
        RUN(reference(work, metric->other, NULL, first, n, params->stride, params->other, error));
    return 0;
}

static int distributions(struct run_work *work, struct run_tape *tape,
                         const struct run_metric *metric, int values_only,
                         const struct metric_rows *rows, struct error *error) {
    static const uint32_t kinds[] = {
        [METRIC_LOG_PROB] = LOGIT_GRAD_LOG_PROB,
        [METRIC_KL] = LOGIT_GRAD_KL,
        [METRIC_DIRECTIONAL_KL] = LOGIT_GRAD_DIRECTIONAL_KL,
        [METRIC_CHOICE] = 0, /* op_choice_grad */
    };
    const struct model *model = work->model;
    uint32_t v_stride = op_row_stride(model->facts.d_vocab),
             at_once = tokens_at_once(metric->n, v_stride);
    float cap = metric->capped ? model->facts.final_softcap : 0;
    uint64_t bytes = 4 * (uint64_t)at_once * v_stride, targets = 0, others = 0;
    RUN(work_grow(work, &tape->logits, bytes, "logits", error));
    if (metric->kind != METRIC_LOG_PROB)
        RUN(work_grow(work, &tape->reference, 2 * bytes, "reference logits", error));
    if (metric->a)
        RUN(work_upload(work, metric->a, 4 * (uint64_t)metric->n, &targets, error));
    if (metric->kind == METRIC_CHOICE)
        RUN(work_upload(work, metric->b, 4 * (uint64_t)metric->n, &others, error));
    for (uint32_t first = 0, n; first < metric->n; first += n) {
        n = metric->n - first < at_once ? metric->n - first : at_once;
        struct op_linear_args forward = {
            .x = rows->normed + 4 * (uint64_t)first * work->d_stride,
            .dst = run_address(tape->logits),
            .bias = model->b_unembed,
            .n_rows = n,
            .x_stride = work->d_stride,
            .dst_stride = v_stride,
        };
        struct logit_grad_params params = {
            .logits = forward.dst,
            .reference = run_address(tape->reference),
            .other = metric->kind == METRIC_DIRECTIONAL_KL ? run_address(tape->reference) + bytes
                                                           : 0,
            .targets = targets ? targets + 4 * (uint64_t)first : 0,
            .weights = rows->weights + 4 * (uint64_t)first,
            .width = model->facts.d_vocab,
            .stride = v_stride,
            .kind = kinds[metric->kind],
            .softcap = cap,
            .reference_softcap = metric->reference_logits ? 0 : cap,
        };
        struct op_linear_bwd_args backward = {
            .dy = forward.dst,
            .dx = rows->dnormed + 4 * (uint64_t)first * work->d_stride,
            .n_rows = n,
            .y_stride = v_stride,
            .x_stride = work->d_stride,
        };
        RUN(op_linear(&work->model->ops, &model->unembed, &forward, error));
        RUN(references(work, metric, first, n, &params, error));
        RUN(scalars(work, metric, first, n, &params, others, error));
        if (!values_only)
            RUN(op_linear_bwd(&work->model->ops, &model->unembed, &backward, error));
    }
    return 0;
}

/* tape->dnorm[t] = dnormed of the metric token t, zero for every other token. */
static int spread(struct run_work *work, struct run_tape *tape, const struct run_metric *metric,
                  const struct metric_rows *rows, struct error *error) {
    uint32_t n_tokens = work->chunk.n_tokens, *sources = malloc(n_tokens * sizeof *sources);
    uint64_t uploaded;
    if (!sources)
        return error_set(error, ERROR_MEMORY, "out of memory for a metric");
    for (uint32_t t = 0; t < n_tokens; t++)
        sources[t] = metric->n; /* the zero row */
    for (uint32_t i = 0; i < metric->n; i++)
        sources[metric->tokens[i]] = i;
    int failed = work_upload(work, sources, n_tokens * sizeof *sources, &uploaded, error);
    free(sources);
    struct copy_params copy = {
        .x = rows->dnormed,
        .dst = run_address(tape->dnorm),
        .rows = uploaded,
        .n_rows = n_tokens,
        .width = work->model->facts.d_model,
        .x_stride = work->d_stride,
        .out_stride = work->d_stride,
        .flags = COPY_ROWS,
    };
    return failed ? -1 : op_copy(&work->model->ops, &copy, error);
}

int metric_gradient(struct run_work *work, struct run_tape *tape, const struct run_metric *metric,
                    int values_only, struct error *error) {
    uint64_t row = 4 * (uint64_t)work->d_stride;
    struct metric_rows rows;
    RUN(work_grow(work, &tape->metric, (2 * (uint64_t)metric->n + 1) * row, "metric rows", error));
    rows.normed = run_address(tape->metric);
    rows.dnormed = rows.normed + metric->n * row;
    RUN(gpu_queue_zero(work->model->ops.queue, tape->metric, 2 * metric->n * row, row, error));
    RUN(work_upload(work, metric->weights, 4 * (uint64_t)metric->n, &rows.weights, error));
    RUN(work_upload(work, metric->tokens, 4 * (uint64_t)metric->n, &rows.tokens, error));
    RUN(run_final_norm(work, error)); /* with its edits; the forward pass took the captures */
    struct copy_params pick = {
        .x = run_address(work->norm),
        .dst = rows.normed,
        .rows = rows.tokens,
        .n_rows = metric->n,
        .width = work->model->facts.d_model,
        .x_stride = work->d_stride,
        .out_stride = work->d_stride,
        .flags = COPY_ROWS,
    };
    RUN(op_copy(&work->model->ops, &pick, error));
    RUN(metric->kind == METRIC_PAIR ? pairs(work, tape, metric, &rows, error)
                                    : distributions(work, tape, metric, values_only, &rows, error));
    return values_only ? 0 : spread(work, tape, metric, &rows, error);
}
