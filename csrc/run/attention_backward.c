/* The backward pass of attention.c, its steps in reverse. Keys, values and rotated queries are
 * those of the forward pass; patterns are computed again from them, span by span. */
#include "run/steps.h"

/* --- results of single heads ------------------------------------------------------------------ */

/* dz of every head through its slice of W_O, for n tokens from `first` */
static int results_by_slice_backward(struct run_work *work, int l, uint32_t first, uint32_t n,
                                     struct error *error) {
    const struct model_facts *f = &work->model->facts;
    for (uint32_t h = 0; h < f->n_heads; h++) {
        struct op_linear_bwd_args args = {
            .dy = run_address(work->result) + 4 * (uint64_t)h * work->d_stride,
            .dx = run_address(work->tape->dz) +
                  4 * ((uint64_t)first * work->z_stride + h * f->d_head),
            .n_rows = n,
            .y_stride = f->n_heads * work->d_stride,
            .x_stride = work->z_stride,
            .first_k = h * f->d_head,
            .n_k = f->d_head,
        };
        RUN(op_linear_bwd(&work->model->ops, &work->model->layers[l].o, &args, error));
    }
    return 0;
}

/* The results' gradients: each head's is that of their sum. */
static int spread_to_heads(struct run_work *work, struct rows d, uint32_t first, uint32_t n,
                           struct error *error) {
    const struct model_facts *f = &work->model->facts;
    for (uint32_t h = 0; h < f->n_heads; h++) {
        struct copy_params copy = {
            .x = d.address + 4 * (uint64_t)first * d.stride,
            .dst = run_address(work->result) + 4 * (uint64_t)h * work->d_stride,
            .n_rows = n,
            .width = f->d_model,
            .x_stride = d.stride,
            .out_stride = f->n_heads * work->d_stride,
        };
        RUN(op_copy(&work->model->ops, &copy, error));
    }
    return 0;
}

/* The site of the results; where they were edited, dz comes from them, head by head. */
static int head_results_backward(struct run_work *work, int l, struct rows d, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    int edited = site_edited(work, SITE_RESULT, l);
    uint32_t most;
    if (!site_wanted(work, SITE_RESULT, l))
        return 0;
    if (edited && f->d_head % 16)
        return error_set(error, ERROR_VALUE,
                         "there is no gradient through an edit of hook_result with heads of %u: "
                         "not a multiple of 16",
                         f->d_head);
    RUN(head_results_reserve(work, &most, error));
    for (uint32_t first = 0, n; first < work->chunk.n_tokens; first += n) {
        n = work->chunk.n_tokens - first < most ? work->chunk.n_tokens - first : most;
        struct site_view view = head_results_view(work, l, first, n);
        RUN(spread_to_heads(work, d, first, n, error));
        RUN(site_visit_backward(work, &view, error));
        if (edited)
            RUN(results_by_slice_backward(work, l, first, n, error));
    }
    return 0;
}

/* --- z = softmax(scale q k^T) v --------------------------------------------------------------- */

/* The scores' gradient of a span in tape->dscores: with respect to q . k, or (as_site) to the
 * scores after scale and soft cap, for their site. */
static int scores_backward(struct run_work *work, const struct run_cache *cache, int l,
                           const struct query_span *span, int as_site, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct chunk *chunk = &work->chunk;
    struct run_tape *tape = work->tape;
    uint64_t d = run_address(tape->dscores);
    struct scores_params dpattern = {
        .qkv = run_address(tape->dz),
        .k_cache = run_address(cache->v[l]),
        .tokens = chunk->tokens,
        .tiles = chunk->tiles + span->tile * sizeof(struct query_tile),
        .scores = d,
        .first_token = span->first,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .stride = work->z_stride,
        .key_stride = span->key_stride,
        .scale = 1,
    };
    struct softmax_bwd_params softmax = {
        .pattern = run_address(work->scores),
        .dpattern = d,
        .scores = run_address(tape->capped),
        .tokens = chunk->tokens,
        .first_token = span->first,
        .n_heads = f->n_heads,
        .key_stride = span->key_stride,
        .window = f->window[l],
        .scale = as_site ? 1 : f->attn_scale,
        .softcap = as_site ? 0 : f->attn_softcap,
    };
    struct site_view pattern_view = query_span_view(work, span, SITE_PATTERN, l, d),
                     scores_view = query_span_view(work, span, SITE_SCORES, l, d);
    RUN(op_attn_scores(&work->model->ops, &dpattern, span->end - span->tile, chunk->max_keys,
                       error));
    if (!as_site)
        RUN(site_visit_backward(work, &pattern_view, error));
    RUN(op_attn_softmax_bwd(&work->model->ops, &softmax, span->n, chunk->max_keys, error));
    return as_site ? site_visit_backward(work, &scores_view, error) : 0;
}

