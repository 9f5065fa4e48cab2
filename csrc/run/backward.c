/* The way back through one chunk: reads as forward.c read from the end. Every step gives the
 * gradient with respect to what its forward step took, and every site of the forward pass is
 * passed again (captured gradients, edits undone).
 *
 * dx [T, d_stride] is the gradient with respect to the stream. Keys, values and rotated
 * queries are those of the forward pass; patterns are computed again from them, everything
 * else is on the tape. */
#include <string.h>

#include "run/tape.h"

#define address(buffer) run_address(buffer)

static int back_rows(struct run_work *work, int site, int layer, uint64_t at, uint32_t stride,
                     struct error *error) {
    struct site_view view = site_view_rows(work, site, layer, at, stride);
    return site_visit_backward(work, &view, error);
}

static int product_back(struct run_work *work, const struct op_matrix *matrix, uint64_t dy,
                        uint32_t y_stride, uint64_t dx, uint32_t x_stride, struct error *error) {
    struct op_linear_bwd_args args = {
        .dy = dy,
        .dx = dx,
        .n_rows = work->chunk.n_tokens,
        .y_stride = y_stride,
        .x_stride = x_stride,
    };
    return op_linear_bwd(&work->model->ops, matrix, &args, error);
}

static int copy_rows(struct run_work *work, uint64_t from, uint64_t to, uint64_t add,
                     struct error *error) {
    struct copy_params copy = {
        .x = from,
        .dst = to,
        .add = add,
        .n_rows = work->chunk.n_tokens,
        .width = work->model->facts.d_model,
        .x_stride = work->d_stride,
        .out_stride = work->d_stride,
        .flags = add ? COPY_ADD : 0,
    };
    return op_copy(&work->model->ops, &copy, error);
}

/* dst = [add +] gradient through a norm of x with this gain, given that of its output, with
 * the sites in between. */
static int norm_back(struct run_work *work, int scale_site, int normalized_site, int layer,
                     uint64_t x, uint64_t gain, uint64_t dy, uint64_t add, uint64_t dst,
                     struct error *error) {
    uint32_t n = work->chunk.n_tokens;
    struct norm_bwd_params params = {
        .x = x,
        .gain = gain,
        .dy = dy,
        .dx = dst,
        .add = add,
        .dnormalized = address(work->normalized),
        .dscale = address(work->scale),
        .width = work->model->facts.d_model,
        .stride = work->d_stride,
        .flags = add ? NORM_BWD_ADD : 0,
        .eps = work->model->facts.norm_eps,
    };
    if (site_wanted(work, scale_site, layer) || site_wanted(work, normalized_site, layer)) {
        struct norm_bwd_params looked_at = params;
        looked_at.flags = NORM_BWD_WRITE_NORMALIZED | NORM_BWD_NO_OUT;
        RUN(op_norm_bwd(&work->model->ops, &looked_at, n, error));
        RUN(back_rows(work, normalized_site, layer, looked_at.dnormalized, work->d_stride, error));
        looked_at.dy = looked_at.dnormalized;
        looked_at.flags = NORM_BWD_NORMALIZED | NORM_BWD_WRITE_SCALE | NORM_BWD_NO_OUT;
        RUN(op_norm_bwd(&work->model->ops, &looked_at, n, error));
        RUN(back_rows(work, scale_site, layer, looked_at.dscale, 1, error));
        params.dy = looked_at.dnormalized;
        params.flags |= NORM_BWD_NORMALIZED;
    }
    return op_norm_bwd(&work->model->ops, &params, n, error);
}

/* The gradient of a block's output: of the stream it is added to, then back through its
 * post-norm. *d: where it lies. */
