/* The forward pass of one chunk: reads as the model's equations, a dispatch or a site a line.
 *
 * Where nobody looks at a value it is not materialised (fused kernels); where somebody does, the
 * separate steps do the same arithmetic in the same order, so that looking changes no bit. */
#include <stdlib.h>
#include <string.h>

#include "run/tape.h"


#define address(buffer) run_address(buffer)

/* A whole-chunk view of [T, width] rows. */
struct site_view site_view_rows(const struct run_work *work, int site, int layer, uint64_t at,
                                uint32_t stride) {
    struct site_view view = {
        .site = site,
        .layer = layer,
        .address = at,
        .n_tokens = work->chunk.n_tokens,
        .token_stride = stride,
    };
    site_shape(site, &work->model->facts, &view.n_heads, &view.width);
    view.head_stride = view.width;
    return view;
}

static int visit_rows(struct run_work *work, int site, int layer, uint64_t at, uint32_t stride,
                      uint64_t scale, struct error *error) {
    struct site_view view = site_view_rows(work, site, layer, at, stride);
    view.scale = scale;
    return site_visit(work, &view, error);
}

/* dst = [add +] gain * x / rms(x), with the sites of the scale and of the normalised value. The
 * scale stays in work->scale. */
static int norm(struct run_work *work, int scale_site, int normalized_site, int layer, uint64_t x,
                uint64_t gain, uint64_t add, uint64_t dst, int keep_scale, struct error *error) {
    struct ops *ops = &work->model->ops;
    uint32_t n = work->chunk.n_tokens;
    struct norm_params params = {
        .x = x,
        .gain = gain,
        .dst = dst,
        .normalized = address(work->normalized),
        .scale = address(work->scale),
        .add = add,
        .width = work->model->facts.d_model,
        .stride = work->d_stride,
        .eps = work->model->facts.norm_eps,
    };
    uint32_t flags = add ? NORM_ADD : 0;
    if (!site_wanted(work, scale_site, layer) && !site_wanted(work, normalized_site, layer)) {
        params.flags = flags | (keep_scale ? NORM_WRITE_SCALE : 0);
        return op_norm(ops, &params, n, error);
    }
    params.flags = NORM_WRITE_SCALE | NORM_NO_OUT;
    RUN(op_norm(ops, &params, n, error));
    RUN(visit_rows(work, scale_site, layer, params.scale, 1, 0, error));
    params.flags = NORM_READ_SCALE | NORM_WRITE_NORMALIZED | NORM_NO_OUT;
    RUN(op_norm(ops, &params, n, error));
    RUN(visit_rows(work, normalized_site, layer, params.normalized, work->d_stride, params.scale,
                   error));
    params.x = params.normalized;
    params.flags = flags | NORM_READ_NORMALIZED;
    return op_norm(ops, &params, n, error);
}

/* dst = x W^T [+ bias] [+ add] for the whole chunk. */
static int product(struct run_work *work, const struct op_matrix *matrix, uint64_t x,
                   uint32_t x_stride, uint64_t bias, uint64_t add, uint64_t dst,
                   uint32_t dst_stride, struct error *error) {
    struct op_linear_args args = {
        .x = x,
        .dst = dst,
        .bias = bias,
        .add = add,
        .n_rows = work->chunk.n_tokens,
        .x_stride = x_stride,
        .dst_stride = dst_stride,
        .decode = work->chunk.batch->decode,
    };
    return op_linear(&work->model->ops, matrix, &args, error);
}

/* dst = norm(x) W^T [+ bias], in one dispatch where nobody looks between the two; the normed input
 * otherwise stays in work->norm. */
