/* work_mid = x + attention(x): the forward pass of one layer's attention. */
#include "run/steps.h"

/* --- queries, keys and values ----------------------------------------------------------------- */

int rotated(const struct model_facts *f, int l) { return f->rope_table[l] != MODEL_NO_ROPE; }

uint32_t rope_flags(const struct model_facts *f, int l) {
    return (f->qk_norm == QK_NORM_HEAD ? ROPE_QK_NORM : 0) | (rotated(f, l) ? ROPE_ROTATE : 0) |
           (f->rope_interleaved ? ROPE_INTERLEAVED : 0);
}

static struct rope_params rope_of(const struct run_work *work, const struct run_cache *cache,
                                  int l) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    return (struct rope_params){
        .qkv = work->at_qkv,
        .angles = model_angles(work->model, (uint32_t)l, 0),
        .q_angles = model_angles(work->model, (uint32_t)l, 1),
        .tokens = work->chunk.tokens,
        .q_gain = layer->q_norm,
        .k_gain = layer->k_norm,
        .k_cache = run_address(cache->k[l]),
        .v_cache = run_address(cache->v[l]),
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .d_rot = f->d_rot,
        .stride = work->qkv_stride,
        .eps = f->norm_eps,
        .flags = rope_flags(f, l) | ROPE_STORE,
    };
}

/* q, k, v = rotate(ln1(x) W_qkv^T + b) in one kernel, k and v into the cache */
static int rotated_fused(struct run_work *work, const struct rope_params *rope, int l,
                         struct error *error) {
    const struct model_layer *layer = &work->model->layers[l];
    struct op_linear_pairs_args args = {
        .x = run_address(work->x),
        .gain = layer->ln1,
        .dst = rope->qkv,
        .bias = layer->b_qkv,
        .angles = rope->angles,
        .tokens = rope->tokens,
        .k_cache = rope->k_cache,
        .v_cache = rope->v_cache,
        .n_rows = work->chunk.n_tokens,
        .x_stride = work->d_stride,
        .dst_stride = rope->stride,
        .kind = PAIRS_ROTATE,
        .n_heads = rope->n_heads,
        .n_kv_heads = rope->n_kv_heads,
        .d_head = rope->d_head,
        .eps = rope->eps,
    };
    return op_linear_pairs(&work->model->ops, &layer->qkv, &args, error);
}

/* Does a norm of q or k stand between product and rotation, which op_rope does not do? */
int norm_before_rotation(const struct model_facts *f) {
    return f->qk_norm == QK_NORM_WIDE || f->qk_norm == QK_NORM_LAYER;
}

/* x = norm(x), in place, of the queries or keys of all heads: RMS norm of all together, or
 * LayerNorm of each */
static int heads_norm(struct run_work *work, struct rows x, uint32_t n_heads, uint64_t gain,
                      uint64_t bias, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    int layer_norm = f->qk_norm == QK_NORM_LAYER;
    struct norm_params norm = {
        .x = x.address,
        .gain = gain,
        .bias = bias,
        .dst = x.address,
        .width = layer_norm ? f->d_head : n_heads * f->d_head,
        .n_groups = layer_norm ? n_heads : 0,
        .stride = x.stride,
        .eps = f->norm_eps,
        .flags = (layer_norm ? NORM_LAYER : 0) | (bias ? NORM_BIAS : 0) |
                 (step_decode_lean(work) ? NORM_DECODE : 0),
    };
    return op_norm(&work->model->ops, &norm, work->chunk.n_tokens, error);
}

/* q, k = rotate([norm per head](q, k)); k and v into the cache */
static int rotate(struct run_work *work, struct rope_params rope, int l, struct error *error) {
    struct ops *ops = &work->model->ops;
    struct qkv_rows at = qkv_rows_at(work, rope.qkv);
    if (!rotated(&work->model->facts, l) ||
        (!site_wanted(work, SITE_ROT_Q, l) && !site_wanted(work, SITE_ROT_K, l)))
        return op_rope(ops, &rope, work->chunk.n_tokens, error);
    rope.flags &= ~(uint32_t)ROPE_STORE;
    RUN(op_rope(ops, &rope, work->chunk.n_tokens, error));
    RUN(step_visit(work, SITE_ROT_Q, l, at.q, error));
    RUN(step_visit(work, SITE_ROT_K, l, at.k, error));
    rope.flags = ROPE_STORE;
    return op_rope(ops, &rope, work->chunk.n_tokens, error);
}