/* The pattern of a span in work->scores; tape->capped: its scores, where there is a soft cap. */
static int pattern_again(struct run_work *work, const struct run_cache *cache, int l,
                         const struct query_span *span, struct error *error) {
    struct ops *ops = &work->model->ops;
    uint32_t n_tiles = span->end - span->tile, max_keys = work->chunk.max_keys;
    struct decode_params args = query_span_attention(work, cache, l, span);
    args.qkv = run_address(work->tape->layers[l].qkv);
    struct scores_params scores = op_attn_scores_params(&args, query_span_tiles(work, span));
    struct softmax_params softmax = op_attn_softmax_params(&args);
    RUN(op_attn_scores(ops, &scores, n_tiles, max_keys, error));
    if (work->model->facts.attn_softcap != 0) {
        scores.scores = run_address(work->tape->capped);
        RUN(op_attn_scores(ops, &scores, n_tiles, max_keys, error));
    }
    return op_attn_softmax(ops, &softmax, span->n, max_keys, error);
}

/* out[key] = [out +] sum over the span's queries of a[query, key] * y[query]: dv from the pattern
 * and dz, dk from the scores' gradient and q. */
static int key_sums(struct run_work *work, int l, const struct query_span *span, uint64_t a,
                    struct rows y, struct rows out, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct chunk *chunk = &work->chunk;
    struct attn_output_bwd_params sums = {
        .a = a,
        .y = y.address,
        .tokens = chunk->tokens,
        .tiles = chunk->tiles,
        .sums = out.address,
        .first_token = span->first,
        .last_token = span->first + span->n,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .y_stride = y.stride,
        .out_stride = out.stride,
        .key_stride = span->key_stride,
        .window = f->window[l],
        .add = span->first > 0,
    };
    return op_attn_output_bwd(&work->model->ops, &sums, chunk->n_tiles, chunk->max_keys, error);
}

/* dq[query] = sum over keys of the scores' gradient[query, key] * k[key] */
static int queries_backward(struct run_work *work, const struct run_cache *cache, int l,
                            const struct query_span *span, struct rows dq, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct chunk *chunk = &work->chunk;
    struct attn_output_params queries = {
        .pattern = run_address(work->tape->dscores),
        .v_cache = run_address(cache->k[l]),
        .tokens = chunk->tokens,
        .tiles = chunk->tiles + span->tile * sizeof(struct query_tile),
        .z = dq.address,
        .first_token = span->first,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .z_stride = dq.stride,
        .key_stride = span->key_stride,
        .window = f->window[l],
    };
    return op_attn_output(&work->model->ops, &queries, span->end - span->tile, chunk->max_keys,
                          error);
}

/* dq of a span's queries, and what they add to dk and dv */
static int attend_backward(struct run_work *work, const struct run_cache *cache, int l,
                           const struct query_span *span, struct error *error) {
    struct run_tape *tape = work->tape;
    struct qkv_rows d = qkv_rows_at(work, run_address(tape->dqkv));
    struct rows dz = {run_address(tape->dz), work->z_stride},
                q = {run_address(tape->layers[l].qkv), work->qkv_stride};
    RUN(pattern_again(work, cache, l, span, error));
    RUN(key_sums(work, l, span, run_address(work->scores), dz, d.v, error));
    if (site_wanted(work, SITE_SCORES, l))
        RUN(scores_backward(work, cache, l, span, 1, error));
    RUN(scores_backward(work, cache, l, span, 0, error));
    RUN(queries_backward(work, cache, l, span, d.q, error));
    return key_sums(work, l, span, run_address(tape->dscores), q, d.k, error);
}

static int heads_backward(struct run_work *work, const struct run_cache *cache, int l,
                          struct error *error) {
    const struct chunk *chunk = &work->chunk;
    struct run_tape *tape = work->tape;
    struct query_span span = {.key_stride = op_row_stride(chunk->max_keys)};
    uint64_t query_bytes = 4 * (uint64_t)work->model->facts.n_heads * span.key_stride;
    uint32_t most = query_span_most(work, query_bytes);
    RUN(work_grow(work, &work->scores, most * query_bytes, "attention scores", error));
    RUN(work_grow(work, &tape->dscores, most * query_bytes, "gradients of scores", error));
    if (work->model->facts.attn_softcap != 0)
        RUN(work_grow(work, &tape->capped, most * query_bytes, "capped scores", error));
    while (query_span_next(chunk->tile_list, chunk->n_tiles, most, &span))
        RUN(attend_backward(work, cache, l, &span, error));
    return 0;
}

/* --- queries, keys and values ----------------------------------------------------------------- */

static int rotate_backward(struct run_work *work, int l, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    struct rope_bwd_params rope = {
        .dqkv = run_address(work->tape->dqkv),
        .qkv = run_address(work->tape->layers[l].qkv_in),
        .angles = model_angles(work->model, (uint32_t)l, 0),
        .q_angles = model_angles(work->model, (uint32_t)l, 1),
        .tokens = work->chunk.tokens,
        .q_gain = layer->q_norm,
        .k_gain = layer->k_norm,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .d_rot = f->d_rot,
        .stride = work->qkv_stride,
        .flags = rope_flags(f, l),
        .eps = f->norm_eps,
    };
    return op_rope_bwd(&work->model->ops, &rope, work->chunk.n_tokens, error);
}