static int output_back(struct run_work *work, int l, int out_site, int scale_site,
                       int normalized_site, uint64_t post_gain, const struct gpu_buffer *raw,
                       uint64_t *d, struct error *error) {
    uint64_t draw = address(work->tape->draw);
    *d = address(work->tape->dx);
    if (site_edited(work, out_site, l)) { /* the stream's own gradient must not change */
        RUN(copy_rows(work, *d, draw, 0, error));
        *d = draw;
    }
    RUN(back_rows(work, out_site, l, *d, work->d_stride, error));
    if (!post_gain)
        return 0;
    RUN(norm_back(work, scale_site, normalized_site, l, address(raw), post_gain, *d, 0, draw,
                  error));
    *d = draw;
    return 0;
}

static int mlp_back(struct run_work *work, int l, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    struct run_tape *tape = work->tape;
    const struct tape_layer *kept = &tape->layers[l];
    uint64_t dx = address(tape->dx), dgate = address(tape->dgate_up), dpost = address(tape->dpost),
             dnorm = address(tape->dnorm), d;
    RUN(run_hook_call(work, HOOK_D_RESID_POST, l, dx, work->d_stride, error));
    RUN(output_back(work, l, SITE_MLP_OUT, SITE_LN2_POST_SCALE, SITE_LN2_POST_NORMALIZED,
                    layer->ln2_post, kept->mlp_raw, &d, error));
    RUN(product_back(work, &layer->down, d, work->d_stride, dpost, work->mlp_stride, error));
    RUN(back_rows(work, SITE_MLP_POST, l, dpost, work->mlp_stride, error));
    struct act_bwd_params act = {
        .gate_up = address(kept->gate_up),
        .dpost = dpost,
        .dgate_up = dgate,
        .width = f->d_mlp,
        .in_stride = work->gate_up_stride,
        .out_stride = work->mlp_stride,
        .act = f->act,
    };
    RUN(op_act_bwd(&work->model->ops, &act, work->chunk.n_tokens, error));
    RUN(back_rows(work, SITE_MLP_PRE_LINEAR, l, dgate + 4 * (uint64_t)f->d_mlp,
                  work->gate_up_stride, error));
    RUN(back_rows(work, SITE_MLP_PRE, l, dgate, work->gate_up_stride, error));
    RUN(product_back(work, &layer->gate_up, dgate, work->gate_up_stride, dnorm, work->d_stride,
                     error));
    RUN(run_hook_call(work, HOOK_D_MLP_NORMED, l, dnorm, work->d_stride, error));
    if (!work->hook)
        return norm_back(work, SITE_LN2_SCALE, SITE_LN2_NORMALIZED, l, address(kept->mid),
                         layer->ln2, dnorm, dx, dx, error);
    uint64_t input = address(tape->draw);
    RUN(norm_back(work, SITE_LN2_SCALE, SITE_LN2_NORMALIZED, l, address(kept->mid), layer->ln2,
                  dnorm, 0, input, error));
    RUN(run_hook_call(work, HOOK_D_MLP_INPUT, l, input, work->d_stride, error));
    return copy_rows(work, input, dx, dx, error);
}

/* The per-head results' site: each has the gradient of their sum. Where they were edited, dz comes
 * from them, head by head. */