static int norm_product(struct run_work *work, int scale_site, int normalized_site, int layer,
                        uint64_t gain, const struct op_matrix *matrix, uint64_t bias, uint64_t dst,
                        uint32_t dst_stride, int keep_scale, struct error *error) {
    uint64_t x = address(work->x);
    if (!keep_scale && !site_wanted(work, scale_site, layer) &&
        !site_wanted(work, normalized_site, layer) &&
        op_linear_norms(&work->model->ops, work->chunk.n_tokens)) {
        struct op_linear_args args = {
            .x = x,
            .dst = dst,
            .bias = bias,
            .gain = gain,
            .eps = work->model->facts.norm_eps,
            .n_rows = work->chunk.n_tokens,
            .x_stride = work->d_stride,
            .dst_stride = dst_stride,
            .decode = work->chunk.batch->decode != 0,
        };
        return op_linear(&work->model->ops, matrix, &args, error);
    }
    RUN(norm(work, scale_site, normalized_site, layer, x, gain, 0, address(work->norm), keep_scale,
             error));
    return product(work, matrix, address(work->norm), work->d_stride, bias, 0, dst, dst_stride,
                   error);
}

/* Does nobody look at these sites of a layer, nor keep what lies between a norm and what
 * its product becomes? */
static int unseen(const struct run_work *work, const int *sites, int n, int layer) {
    for (int i = 0; i < n; i++)
        if (site_wanted(work, sites[i], layer))
            return 0;
    return !work->tape && !work->hook;
}

static int frozen(const struct run_work *work, int layer) {
    return work->chunk.batch->frozen && work->chunk.batch->frozen[layer];
}

/* q, k, v of the stream: norm, bias, sites, head norms, rotation, into the cache. */
static int attention_inputs(struct run_work *work, struct run_cache *cache, int l,
                            struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    uint64_t q = work->at_qkv, k = q + 4 * (uint64_t)f->n_heads * f->d_head,
             v = k + 4 * (uint64_t)f->n_kv_heads * f->d_head;
    struct rope_params rope = {
        .qkv = q,
        .angles = address(work->model->angles[f->rope_table[l]]),
        .tokens = work->chunk.tokens,
        .q_gain = layer->q_norm,
        .k_gain = layer->k_norm,
        .k_cache = address(cache->k[l]),
        .v_cache = address(cache->v[l]),
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .stride = work->qkv_stride,
        .eps = f->norm_eps,
        .flags = (f->qk_norm ? ROPE_QK_NORM : 0) | ROPE_ROTATE | ROPE_STORE,
    };
    static const int between[] = {SITE_LN1_SCALE, SITE_LN1_NORMALIZED, SITE_Q,    SITE_K,
                                  SITE_V,         SITE_ROT_Q,          SITE_ROT_K};
    if (!f->qk_norm && unseen(work, between, 7, l) &&
        op_linear_pairs_offered(&work->model->ops, &layer->qkv, work->chunk.n_tokens)) {
        struct op_linear_pairs_args args = {
            .x = address(work->x),
            .gain = layer->ln1,
            .dst = q,
            .bias = layer->b_qkv,
            .angles = rope.angles,
            .tokens = rope.tokens,
            .k_cache = rope.k_cache,
            .v_cache = rope.v_cache,
            .n_rows = work->chunk.n_tokens,
            .x_stride = work->d_stride,
            .dst_stride = work->qkv_stride,
            .kind = PAIRS_ROTATE,
            .n_heads = f->n_heads,
            .n_kv_heads = f->n_kv_heads,
            .d_head = f->d_head,
            .eps = f->norm_eps,
        };
        return op_linear_pairs(&work->model->ops, &layer->qkv, &args, error);
    }
    RUN(norm_product(work, SITE_LN1_SCALE, SITE_LN1_NORMALIZED, l, layer->ln1, &layer->qkv,
                     layer->b_qkv, q, work->qkv_stride, site_edited(work, SITE_V, l), error));
    RUN(visit_rows(work, SITE_Q, l, q, work->qkv_stride, 0, error));
    RUN(visit_rows(work, SITE_K, l, k, work->qkv_stride, 0, error));
    RUN(visit_rows(work, SITE_V, l, v, work->qkv_stride, address(work->scale), error));
    RUN(tape_keep_qkv(work, l, error));
    if (!site_wanted(work, SITE_ROT_Q, l) && !site_wanted(work, SITE_ROT_K, l))
        return op_rope(&work->model->ops, &rope, work->chunk.n_tokens, error);
    rope.flags &= ~(uint32_t)ROPE_STORE;
    RUN(op_rope(&work->model->ops, &rope, work->chunk.n_tokens, error));
    RUN(visit_rows(work, SITE_ROT_Q, l, q, work->qkv_stride, 0, error));
    RUN(visit_rows(work, SITE_ROT_K, l, k, work->qkv_stride, 0, error));
    rope.flags = ROPE_STORE;
    return op_rope(&work->model->ops, &rope, work->chunk.n_tokens, error);
}