/* Does one kernel compute the whole rotation of a layer's queries and keys from the stream? */
static int rotation_fusable(const struct run_work *work, struct norm_step ln1, int l) {
    const struct model_facts *f = &work->model->facts;
    return rotated(f, l) && f->d_rot == f->d_head && !f->rope_interleaved && f->query_beta == 0 &&
           !f->qk_norm && f->clip_qkv == 0 && step_norm_fusable(work, ln1) &&
           op_linear_pairs_offered(&work->model->ops, &work->model->layers[l].qkv,
                                   work->chunk.n_tokens);
}

/* Where values are clamped, ablations take steering out of the input of their product, so before
 * the clamp: the product comes without one. The other edits of hook_v follow. */
static int ablate_and_clamp(struct run_work *work, int l, struct qkv_rows at, uint64_t scale,
                            struct error *error) {
    const struct model_facts *f = &work->model->facts;
    struct clip_params clip = {
        .x = at.q.address,
        .width = (f->n_heads + 2 * f->n_kv_heads) * f->d_head,
        .stride = at.q.stride,
        .limit = f->clip_qkv,
    };
    RUN(step_visit_normed(work, SITE_V, l, at.v, scale, EDITS_SCALED, error));
    return op_clip(&work->model->ops, &clip, work->chunk.n_tokens, error);
}

/* Does decoding on GPUs use its own kernel for the attention of single tokens? */
static int lean_attention(const struct run_work *work) {
    return step_decode_lean(work) &&
           op_attn_step_offered(&work->model->ops, work->model->facts.d_head);
}

/* Does that kernel norm and rotate queries and keys, too? In a frozen layer it cannot: it reads
 * the present keys of other rows, which other workgroups would still be writing. */
static int lean_rotation(const struct run_work *work, int l) {
    return lean_attention(work) && !step_frozen(work, l) &&
           step_fusable(work, SITE_ROT_Q, SITE_PATTERN, l);
}

/* q, k, v = rotate([norm](clip(ln1(x) W_qkv^T + b))) */
static int queries_keys_values(struct run_work *work, struct run_cache *cache, int l,
                               struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    struct norm_step ln1 = norm_step_of(work->model, LN1, l);
    struct rope_params rope = rope_of(work, cache, l);
    struct qkv_rows at = qkv_rows_at(work, rope.qkv);
    int keep_scale = site_edited(work, SITE_V, l);
    int clamp_later = f->clip_qkv != 0 && site_scaled(work, SITE_V, l);
    float clip = clamp_later ? 0 : f->clip_qkv;
    uint64_t scale = ln1.gain ? run_address(work->scale) : 0;
    if (step_fusable(work, SITE_LN1_SCALE, SITE_ROT_K, l) && rotation_fusable(work, ln1, l))
        return rotated_fused(work, &rope, l, error);
    RUN(step_norm_product(work, ln1, &layer->qkv, layer->b_qkv, clip, at.q, keep_scale, error));
    if (clamp_later)
        RUN(ablate_and_clamp(work, l, at, scale, error));
    RUN(step_visit(work, SITE_Q, l, at.q, error));
    RUN(step_visit(work, SITE_K, l, at.k, error));
    RUN(step_visit_normed(work, SITE_V, l, at.v, scale, clamp_later ? EDITS_NOT_SCALED : EDITS_ALL,
                          error));
    RUN(tape_keep_qkv(work, l, error));
    RUN(run_hook_call(work, HOOK_QKV, l, at.q.address, at.q.stride, error));
    if (lean_rotation(work, l))
        return 0;
    if (norm_before_rotation(f)) {
        RUN(heads_norm(work, at.q, f->n_heads, layer->q_norm, layer->b_q_norm, error));
        RUN(heads_norm(work, at.k, f->n_kv_heads, layer->k_norm, layer->b_k_norm, error));
    }
    return rotate(work, rope, l, error);
}