static int results_back(struct run_work *work, int l, uint64_t d, int edited, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    struct ops *ops = &work->model->ops;
    uint64_t token_bytes = 4 * (uint64_t)f->n_heads * work->d_stride;
    uint32_t at_once = (uint32_t)(WORK_SCRATCH / token_bytes);
    at_once = at_once < 1 ? 1 : at_once > work->capacity ? work->capacity : at_once;
    if (edited && f->d_head % 16)
        return error_set(error, ERROR_VALUE,
                         "there is no gradient through an edit of hook_result with heads of %u: "
                         "not a multiple of 16",
                         f->d_head);
    RUN(work_grow(work, &work->result, at_once * token_bytes, "per-head results", error));
    for (uint32_t first = 0, n; first < work->chunk.n_tokens; first += n) {
        n = work->chunk.n_tokens - first < at_once ? work->chunk.n_tokens - first : at_once;
        uint64_t result = address(work->result);
        for (uint32_t h = 0; h < f->n_heads; h++) {
            struct copy_params copy = {
                .x = d + 4 * (uint64_t)first * work->d_stride,
                .dst = result + 4 * (uint64_t)h * work->d_stride,
                .n_rows = n,
                .width = f->d_model,
                .x_stride = work->d_stride,
                .out_stride = f->n_heads * work->d_stride,
            };
            RUN(op_copy(ops, &copy, error));
        }
        struct site_view view = {
            .site = SITE_RESULT,
            .layer = l,
            .address = result,
            .first = first,
            .n_tokens = n,
            .token_stride = f->n_heads * work->d_stride,
            .n_heads = f->n_heads,
            .head_stride = work->d_stride,
            .width = f->d_model,
        };
        RUN(site_visit_backward(work, &view, error));
        for (uint32_t h = 0; edited && h < f->n_heads; h++) {
            struct op_linear_bwd_args args = {
                .dy = result + 4 * (uint64_t)h * work->d_stride,
                .dx = address(work->tape->dz) +
                      4 * ((uint64_t)first * work->z_stride + h * f->d_head),
                .n_rows = n,
                .y_stride = f->n_heads * work->d_stride,
                .x_stride = work->z_stride,
                .first_k = h * f->d_head,
                .n_k = f->d_head,
            };
            RUN(op_linear_bwd(ops, &work->model->layers[l].o, &args, error));
        }
    }
    return 0;
}

/* A piece of the queries on the way back: tokens [first, first + n) of tiles [tile, end). */
struct piece {
    uint32_t tile, end, first, n, key_stride;
};

static struct site_view piece_view(const struct run_work *work, const struct piece *piece, int site,
                                   int layer, uint64_t at) {
    uint32_t heads = work->model->facts.n_heads;
    return (struct site_view){
        .site = site,
        .layer = layer,
        .address = at,
        .first = piece->first,
        .n_tokens = piece->n,
        .token_stride = heads * piece->key_stride,
        .n_heads = heads,
        .head_stride = piece->key_stride,
        .width = work->chunk.max_keys,
    };
}

/* dscores of the piece in tape->dscores: with respect to q . k, or (as_site) to the scores
 * after scale and cap. */
static int scores_back(struct run_work *work, struct run_cache *cache, int l,
                       const struct piece *piece, int as_site, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct chunk *chunk = &work->chunk;
    struct ops *ops = &work->model->ops;
    struct run_tape *tape = work->tape;
    uint64_t tiles = chunk->tiles + piece->tile * sizeof(struct query_tile);
    struct scores_params dpattern = {
        .qkv = address(tape->dz),
        .k_cache = address(cache->v[l]),
        .tokens = chunk->tokens,
        .tiles = tiles,
        .scores = address(tape->dscores),
        .first_token = piece->first,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .stride = work->z_stride,
        .key_stride = piece->key_stride,
        .scale = 1,
    };
    RUN(op_attn_scores(ops, &dpattern, piece->end - piece->tile, chunk->max_keys, error));
    struct site_view view = piece_view(work, piece, SITE_PATTERN, l, address(tape->dscores));
    if (!as_site)
        RUN(site_visit_backward(work, &view, error));
    struct softmax_bwd_params softmax = {
        .pattern = address(work->scores),
        .dpattern = address(tape->dscores),
        .scores = address(tape->capped),
        .tokens = chunk->tokens,
        .first_token = piece->first,
        .n_heads = f->n_heads,
        .key_stride = piece->key_stride,
        .window = f->window[l],
        .scale = as_site ? 1 : f->attn_scale,
        .softcap = as_site ? 0 : f->attn_softcap,
    };
    RUN(op_attn_softmax_bwd(ops, &softmax, piece->n, chunk->max_keys, error));
    view.site = SITE_SCORES;
    return as_site ? site_visit_backward(work, &view, error) : 0;
}