/* z of the tiles [first_tile, last_tile), whose patterns fit the scratch memory. */
static int attention_tiles(struct run_work *work, struct run_cache *cache, int l,
                           uint32_t first_tile, uint32_t last_tile, uint32_t key_stride,
                           struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct chunk *chunk = &work->chunk;
    struct ops *ops = &work->model->ops;
    uint32_t first = chunk->tile_list[first_tile].first;
    uint32_t n_tokens = chunk->tile_list[last_tile - 1].first +
                        chunk->tile_list[last_tile - 1].count - first;
    uint64_t tokens = frozen(work, l) ? chunk->frozen_tokens : chunk->tokens;
    uint64_t tiles = chunk->tiles + first_tile * sizeof(struct query_tile);
    struct site_view view = {
        .layer = l,
        .address = address(work->scores),
        .first = first,
        .n_tokens = n_tokens,
        .token_stride = f->n_heads * key_stride,
        .n_heads = f->n_heads,
        .head_stride = key_stride,
        .width = chunk->max_keys,
    };
    /* decoding */
    if (chunk->n_tiles == chunk->n_tokens && !site_wanted(work, SITE_SCORES, l) &&
        !site_wanted(work, SITE_PATTERN, l)) {
        struct decode_params decode = {
            .qkv = work->at_qkv,
            .k_cache = address(cache->k[l]),
            .v_cache = address(cache->v[l]),
            .tokens = tokens,
            .scores = address(work->scores),
            .z = address(work->z),
            .first_token = first,
            .n_heads = f->n_heads,
            .n_kv_heads = f->n_kv_heads,
            .d_head = f->d_head,
            .stride = work->qkv_stride,
            .z_stride = work->z_stride,
            .key_stride = key_stride,
            .window = f->window[l],
            .scale = f->attn_scale,
            .softcap = f->attn_softcap,
        };
        return op_attn_decode(ops, &decode, n_tokens, chunk->max_keys, error);
    }
    struct scores_params scores = {
        .qkv = work->at_qkv,
        .k_cache = address(cache->k[l]),
        .tokens = tokens,
        .tiles = tiles,
        .scores = address(work->scores),
        .first_token = first,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .stride = work->qkv_stride,
        .key_stride = key_stride,
        .scale = f->attn_scale,
        .softcap = f->attn_softcap,
    };
    RUN(op_attn_scores(ops, &scores, last_tile - first_tile, chunk->max_keys, error));
    view.site = SITE_SCORES;
    RUN(site_visit(work, &view, error));
    struct softmax_params softmax = {
        .scores = address(work->scores),
        .tokens = tokens,
        .first_token = first,
        .n_heads = f->n_heads,
        .key_stride = key_stride,
        .window = f->window[l],
    };
    RUN(op_attn_softmax(ops, &softmax, n_tokens, chunk->max_keys, error));
    view.site = SITE_PATTERN;
    RUN(site_visit(work, &view, error));
    struct attn_output_params mix = {
        .pattern = address(work->scores),
        .v_cache = address(cache->v[l]),
        .tokens = tokens,
        .tiles = tiles,
        .z = address(work->z),
        .first_token = first,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .z_stride = work->z_stride,
        .key_stride = key_stride,
        .window = f->window[l],
    };
    return op_attn_output(ops, &mix, last_tile - first_tile, chunk->max_keys, error);
}