/* --- z = softmax(scale q k^T) v --------------------------------------------------------------- */

/* The token list of a layer: a frozen layer reads queries, keys and values of other rows. */
static uint64_t token_list(const struct run_work *work, int l) {
    return step_frozen(work, l) ? work->chunk.frozen_tokens : work->chunk.tokens;
}

struct site_view query_span_view(const struct run_work *work, const struct query_span *span,
                                 int site, int layer, uint64_t at) {
    uint32_t heads = work->model->facts.n_heads;
    return (struct site_view){
        .site = site,
        .layer = layer,
        .address = at,
        .first = span->first,
        .n_tokens = span->n,
        .token_stride = heads * span->key_stride,
        .n_heads = heads,
        .head_stride = span->key_stride,
        .width = work->chunk.max_keys,
    };
}

struct decode_params query_span_attention(const struct run_work *work,
                                          const struct run_cache *cache, int l,
                                          const struct query_span *span) {
    const struct model_facts *f = &work->model->facts;
    return (struct decode_params){
        .qkv = work->at_qkv,
        .k_cache = run_address(cache->k[l]),
        .v_cache = run_address(cache->v[l]),
        .tokens = token_list(work, l),
        .scores = run_address(work->scores),
        .z = run_address(work->z),
        .first_token = span->first,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .stride = work->qkv_stride,
        .z_stride = work->z_stride,
        .key_stride = span->key_stride,
        .window = f->window[l],
        .scale = f->attn_scale,
        .softcap = f->attn_softcap,
    };
}

uint64_t query_span_tiles(const struct run_work *work, const struct query_span *span) {
    return work->chunk.tiles + span->tile * sizeof(struct query_tile);
}

/* scores, softmax and z of single tokens in one kernel */
static int decode_fused(struct run_work *work, const struct decode_params *args,
                        const struct query_span *span, struct error *error) {
    return op_attn_decode(&work->model->ops, args, span->n, work->chunk.max_keys, error);
}

/* The same in decoding on GPUs. flags: STEP_* that are done besides */
static int lean_attend(struct run_work *work, const struct run_cache *cache, int l,
                       const struct decode_params *from, uint32_t n, uint32_t flags,
                       struct error *error) {
    const struct model_facts *f = &work->model->facts;
    struct rope_params rope = rope_of(work, cache, l);
    static const uint32_t norms[] = {[QK_NORM_HEAD] = STEP_NORM_HEAD,
                                     [QK_NORM_WIDE] = STEP_NORM_WIDE,
                                     [QK_NORM_LAYER] = STEP_NORM_LAYER};
    if (lean_rotation(work, l))
        flags |= STEP_STORE | norms[f->qk_norm] | (f->qk_norm_bias ? STEP_NORM_BIAS : 0) |
                 (rotated(f, l) ? STEP_ROTATE : 0) | (f->rope_interleaved ? STEP_INTERLEAVED : 0);
    struct attn_step_params args = {
        .qkv = from->qkv,
        .k_cache = from->k_cache,
        .v_cache = from->v_cache,
        .tokens = from->tokens + from->first_token * sizeof(struct token_meta),
        .scores = from->scores,
        .z = from->z + 4 * (uint64_t)from->first_token * from->z_stride,
        .angles = rope.angles,
        .q_angles = rope.q_angles,
        .q_gain = rope.q_gain,
        .k_gain = rope.k_gain,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .d_rot = f->d_rot,
        .stride = from->stride,
        .z_stride = from->z_stride,
        .key_stride = from->key_stride,
        .window = from->window,
        .flags = flags,
        .scale = from->scale,
        .softcap = from->softcap,
        .eps = f->norm_eps,
    };
    return op_attn_step(&work->model->ops, &args, n, work->chunk.max_keys, error);
}