/* dq, and what the piece's queries add to dk and dv. */
static int piece_back(struct run_work *work, struct run_cache *cache, int l,
                      const struct piece *piece, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct chunk *chunk = &work->chunk;
    struct ops *ops = &work->model->ops;
    struct run_tape *tape = work->tape;
    const struct tape_layer *kept = &tape->layers[l];
    uint32_t n_tiles = piece->end - piece->tile;
    uint64_t dq = address(tape->dqkv), dk = dq + 4 * (uint64_t)f->n_heads * f->d_head,
             dv = dk + 4 * (uint64_t)f->n_kv_heads * f->d_head;
    uint64_t tiles = chunk->tiles + piece->tile * sizeof(struct query_tile);
    struct scores_params scores = {
        .qkv = address(kept->qkv),
        .k_cache = address(cache->k[l]),
        .tokens = chunk->tokens,
        .tiles = tiles,
        .scores = address(work->scores),
        .first_token = piece->first,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .stride = work->qkv_stride,
        .key_stride = piece->key_stride,
        .scale = f->attn_scale,
        .softcap = f->attn_softcap,
    };
    RUN(op_attn_scores(ops, &scores, n_tiles, chunk->max_keys, error));
    if (f->attn_softcap != 0) {
        scores.scores = address(tape->capped);
        RUN(op_attn_scores(ops, &scores, n_tiles, chunk->max_keys, error));
    }
    struct softmax_params softmax = {
        .scores = address(work->scores),
        .tokens = chunk->tokens,
        .first_token = piece->first,
        .n_heads = f->n_heads,
        .key_stride = piece->key_stride,
        .window = f->window[l],
    };
    RUN(op_attn_softmax(ops, &softmax, piece->n, chunk->max_keys, error));
    struct attn_output_bwd_params mix = {
        .a = address(work->scores),
        .y = address(tape->dz),
        .tokens = chunk->tokens,
        .tiles = chunk->tiles,
        .sums = dv,
        .first_token = piece->first,
        .last_token = piece->first + piece->n,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .y_stride = work->z_stride,
        .out_stride = work->qkv_stride,
        .key_stride = piece->key_stride,
        .window = f->window[l],
        .add = piece->first > 0,
    };
    RUN(op_attn_output_bwd(ops, &mix, chunk->n_tiles, chunk->max_keys, error));
    if (site_wanted(work, SITE_SCORES, l))
        RUN(scores_back(work, cache, l, piece, 1, error));
    RUN(scores_back(work, cache, l, piece, 0, error));
    struct attn_output_params queries = {
        .pattern = address(tape->dscores),
        .v_cache = address(cache->k[l]),
        .tokens = chunk->tokens,
        .tiles = tiles,
        .z = dq,
        .first_token = piece->first,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .z_stride = work->qkv_stride,
        .key_stride = piece->key_stride,
        .window = f->window[l],
    };
    RUN(op_attn_output(ops, &queries, n_tiles, chunk->max_keys, error));
    mix.a = address(tape->dscores);
    mix.y = address(kept->qkv);
    mix.y_stride = work->qkv_stride;
    mix.sums = dk;
    return op_attn_output_bwd(ops, &mix, chunk->n_tiles, chunk->max_keys, error);
}