static int attention(struct run_work *work, struct run_cache *cache, int l, struct error *error) {
    const struct chunk *chunk = &work->chunk;
    uint32_t key_stride = op_row_stride(chunk->max_keys);
    uint64_t token_bytes = 4 * (uint64_t)work->model->facts.n_heads * key_stride;
    uint32_t room = (uint32_t)(WORK_SCRATCH / token_bytes),
             at_once = room < OP_TILE ? OP_TILE : room;
    if (at_once > chunk->n_tokens)
        at_once = chunk->n_tokens < OP_TILE ? OP_TILE : chunk->n_tokens;
    RUN(work_grow(work, &work->scores, at_once * token_bytes, "attention scores", error));
    for (uint32_t tile = 0, end; tile < chunk->n_tiles; tile = end) {
        for (end = tile + 1; end < chunk->n_tiles; end++)
            if (chunk->tile_list[end].first + chunk->tile_list[end].count -
                    chunk->tile_list[tile].first >
                at_once)
                break;
        RUN(attention_tiles(work, cache, l, tile, end, key_stride, error));
    }
    return visit_rows(work, SITE_Z, l, address(work->z), work->z_stride, 0, error);
}

/* result[t, h, :] = z_h W_O^h for tokens [first, first + n), a row for each (token, head). */
static int head_results(struct run_work *work, int l, uint32_t first, uint32_t n,
                        struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct op_matrix *o = &work->model->layers[l].o;
    struct ops *ops = &work->model->ops;
    uint64_t z = address(work->z) + 4 * (uint64_t)first * work->z_stride;
    if (f->d_head % 16 == 0) { /* a head is a slice of the matrix's inputs */
        for (uint32_t h = 0; h < f->n_heads; h++) {
            struct op_linear_args args = {
                .x = z + 4 * (uint64_t)h * f->d_head,
                .dst = address(work->result) + 4 * (uint64_t)h * work->d_stride,
                .n_rows = n,
                .x_stride = work->z_stride,
                .dst_stride = f->n_heads * work->d_stride,
                .first_k = h * f->d_head,
                .n_k = f->d_head,
                .decode = work->chunk.batch->decode,
            };
            RUN(op_linear(ops, o, &args, error));
        }
        return 0;
    }
    /* Odd head sizes: one row a head, zero but for that head's part. */
    RUN(work_grow(work, &work->expanded, 4 * (uint64_t)work->capacity * f->n_heads * work->z_stride,
                  "expanded heads", error));
    for (uint32_t h = 0; h < f->n_heads; h++) {
        uint64_t at = 4 * (uint64_t)h * f->d_head;
        struct copy_params copy = {
            .x = z + at,
            .dst = address(work->expanded) + 4 * (uint64_t)h * work->z_stride + at,
            .n_rows = n,
            .width = f->d_head,
            .x_stride = work->z_stride,
            .out_stride = f->n_heads * work->z_stride,
        };
        RUN(op_copy(ops, &copy, error));
    }
    struct op_linear_args args = {
        .x = address(work->expanded),
        .dst = address(work->result),
        .n_rows = n * f->n_heads,
        .x_stride = work->z_stride,
        .dst_stride = work->d_stride,
        .decode = work->chunk.batch->decode,
    };
    return op_linear(ops, o, &args, error);
}

/* The per-head results' site, in pieces; if they were edited, attention's output is their
 * sum, written to `dst`. */
static int visit_results(struct run_work *work, int l, uint64_t dst, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint64_t token_bytes = 4 * (uint64_t)f->n_heads * work->d_stride;
    uint32_t at_once = (uint32_t)(WORK_SCRATCH / token_bytes);
    at_once = at_once < 1 ? 1 : at_once > work->capacity ? work->capacity : at_once;
    RUN(work_grow(work, &work->result, at_once * token_bytes, "per-head results", error));
    for (uint32_t first = 0, n; first < work->chunk.n_tokens; first += n) {
        n = work->chunk.n_tokens - first < at_once ? work->chunk.n_tokens - first : at_once;
        RUN(head_results(work, l, first, n, error));
        struct site_view view = {
            .site = SITE_RESULT,
            .layer = l,
            .address = address(work->result),
            .first = first,
            .n_tokens = n,
            .token_stride = f->n_heads * work->d_stride,
            .n_heads = f->n_heads,
            .head_stride = work->d_stride,
            .width = f->d_model,
        };
        RUN(site_visit(work, &view, error));
        if (!dst)
            continue;
        struct sum_heads_params sum = {
            .x = address(work->result),
            .dst = dst + 4 * (uint64_t)first * work->d_stride,
            .bias = work->model->layers[l].b_o,
            .n_heads = f->n_heads,
            .width = f->d_model,
            .head_stride = work->d_stride,
            .out_stride = work->d_stride,
            .has_bias = f->o_bias,
        };
        RUN(op_sum_heads(&work->model->ops, &sum, n, error));
    }
    return 0;
}