/* z of a span's queries */
static int attend(struct run_work *work, const struct run_cache *cache, int l,
                  const struct query_span *span, struct error *error) {
    struct ops *ops = &work->model->ops;
    const struct chunk *chunk = &work->chunk;
    uint32_t n_tiles = span->end - span->tile;
    uint64_t tiles = query_span_tiles(work, span), pattern = run_address(work->scores);
    struct decode_params args = query_span_attention(work, cache, l, span);
    int hooked = site_wanted(work, SITE_SCORES, l) || site_wanted(work, SITE_PATTERN, l);
    int lean = lean_attention(work);
    if (lean && !hooked)
        return lean_attend(work, cache, l, &args, span->n, 0, error);
    int decode = work->chunk.batch->decode != 0,
        units = op_attn_matrix_offered(ops, work->model->facts.d_head, decode);
    if (chunk->n_tiles == chunk->n_tokens && !hooked && !units)
        return decode_fused(work, &args, span, error);
    struct scores_params scores = op_attn_scores_params(&args, tiles);
    struct softmax_params softmax = op_attn_softmax_params(&args);
    softmax.decode = (uint32_t)lean;
    struct attn_output_params output = op_attn_output_params(&args, tiles);
    scores.decode = output.decode = (uint32_t)decode;
    struct site_view scores_view = query_span_view(work, span, SITE_SCORES, l, pattern),
                     pattern_view = query_span_view(work, span, SITE_PATTERN, l, pattern);
    RUN(op_attn_scores(ops, &scores, n_tiles, chunk->max_keys, error));
    RUN(site_visit(work, &scores_view, error));
    RUN(op_attn_softmax(ops, &softmax, span->n, chunk->max_keys, error));
    RUN(site_visit(work, &pattern_view, error));
    if (lean)
        return lean_attend(work, cache, l, &args, span->n, STEP_PATTERN, error);
    return op_attn_output(ops, &output, n_tiles, chunk->max_keys, error);
}

/* z = softmax(scale q k^T) v, span by span */
static int heads(struct run_work *work, const struct run_cache *cache, int l, struct error *error) {
    const struct chunk *chunk = &work->chunk;
    struct rows z = {run_address(work->z), work->z_stride};
    struct query_span span = {.key_stride = op_row_stride(chunk->max_keys)};
    uint64_t query_bytes = 4 * (uint64_t)work->model->facts.n_heads * span.key_stride;
    uint32_t most = query_span_most(work, query_bytes);
    RUN(work_grow(work, &work->scores, most * query_bytes, "attention scores", error));
    while (query_span_next(chunk->tile_list, chunk->n_tiles, most, &span))
        RUN(attend(work, cache, l, &span, error));
    return step_visit(work, SITE_Z, l, z, error);
}

/* --- results of single heads ------------------------------------------------------------------ */

struct site_view head_results_view(const struct run_work *work, int l, uint32_t first, uint32_t n) {
    const struct model_facts *f = &work->model->facts;
    return (struct site_view){
        .site = SITE_RESULT,
        .layer = l,
        .address = run_address(work->result),
        .first = first,
        .n_tokens = n,
        .token_stride = f->n_heads * work->d_stride,
        .n_heads = f->n_heads,
        .head_stride = work->d_stride,
        .width = f->d_model,
    };
}

int head_results_reserve(struct run_work *work, uint32_t *most, struct error *error) {
    uint64_t token_bytes = 4 * (uint64_t)work->model->facts.n_heads * work->d_stride;
    uint32_t fit = (uint32_t)(work->scratch / token_bytes);
    *most = fit < 1 ? 1 : fit > work->capacity ? work->capacity : fit;
    return work_grow(work, &work->result, *most * token_bytes, "per-head results", error);
}

/* Heads whose size is a multiple of 16 are slices of W_O's inputs: a product for each head. */
static int results_by_slice(struct run_work *work, int l, uint32_t first, uint32_t n,
                            struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint64_t z = run_address(work->z) + 4 * (uint64_t)first * work->z_stride;
    for (uint32_t h = 0; h < f->n_heads; h++) {
        struct op_linear_args args = {
            .x = z + 4 * (uint64_t)h * f->d_head,
            .dst = run_address(work->result) + 4 * (uint64_t)h * work->d_stride,
            .n_rows = n,
            .x_stride = work->z_stride,
            .dst_stride = f->n_heads * work->d_stride,
            .first_k = h * f->d_head,
            .n_k = f->d_head,
            .decode = work->chunk.batch->decode,
        };
        RUN(op_linear(&work->model->ops, &work->model->layers[l].o, &args, error));
    }
    return 0;
}