/* dqkv from dz, in pieces of the queries whose patterns fit the scratch memory. */
static int attention_back(struct run_work *work, struct run_cache *cache, int l,
                          struct error *error) {
    const struct chunk *chunk = &work->chunk;
    struct run_tape *tape = work->tape;
    uint32_t key_stride = op_row_stride(chunk->max_keys);
    uint64_t token_bytes = 4 * (uint64_t)work->model->facts.n_heads * key_stride;
    uint32_t room = (uint32_t)(WORK_SCRATCH / token_bytes),
             at_once = room < OP_TILE ? OP_TILE : room;
    if (at_once > chunk->n_tokens)
        at_once = chunk->n_tokens < OP_TILE ? OP_TILE : chunk->n_tokens;
    RUN(work_grow(work, &work->scores, at_once * token_bytes, "attention scores", error));
    RUN(work_grow(work, &tape->dscores, at_once * token_bytes, "gradients of scores", error));
    if (work->model->facts.attn_softcap != 0)
        RUN(work_grow(work, &tape->capped, at_once * token_bytes, "capped scores", error));
    struct piece piece = {.key_stride = key_stride};
    for (; piece.tile < chunk->n_tiles; piece.tile = piece.end) {
        piece.first = chunk->tile_list[piece.tile].first;
        for (piece.end = piece.tile + 1; piece.end < chunk->n_tiles; piece.end++)
            if (chunk->tile_list[piece.end].first + chunk->tile_list[piece.end].count -
                    piece.first >
                at_once)
                break;
        piece.n = chunk->tile_list[piece.end - 1].first + chunk->tile_list[piece.end - 1].count -
                  piece.first;
        RUN(piece_back(work, cache, l, &piece, error));
    }
    return 0;
}

static int attention_block_back(struct run_work *work, struct run_cache *cache, int l,
                                struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    struct run_tape *tape = work->tape;
    const struct tape_layer *kept = &tape->layers[l];
    uint64_t dx = address(tape->dx), dz = address(tape->dz), dq = address(tape->dqkv),
             dnorm = address(tape->dnorm), d;
    uint64_t dk = dq + 4 * (uint64_t)f->n_heads * f->d_head,
             dv = dk + 4 * (uint64_t)f->n_kv_heads * f->d_head;
    int edited = site_edited(work, SITE_RESULT, l);
    RUN(run_hook_call(work, HOOK_D_RESID_MID, l, dx, work->d_stride, error));
    RUN(output_back(work, l, SITE_ATTN_OUT, SITE_LN1_POST_SCALE, SITE_LN1_POST_NORMALIZED,
                    layer->ln1_post, kept->attn_raw, &d, error));
    if (site_wanted(work, SITE_RESULT, l))
        RUN(results_back(work, l, d, edited, error));
    if (!edited)
        RUN(product_back(work, &layer->o, d, work->d_stride, dz, work->z_stride, error));
    RUN(back_rows(work, SITE_Z, l, dz, work->z_stride, error));
    RUN(attention_back(work, cache, l, error));
    RUN(back_rows(work, SITE_ROT_Q, l, dq, work->qkv_stride, error));
    RUN(back_rows(work, SITE_ROT_K, l, dk, work->qkv_stride, error));
    struct rope_bwd_params rope = {
        .dqkv = dq,
        .qkv = address(kept->qkv_in),
        .angles = address(work->model->angles[f->rope_table[l]]),
        .tokens = work->chunk.tokens,
        .q_gain = layer->q_norm,
        .k_gain = layer->k_norm,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .stride = work->qkv_stride,
        .flags = (f->qk_norm ? ROPE_QK_NORM : 0) | ROPE_ROTATE,
        .eps = f->norm_eps,
    };
    RUN(op_rope_bwd(&work->model->ops, &rope, work->chunk.n_tokens, error));
    RUN(back_rows(work, SITE_V, l, dv, work->qkv_stride, error));
    RUN(back_rows(work, SITE_K, l, dk, work->qkv_stride, error));
    RUN(back_rows(work, SITE_Q, l, dq, work->qkv_stride, error));
    RUN(run_hook_call(work, HOOK_D_QKV, l, dq, work->qkv_stride, error));
    RUN(product_back(work, &layer->qkv, dq, work->qkv_stride, dnorm, work->d_stride, error));
    return norm_back(work, SITE_LN1_SCALE, SITE_LN1_NORMALIZED, l, address(kept->x), layer->ln1,
                     dnorm, dx, dx, error);
}