/* x += [post-norm of] a block's output, which lies at work->at_out and stays there; `rows` (0:
 * none) freezes it to that of other rows. */
static int block_output(struct run_work *work, int l, int out_site, int scale_site,
                        int normalized_site, uint64_t post_gain, uint64_t rows,
                        struct error *error) {
    struct ops *ops = &work->model->ops;
    uint64_t x = address(work->x), out = work->at_out;
    int looked_at = site_wanted(work, out_site, l) || rows || work->hook;
    if (post_gain) {
        uint64_t normed = address(work->norm);
        if (!looked_at)
            return norm(work, scale_site, normalized_site, l, out, post_gain, x, x, 0, error);
        RUN(norm(work, scale_site, normalized_site, l, out, post_gain, 0, normed, 0, error));
        out = normed;
    }
    struct copy_params add = {
        .x = out,
        .dst = x,
        .add = x,
        .n_rows = work->chunk.n_tokens,
        .width = work->model->facts.d_model,
        .x_stride = work->d_stride,
        .out_stride = work->d_stride,
        .flags = COPY_ADD,
    };
    if (rows && !site_wanted(work, out_site, l) && !work->hook) { /* picked and added in one */
        add.rows = rows;
        add.flags |= COPY_ROWS;
        return op_copy(ops, &add, error);
    }
    if (rows) {
        struct copy_params pick = {
            .x = out,
            .dst = address(post_gain ? work->out : work->norm),
            .rows = rows,
            .n_rows = add.n_rows,
            .width = add.width,
            .x_stride = work->d_stride,
            .out_stride = work->d_stride,
            .flags = COPY_ROWS,
        };
        RUN(op_copy(ops, &pick, error));
        add.x = pick.dst;
    }
    RUN(visit_rows(work, out_site, l, add.x, work->d_stride, 0, error));
    if (out_site == SITE_MLP_OUT)
        RUN(run_hook_call(work, HOOK_MLP_OUT, l, add.x, work->d_stride, error));
    return op_copy(ops, &add, error);
}

static int attention_block(struct run_work *work, struct run_cache *cache, int l,
                           struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    uint64_t x = address(work->x), out = work->at_out;
    int results = site_wanted(work, SITE_RESULT, l), summed = site_edited(work, SITE_RESULT, l);
    RUN(attention_inputs(work, cache, l, error));
    RUN(attention(work, cache, l, error));
    if (results)
        RUN(visit_results(work, l, summed ? out : 0, error));
    RUN(run_hook_call(work, HOOK_Z, l, address(work->z), work->z_stride, error));
    if (!summed && !f->post_norms && !site_wanted(work, SITE_ATTN_OUT, l))
        return product(work, &layer->o, address(work->z), work->z_stride, layer->b_o, x, x,
                       work->d_stride, error);
    if (!summed)
        RUN(product(work, &layer->o, address(work->z), work->z_stride, layer->b_o, 0, out,
                    work->d_stride, error));
    if (f->post_norms)
        RUN(run_hook_call(work, HOOK_ATTN_RAW, l, out, work->d_stride, error));
    return block_output(work, l, SITE_ATTN_OUT, SITE_LN1_POST_SCALE, SITE_LN1_POST_NORMALIZED,
                        layer->ln1_post, 0, error);
}

