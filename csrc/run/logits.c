/* Logits of the residual stream after the last layer. */
#include "run/steps.h"

int run_final_norm(struct run_work *work, struct error *error) {
    return step_norm(work, norm_step_of(work->model, LN_FINAL, 0), run_address(work->x), 0,
                     run_address(work->norm), 0, error);
}

/* dst = norm(x) W_U^T of n rows, in decoding on GPUs */
static int lean_unembed(struct run_work *work, struct norm_step norm, uint64_t x, uint32_t n,
                        uint64_t dst, struct error *error) {
    const struct model *model = work->model;
    struct op_linear_decode_args args = {
        .x = x,
        .dst = dst,
        .bias = model->b_unembed,
        .gain = norm.gain,
        .norm_bias = norm.bias,
        .n_rows = n,
        .x_stride = work->d_stride,
        .dst_stride = op_row_stride(model->facts.d_vocab),
        .norm = step_norm_kind(norm),
        .finish = FINISH_PLAIN,
        .softcap = model->facts.final_softcap,
        .eps = model->facts.norm_eps,
    };
    return op_linear_decode(&work->model->ops, &model->unembed, &args, error);
}

/* dst = logits of n rows at x. norm: one that the rows still need (in decoding on GPUs only), or
 * without a gain. */
static int logits_product(struct run_work *work, struct norm_step norm, uint64_t x, uint32_t n,
                          uint64_t dst, struct error *error) {
    const struct model *model = work->model;
    if (norm.gain)
        return lean_unembed(work, norm, x, n, dst, error);
    struct op_linear_args args = {
        .x = x,
        .dst = dst,
        .bias = model->b_unembed,
        .n_rows = n,
        .x_stride = work->d_stride,
        .dst_stride = op_row_stride(model->facts.d_vocab),
        .softcap = model->facts.final_softcap,
        .decode = work->chunk.batch->decode,
    };
    return op_linear(&work->model->ops, &model->unembed, &args, error);
}

/* The token after each of n_rows rows at x, in row ranges whose logits take as much memory as
 * readback memory has. */
static int unembed_pick(struct run_work *work, struct norm_step norm, uint64_t x, uint32_t n_rows,
                        struct error *error) {
    const struct picks *picks = work->chunk.picks;
    uint32_t stride = op_row_stride(work->model->facts.d_vocab);
    uint64_t room = work->readback_bytes / 4 / stride;
    uint32_t most = room == 0 ? 1 : room < n_rows ? (uint32_t)room : n_rows;
    RUN(work_grow(work, &work->picked_from, 4 * (uint64_t)most * stride, "logits to pick from",
                  error));
    for (uint32_t done = 0, n; done < n_rows; done += n) {
        n = n_rows - done < most ? n_rows - done : most;
        struct pick_params pick = {
            .x = run_address(work->picked_from),
            .dst = picks->ids + 4 * (uint64_t)done,
            .width = work->model->facts.d_vocab,
            .x_stride = stride,
            .empty = picks->empty,
            .near = picks->near,
        };
        RUN(logits_product(work, norm, x + 4 * (uint64_t)done * work->d_stride, n, pick.x, error));
        RUN(op_pick(&work->model->ops, &pick, n, error));
    }
    return 0;
}

/* Logits of n_rows rows at x, straight into readback memory, in row ranges that fit it. norm: one
 * that the rows still need (in decoding on GPUs only), or without a gain. */
static int unembed(struct run_work *work, struct norm_step norm, uint64_t x, uint32_t n_rows,
                   int by_row, struct error *error) {
    const struct model *model = work->model;
    uint32_t stride = op_row_stride(model->facts.d_vocab);
    if (work->chunk.picks)
        return unembed_pick(work, norm, x, n_rows, error);
    for (uint32_t done = 0, n; done < n_rows; done += n) {
        uint64_t offset;
        n = n_rows - done;
        RUN(work_readback_take(work, &n, stride, &offset, error));
        struct readback logits = {
            .to = work->chunk.batch->logits,
            .offset = offset,
            .first = done,
            .n = n,
            .token_floats = stride,
            .n_heads = 1,
            .width = model->facts.d_vocab,
            .by_row = by_row,
        };
        RUN(logits_product(work, norm, x + 4 * (uint64_t)done * work->d_stride, n,
                           run_address(work->readback) + 4 * offset, error));
        RUN(work_readback_push(work, &logits, error));
    }
    return 0;
}

/* work->out = the final norm of every row's last token. normed: work->norm holds it for all. */
static int last_normed(struct run_work *work, int normed, struct error *error) {
    const struct chunk *chunk = &work->chunk;
    const struct model *model = work->model;
    struct norm_step ln_final = norm_step_of(model, LN_FINAL, 0);
    if (normed) {
        struct copy_params pick = {
            .x = run_address(work->norm),
            .dst = run_address(work->out),
            .rows = chunk->last_rows,
            .n_rows = chunk->n_last,
            .width = model->facts.d_model,
            .x_stride = work->d_stride,
            .out_stride = work->d_stride,
            .flags = COPY_ROWS,
        };
        return op_copy(&work->model->ops, &pick, error);
    }
    struct norm_params norm = {
        .x = run_address(work->x),
        .gain = ln_final.gain,
        .bias = ln_final.bias,
        .dst = run_address(work->out),
        .rows = chunk->last_rows,
        .width = model->facts.d_model,
        .stride = work->d_stride,
        .eps = model->facts.norm_eps,
        .flags = NORM_ROWS | (step_decode_lean(work) ? NORM_DECODE : 0) |
                 (ln_final.layer_norm ? NORM_LAYER : 0) | (ln_final.bias ? NORM_BIAS : 0),
    };
    return op_norm(&work->model->ops, &norm, chunk->n_last, error);
}

int run_logits(struct run_work *work, struct error *error) {
    const struct chunk *chunk = &work->chunk;
    const struct norm_step none = {0};
    enum run_logits mode = chunk->batch->logits_mode;
    int normed = mode == RUN_LOGITS_ALL || site_wanted(work, SITE_FINAL_SCALE, 0) ||
                 site_wanted(work, SITE_FINAL_NORMALIZED, 0);
    if (normed)
        RUN(run_final_norm(work, error));
    if (mode == RUN_LOGITS_ALL)
        return unembed(work, none, run_address(work->norm), chunk->n_tokens, 0, error);
    if (mode != RUN_LOGITS_LAST || chunk->n_last == 0)
        return 0;
    /* every row brings one token, which is its last */
    if (step_decode_lean(work) && !normed && chunk->n_last == chunk->n_tokens)
        return unembed(work, norm_step_of(work->model, LN_FINAL, 0), run_address(work->x),
                       chunk->n_last, 1, error);
    RUN(last_normed(work, normed, error));
    return unembed(work, none, run_address(work->out), chunk->n_last, 1, error);
}