/* Gradients become 0 where the forward pass clamped q, k or v. The products before the clamp are
 * not on the tape: they are computed again, with the edits of the sites before them. */
static int clip_backward(struct run_work *work, int l, struct rows d, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    const struct run_batch *batch = work->chunk.batch;
    struct run_batch silent = *batch;
    struct rows product = {run_address(work->qkv), work->qkv_stride};
    struct clip_bwd_params clip = {
        .x = product.address,
        .d = d.address,
        .width = (f->n_heads + 2 * f->n_kv_heads) * f->d_head,
        .stride = d.stride,
        .limit = f->clip_qkv,
    };
    RUN(step_copy(work, run_address(work->tape->layers[l].x), run_address(work->x), 0, error));
    silent.n_captures = 0;
    work->chunk.batch = &silent;
    int failed = step_norm_product(work, norm_step_of(work->model, LN1, l), &layer->qkv,
                                   layer->b_qkv, 0, product, 0, error);
    work->chunk.batch = batch;
    return failed ? -1 : op_clip_bwd(&work->model->ops, &clip, work->chunk.n_tokens, error);
}

/* d = gradient through heads_norm of attention.c, whose input is x, in place */
static int heads_norm_backward(struct run_work *work, struct rows x, struct rows d,
                               uint32_t n_heads, uint64_t gain, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    int layer_norm = f->qk_norm == QK_NORM_LAYER;
    struct norm_bwd_params norm = {
        .x = x.address,
        .gain = gain,
        .dy = d.address,
        .dx = d.address,
        .width = layer_norm ? f->d_head : n_heads * f->d_head,
        .n_groups = layer_norm ? n_heads : 0,
        .stride = d.stride,
        .eps = f->norm_eps,
        .flags = layer_norm ? NORM_BWD_LAYER : 0,
    };
    return op_norm_bwd(&work->model->ops, &norm, work->chunk.n_tokens, error);
}

static int queries_keys_values_backward(struct run_work *work, int l, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    struct run_tape *tape = work->tape;
    struct norm_step ln1 = norm_step_of(work->model, LN1, l);
    struct qkv_rows d = qkv_rows_at(work, run_address(tape->dqkv)),
                    kept = qkv_rows_at(work, run_address(tape->layers[l].qkv_in));
    struct rows dnorm = {run_address(tape->dnorm), work->d_stride};
    uint64_t x = run_address(tape->layers[l].x), dx = run_address(tape->dx),
             dx_pre = run_address(tape_dx_pre(tape));
    if (rotated(f, l)) {
        RUN(step_visit_backward(work, SITE_ROT_Q, l, d.q, error));
        RUN(step_visit_backward(work, SITE_ROT_K, l, d.k, error));
    }
    RUN(rotate_backward(work, l, error));
    if (norm_before_rotation(f)) {
        RUN(heads_norm_backward(work, kept.q, d.q, f->n_heads, layer->q_norm, error));
        RUN(heads_norm_backward(work, kept.k, d.k, f->n_kv_heads, layer->k_norm, error));
    }
    RUN(step_visit_backward(work, SITE_V, l, d.v, error));
    RUN(step_visit_backward(work, SITE_K, l, d.k, error));
    RUN(step_visit_backward(work, SITE_Q, l, d.q, error));
    if (f->clip_qkv != 0)
        RUN(clip_backward(work, l, d.q, error));
    RUN(run_hook_call(work, HOOK_D_QKV, l, d.q.address, d.q.stride, error));
    RUN(step_product_backward(work, &layer->qkv, d.q, dnorm, error));
    return step_norm_backward(work, ln1, x, dnorm.address, dx_pre, dx, error);
}

/* --- the layer -------------------------------------------------------------------------------- */

int run_attention_backward(struct run_work *work, struct run_cache *cache, int l,
                           struct error *error) {
    const struct model_layer *layer = &work->model->layers[l];
    struct run_tape *tape = work->tape;
    struct norm_step post_norm = norm_step_of(work->model, LN1_POST, l);
    struct rows dx = {run_address(tape->dx), work->d_stride},
                dz = {run_address(tape->dz), work->z_stride}, d;
    RUN(run_hook_call(work, HOOK_D_RESID_MID, l, dx.address, dx.stride, error));
    RUN(step_add_output_backward(work, SITE_ATTN_OUT, post_norm, tape->layers[l].attn_raw, &d,
                                 error));
    RUN(head_results_backward(work, l, d, error));
    if (!site_edited(work, SITE_RESULT, l))
        RUN(step_product_backward(work, &layer->o, d, dz, error));
    RUN(step_visit_backward(work, SITE_Z, l, dz, error));
    RUN(heads_backward(work, cache, l, error));
    return queries_keys_values_backward(work, l, error);
}