/* work->post = act(gate) * up of the normed stream, with their sites. */
static int mlp_post(struct run_work *work, int l, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    uint64_t gate = work->at_gate_up, post = address(work->post);
    static const int between[] = {SITE_LN2_SCALE, SITE_LN2_NORMALIZED, SITE_MLP_PRE,
                                  SITE_MLP_PRE_LINEAR};
    if (unseen(work, between, 4, l) &&
        op_linear_pairs_offered(&work->model->ops, &layer->gate_up, work->chunk.n_tokens)) {
        struct op_linear_pairs_args args = {
            .x = address(work->x),
            .gain = layer->ln2,
            .dst = post,
            .bias = layer->b_gate_up,
            .n_rows = work->chunk.n_tokens,
            .x_stride = work->d_stride,
            .dst_stride = work->mlp_stride,
            .kind = PAIRS_GATE,
            .act = f->act,
            .eps = f->norm_eps,
        };
        return op_linear_pairs(&work->model->ops, &layer->gate_up, &args, error);
    }
    RUN(norm_product(work, SITE_LN2_SCALE, SITE_LN2_NORMALIZED, l, layer->ln2, &layer->gate_up,
                     layer->b_gate_up, gate, work->gate_up_stride, 0, error));
    RUN(visit_rows(work, SITE_MLP_PRE, l, gate, work->gate_up_stride, 0, error));
    RUN(visit_rows(work, SITE_MLP_PRE_LINEAR, l, gate + 4 * (uint64_t)f->d_mlp,
                   work->gate_up_stride, 0, error));
    struct act_params act = {
        .gate_up = gate,
        .dst = post,
        .width = f->d_mlp,
        .in_stride = work->gate_up_stride,
        .out_stride = work->mlp_stride,
        .act = f->act,
    };
    return op_act(&work->model->ops, &act, work->chunk.n_tokens, error);
}

static int mlp_block(struct run_work *work, int l, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    uint64_t x = address(work->x), post = address(work->post);
    uint64_t rows = frozen(work, l) ? work->chunk.mlp_rows : 0;
    RUN(mlp_post(work, l, error));
    RUN(visit_rows(work, SITE_MLP_POST, l, post, work->mlp_stride, 0, error));
    if (!f->post_norms && !rows && !work->hook && !site_wanted(work, SITE_MLP_OUT, l))
        return product(work, &layer->down, post, work->mlp_stride, layer->b_down, x, x,
                       work->d_stride, error);
    RUN(product(work, &layer->down, post, work->mlp_stride, layer->b_down, 0, work->at_out,
                work->d_stride, error));
    return block_output(work, l, SITE_MLP_OUT, SITE_LN2_POST_SCALE, SITE_LN2_POST_NORMALIZED,
                        layer->ln2_post, rows, error);
}

/* Logits of `n` normed rows at `x`, straight into readback memory, in pieces. */
static int logits_rows(struct run_work *work, uint64_t x, uint32_t n_rows, int by_row,
                       struct error *error) {
    const struct model *model = work->model;
    uint32_t stride = op_row_stride(model->facts.d_vocab);
    for (uint32_t done = 0, n; done < n_rows; done += n) {
        uint64_t offset;
        n = n_rows - done;
        RUN(work_readback_take(work, &n, stride, &offset, error));
        struct op_linear_args args = {
            .x = x + 4 * (uint64_t)done * work->d_stride,
            .dst = address(work->readback) + 4 * offset,
            .n_rows = n,
            .x_stride = work->d_stride,
            .dst_stride = stride,
            .softcap = model->facts.final_softcap,
            .decode = work->chunk.batch->decode,
        };
        struct readback piece = {
            .to = work->chunk.batch->logits,
            .offset = offset,
            .first = done,
            .n = n,
            .token_floats = stride,
            .n_heads = 1,
            .width = model->facts.d_vocab,
            .by_row = by_row,
        };
        RUN(op_linear(&work->model->ops, &model->unembed, &args, error));
        RUN(work_readback_push(work, &piece, error));
    }
    return 0;
}

int run_final_norm(struct run_work *work, struct error *error) {
    return norm(work, SITE_FINAL_SCALE, SITE_FINAL_NORMALIZED, 0, address(work->x),
                work->model->ln_final, 0, address(work->norm), 0, error);
}