/* Other head sizes: a row of W_O's whole width for each head, zero but for that head's part. */
static int results_by_row(struct run_work *work, int l, uint32_t first, uint32_t n,
                          struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint64_t z = run_address(work->z) + 4 * (uint64_t)first * work->z_stride;
    RUN(work_grow(work, &work->expanded, 4 * (uint64_t)work->capacity * f->n_heads * work->z_stride,
                  "expanded heads", error));
    for (uint32_t h = 0; h < f->n_heads; h++) {
        uint64_t at = 4 * (uint64_t)h * f->d_head;
        struct copy_params copy = {
            .x = z + at,
            .dst = run_address(work->expanded) + 4 * (uint64_t)h * work->z_stride + at,
            .n_rows = n,
            .width = f->d_head,
            .x_stride = work->z_stride,
            .out_stride = f->n_heads * work->z_stride,
        };
        RUN(op_copy(&work->model->ops, &copy, error));
    }
    struct op_linear_args args = {
        .x = run_address(work->expanded),
        .dst = run_address(work->result),
        .n_rows = n * f->n_heads,
        .x_stride = work->z_stride,
        .dst_stride = work->d_stride,
        .decode = work->chunk.batch->decode,
    };
    return op_linear(&work->model->ops, &work->model->layers[l].o, &args, error);
}

/* result[t, h, :] = z_h W_O^h; where they are edited, their sum is the output at work->at_out. */
static int head_results(struct run_work *work, int l, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    int edited = site_edited(work, SITE_RESULT, l), sliced = f->d_head % 16 == 0;
    uint32_t most;
    if (!site_wanted(work, SITE_RESULT, l))
        return 0;
    RUN(head_results_reserve(work, &most, error));
    for (uint32_t first = 0, n; first < work->chunk.n_tokens; first += n) {
        n = work->chunk.n_tokens - first < most ? work->chunk.n_tokens - first : most;
        struct site_view view = head_results_view(work, l, first, n);
        struct sum_heads_params sum = {
            .x = view.address,
            .dst = work->at_out + 4 * (uint64_t)first * work->d_stride,
            .bias = work->model->layers[l].b_o,
            .n_heads = f->n_heads,
            .width = f->d_model,
            .head_stride = work->d_stride,
            .out_stride = work->d_stride,
            .has_bias = f->o_bias,
        };
        RUN(sliced ? results_by_slice(work, l, first, n, error)
                   : results_by_row(work, l, first, n, error));
        RUN(site_visit(work, &view, error));
        if (edited)
            RUN(op_sum_heads(&work->model->ops, &sum, n, error));
    }
    return 0;
}

/* --- the layer -------------------------------------------------------------------------------- */

/* work_mid = x + [ln1_post](z W_O^T + b) */
static int output(struct run_work *work, int l, struct error *error) {
    const struct model_layer *layer = &work->model->layers[l];
    struct residual stream = attention_residual(work);
    struct rows to = {stream.to, work->d_stride}, z = {run_address(work->z), work->z_stride},
                out = {work->at_out, work->d_stride};
    int post_norms = work->model->facts.post_norms, summed = site_edited(work, SITE_RESULT, l);
    if (!summed && !post_norms && !site_wanted(work, SITE_ATTN_OUT, l))
        return step_product(work, &layer->o, z, layer->b_o, stream.from, to, error);
    if (!summed)
        RUN(step_product(work, &layer->o, z, layer->b_o, 0, out, error));
    if (step_post_later(work, l))
        return 0;
    if (post_norms)
        RUN(run_hook_call(work, HOOK_ATTN_RAW, l, out.address, out.stride, error));
    return step_add_output(work, SITE_ATTN_OUT, norm_step_of(work->model, LN1_POST, l), stream, 0,
                           error);
}

int run_attention(struct run_work *work, struct run_cache *cache, int l, struct error *error) {
    RUN(queries_keys_values(work, cache, l, error));
    RUN(heads(work, cache, l, error));
    RUN(head_results(work, l, error));
    RUN(run_hook_call(work, HOOK_Z, l, run_address(work->z), work->z_stride, error));
    return output(work, l, error);
}