/* Runs a layer's inside again from its kept input, for the values that the way back needs. */
static int inside_again(struct run_work *work, struct run_cache *cache, int l,
                        struct error *error) {
    const struct run_batch *batch = work->chunk.batch;
    const struct run_hook *hook = work->hook;
    struct run_batch silent = *batch;
    RUN(copy_rows(work, address(work->tape->layers[l].x), address(work->x), 0, error));
    silent.n_captures = 0;
    work->chunk.batch = &silent;
    work->hook = NULL;
    int failed = run_layer(work, cache, l, error);
    work->chunk.batch = batch;
    work->hook = hook;
    return failed;
}

static int layer_back(struct run_work *work, struct run_cache *cache, int l, struct error *error) {
    uint64_t dx = address(work->tape->dx);
    /* the last layer's inside is still there */
    if (!work->tape->keep_inside && l + 1 < (int)work->model->facts.n_layers)
        RUN(inside_again(work, cache, l, error));
    RUN(back_rows(work, SITE_RESID_POST, l, dx, work->d_stride, error));
    RUN(mlp_back(work, l, error));
    RUN(back_rows(work, SITE_RESID_MID, l, dx, work->d_stride, error));
    RUN(attention_block_back(work, cache, l, error));
    RUN(run_hook_call(work, HOOK_D_RESID_PRE, l, dx, work->d_stride, error));
    return back_rows(work, SITE_RESID_PRE, l, dx, work->d_stride, error);
}

static int way_back(struct run_work *work, struct run_cache *cache, const struct run_backward *back,
                    struct error *error) {
    struct run_tape *tape = work->tape;
    uint64_t dx = address(tape->dx), dnorm = address(tape->dnorm);
    RUN(run_hook_call(work, HOOK_D_FINAL_NORMED, 0, dnorm, work->d_stride, error));
    RUN(norm_back(work, SITE_FINAL_SCALE, SITE_FINAL_NORMALIZED, 0, address(work->x),
                  work->model->ln_final, dnorm, 0, dx, error));
    RUN(run_hook_call(work, HOOK_D_FINAL_INPUT, 0, dx, work->d_stride, error));
    for (int l = (int)work->model->facts.n_layers - 1; l >= (int)back->stop_layer; l--)
        RUN(layer_back(work, cache, l, error));
    if (back->stop_layer == 0)
        RUN(back_rows(work, SITE_EMBED, 0, dx, work->d_stride, error));
    return 0;
}

int run_differentiate(struct run_work *work, struct run_tape *tape, struct run_cache *cache,
                      const struct run_batch *batch, const struct run_backward *back,
                      struct error *error) {
    struct run_batch backward = *batch;
    uint64_t total = 0;
    for (uint32_t r = 0; r < batch->n_rows; r++)
        total += batch->n_tokens[r];
    if (total > tape->capacity || back->stop_layer < tape->first_layer ||
        tape->first_layer < batch->first_layer)
        return error_set(error, ERROR_VALUE,
                         "the tape begins at layer %u and holds %u tokens: it does not fit a way "
                         "back of %llu tokens to layer %u",
                         tape->first_layer, tape->capacity, (unsigned long long)total,
                         back->stop_layer);
    work->tape = tape;
    int failed = run_whole(work, cache, batch, error);
    backward.n_captures = 0;
    work->chunk.batch = &backward;
    int values_only = back->stop_layer >= tape->n_layers && !back->n_captures && !work->hook;
    failed = failed || metric_gradient(work, tape, back->metric, values_only, error);
    backward.captures = back->captures; /* gradients go to their own arrays */
    backward.n_captures = back->n_captures;
    failed = failed || (!values_only && way_back(work, cache, back, error)) ||
             (work->n_pending ? work_readback_drain(work, error)
                              : gpu_queue_wait(work->model->ops.queue, error));
    run_whole_end(work, failed);
    work->tape = NULL;
    return failed ? -1 : 0;
}