static int logits(struct run_work *work, struct error *error) {
    const struct chunk *chunk = &work->chunk;
    const struct model *model = work->model;
    int all = chunk->batch->logits_mode == RUN_LOGITS_ALL,
        looked_at = site_wanted(work, SITE_FINAL_SCALE, 0) ||
                    site_wanted(work, SITE_FINAL_NORMALIZED, 0);
    if (all || looked_at)
        RUN(run_final_norm(work, error));
    if (all)
        return logits_rows(work, address(work->norm), chunk->n_tokens, 0, error);
    if (chunk->batch->logits_mode != RUN_LOGITS_LAST || chunk->n_last == 0)
        return 0;
    if (looked_at) { /* normed already: pick the rows */
        struct copy_params pick = {
            .x = address(work->norm),
            .dst = address(work->out),
            .rows = chunk->last_rows,
            .n_rows = chunk->n_last,
            .width = model->facts.d_model,
            .x_stride = work->d_stride,
            .out_stride = work->d_stride,
            .flags = COPY_ROWS,
        };
        RUN(op_copy(&work->model->ops, &pick, error));
    } else {
        struct norm_params params = {
            .x = address(work->x),
            .gain = model->ln_final,
            .dst = address(work->out),
            .rows = chunk->last_rows,
            .width = model->facts.d_model,
            .stride = work->d_stride,
            .eps = model->facts.norm_eps,
            .flags = NORM_ROWS,
        };
        RUN(op_norm(&work->model->ops, &params, chunk->n_last, error));
    }
    return logits_rows(work, address(work->out), chunk->n_last, 1, error);
}

/* The residual stream that the caller kept, into work->x. */
static int resume(struct run_work *work, struct error *error) {
    const struct chunk *chunk = &work->chunk;
    size_t width = work->model->facts.d_model;
    uint64_t rows;
    float *packed = malloc(chunk->n_tokens * width * sizeof *packed);
    if (!packed)
        return error_set(error, ERROR_MEMORY, "out of memory for a resumed run");
    for (uint32_t t = 0; t < chunk->n_tokens; t++)
        memcpy(packed + t * width, chunk->batch->inputs + chunk->places[t].packed * width,
               width * sizeof *packed);
    int failed = work_upload(work, packed, chunk->n_tokens * width * sizeof *packed, &rows, error);
    free(packed);
    if (failed)
        return -1;
    struct copy_params copy = {
        .x = rows,
        .dst = address(work->x),
        .n_rows = chunk->n_tokens,
        .width = (uint32_t)width,
        .x_stride = (uint32_t)width,
        .out_stride = work->d_stride,
    };
    return op_copy(&work->model->ops, &copy, error);
}

static int begin(struct run_work *work, struct error *error) {
    const struct model *model = work->model;
    uint64_t x = address(work->x);
    if (work->chunk.batch->inputs)
        return resume(work, error);
    RUN(op_embed(&work->model->ops, &model->embed, work->chunk.tokens, work->chunk.n_tokens,
                 model->facts.embed_scale, x, work->d_stride, error));
    return visit_rows(work, SITE_EMBED, 0, x, work->d_stride, 0, error);
}

int run_layer(struct run_work *work, struct run_cache *cache, int l, struct error *error) {
    RUN(tape_layer_begin(work, l, error));
    RUN(attention_block(work, cache, l, error));
    RUN(visit_rows(work, SITE_RESID_MID, l, address(work->x), work->d_stride, 0, error));
    RUN(tape_layer_middle(work, l, error));
    return mlp_block(work, l, error);
}

int run_layers(struct run_work *work, struct run_cache *cache, struct error *error) {
    const struct model *model = work->model;
    uint64_t x = address(work->x);
    uint32_t stop = work->chunk.batch->stop_layer;
    RUN(begin(work, error));
    for (int l = (int)work->chunk.batch->first_layer;
         l < (int)(stop ? stop : model->facts.n_layers); l++) {
        RUN(visit_rows(work, SITE_RESID_PRE, l, x, work->d_stride, 0, error));
        RUN(run_layer(work, cache, l, error));
        RUN(visit_rows(work, SITE_RESID_POST, l, x, work->d_stride, 0, error));
    }
    if (stop) /* the stream entering the first layer that is left out is still to be had */
        return stop < model->facts.n_layers
                   ? visit_rows(work, SITE_RESID_PRE, (int)stop, x, work->d_stride, 0, error)
                   : 0;
    RUN(run_hook_call(work, HOOK_FINAL, 0, x, work->d_stride, error));
    return logits(work, error);
}
