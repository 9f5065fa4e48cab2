/* One layer under circuits: the equations of the model, for entries and states instead of rows. */
#include "analysis/circuit.h"

#include <stdlib.h>
#include <string.h>

/* --- attention outputs ------------------------------------------------------------------------ */

/* Tokens and tiles for the attention kernels, to which every state is a row of a model with one
 * head. */
struct lists {
    uint64_t tokens, tiles;
    struct query_tile *tile;
    uint32_t n_tiles;
};

static int lists_upload(struct circuit_run *run, const struct circuit_layer *layer,
                        struct lists *lists, struct error *error) {
    const struct chunk *chunk = &run->work->chunk;
    uint32_t T = chunk->n_tokens;
    uint64_t n = (uint64_t)layer->n_states * T;
    struct token_meta *meta = malloc(n * sizeof *meta);
    lists->n_tiles = layer->n_states * chunk->n_tiles;
    lists->tile = malloc(lists->n_tiles * sizeof *lists->tile);
    int failed = meta && lists->tile
                     ? 0
                     : error_set(error, ERROR_MEMORY, "out of memory for token lists");
    for (uint32_t s = 0; s < layer->n_states && !failed; s++) {
        const uint32_t *state = layer->states + 3 * (size_t)s;
        for (uint32_t t = 0; t < T; t++) {
            const struct token_place *place = &chunk->places[t];
            uint32_t slot = chunk->batch->slot[place->row];
            meta[(size_t)s * T + t] = (struct token_meta){
                .pos = place->pos,
                .slot = slot + place->pos,
                .q_token = state[0] * T + t,
                .k_slot = state[1] * run->n_slots + slot,
                .v_slot = state[2] * run->n_slots + slot,
                .row = place->row,
            };
        }
        for (uint32_t i = 0; i < chunk->n_tiles; i++)
            lists->tile[(size_t)s * chunk->n_tiles + i] =
                (struct query_tile){s * T + chunk->tile_list[i].first, chunk->tile_list[i].count};
    }
    failed = failed || work_upload(run->work, meta, n * sizeof *meta, &lists->tokens, error) ||
             work_upload(run->work, lists->tile, lists->n_tiles * sizeof *lists->tile,
                         &lists->tiles, error);
    free(meta);
    return failed ? -1 : 0;
}

/* Arguments of attention over the states, each of which is one query head. */
static struct decode_params attention_args(struct circuit_run *run, int l,
                                           const struct lists *lists,
                                           const struct query_span *span) {
    const struct model_facts *f = &run->model->facts;
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    return (struct decode_params){
        .qkv = run_address(run->q),
        .k_cache = run_address(layer->k),
        .v_cache = run_address(layer->v),
        .tokens = lists->tokens,
        .scores = run_address(run->scores),
        .z = run_address(run->z),
        .first_token = span->first,
        .n_heads = 1,
        .n_kv_heads = 1,
        .d_head = f->d_head,
        .stride = run->z_stride,
        .z_stride = run->z_stride,
        .key_stride = span->key_stride,
        .window = f->window[l],
        .scale = f->attn_scale,
        .softcap = f->attn_softcap,
    };
}

/* Attention outputs of the span's queries, where every tile is a single token. */
static int attend_tokens(struct circuit_run *run, int l, const struct lists *lists,
                         const struct query_span *span, struct error *error) {
    struct decode_params args = attention_args(run, l, lists, span);
    return op_attn_decode(&run->model->ops, &args, span->n, run->work->chunk.max_keys, error);
}

/* Attention outputs of the span's queries. */
static int attend_tiles(struct circuit_run *run, int l, const struct lists *lists,
                        const struct query_span *span, struct error *error) {
    struct ops *ops = &run->model->ops;
    uint32_t n_tiles = span->end - span->tile, n_keys = run->work->chunk.max_keys;
    uint64_t tiles = lists->tiles + span->tile * sizeof(struct query_tile);
    struct decode_params args = attention_args(run, l, lists, span);
    struct scores_params scores = op_attn_scores_params(&args, tiles);
    struct softmax_params softmax = op_attn_softmax_params(&args);
    struct attn_output_params output = op_attn_output_params(&args, tiles);
    RUN(op_attn_scores(ops, &scores, n_tiles, n_keys, error));
    RUN(op_attn_softmax(ops, &softmax, span->n, n_keys, error));
    return op_attn_output(ops, &output, n_tiles, n_keys, error);
}

/* run->z: attention outputs of all states. */
static int attention_outputs(struct circuit_run *run, int l, struct error *error) {
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    struct query_span span = {.key_stride = op_row_stride(run->work->chunk.max_keys)};
    uint64_t query_bytes = 4 * (uint64_t)span.key_stride,
             room = gpu_buffer_size(run->scores) / query_bytes;
    uint32_t most = room < OP_TILE               ? OP_TILE
                    : room > CIRCUIT_ROWS_A_GRID ? CIRCUIT_ROWS_A_GRID
                                                 : (uint32_t)room;
    struct lists lists = {0};
    int units = op_attn_matrix_offered(&run->model->ops, run->model->facts.d_head,
                                       run->work->chunk.batch->decode != 0);
    RUN(work_grow(run->work, &run->scores, most * query_bytes, "circuits' scores", error));
    int failed = lists_upload(run, layer, &lists, error);
    while (!failed && query_span_next(lists.tile, lists.n_tiles, most, &span))
        failed = run->work->chunk.n_tiles == run->work->chunk.n_tokens && !units
                     ? attend_tokens(run, l, &lists, &span, error)
                     : attend_tiles(run, l, &lists, &span, error);
    free(lists.tile);
    return failed;
}

/* --- differences of heads --------------------------------------------------------------------- */

/* The post-norm of attention (of `flags`) on n rows. */
static int post_norm(struct circuit_run *run, int l, uint64_t x, uint64_t dst, uint64_t scale,
                     uint32_t flags, uint64_t n, struct error *error) {
    struct norm_params params = {
        .x = x,
        .gain = run->model->layers[l].ln1_post,
        .dst = dst,
        .scale = scale,
        .width = run->model->facts.d_model,
        .stride = run->work->d_stride,
        .flags = flags,
        .eps = run->model->facts.norm_eps,
    };
    return circuit_norm_rows(run, &params, n, error);
}

/* run->scale: the post-norm's statistic of the attention output of every variant, then of the base
 * run. */
static int scales(struct circuit_run *run, int l, uint64_t base_z, uint64_t base_raw,
                  struct error *error) {
    const struct model_layer *weights = &run->model->layers[l];
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    struct run_work *work = run->work;
    uint32_t T = work->chunk.n_tokens, n = layer->n_variants * T;
    struct circuit_heads_params gather = {
        .z = run_address(run->z),
        .base = base_z,
        .entries = run_address(run->tables) + 4 * (uint64_t)layer->gather_table,
        .dst = run_address(run->gathered),
        .n_tokens = T,
        .d_head = run->model->facts.d_head,
        .z_stride = run->z_stride,
        .base_stride = work->z_stride,
        .out_stride = work->z_stride,
        .flags = HEADS_COLUMN,
    };
    struct op_linear_args args = {
        .x = gather.dst,
        .dst = run_address(run->raw),
        .bias = weights->b_o,
        .n_rows = n,
        .x_stride = work->z_stride,
        .dst_stride = work->d_stride,
        .decode = work->chunk.batch->decode,
    };
    RUN(op_circuit_heads(&run->model->ops, &gather, layer->n_variants * run->model->facts.n_heads,
                         error));
    RUN(op_linear(&run->model->ops, &weights->o, &args, error));
    RUN(post_norm(run, l, args.dst, 0, run_address(run->scale), NORM_WRITE_SCALE | NORM_NO_OUT, n,
                  error));
    return post_norm(run, l, base_raw, 0, run_address(run->scale) + 4 * (uint64_t)n,
                     NORM_WRITE_SCALE | NORM_NO_OUT, T, error);
}

/* Differences of the heads' outputs: W_O^h times the difference of attention outputs. With a
 * post-norm, each attention output is divided by its own run's statistic first, and the gain comes
 * last. */
static int heads_out(struct circuit_run *run, int l, uint64_t base_z, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    const struct model_layer *weights = &run->model->layers[l];
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    struct run_work *work = run->work;
    /* Kernels take slices of W_O's columns in multiples of 16. With other head sizes a row is as
     * wide as all heads, with zeros for the others. */
    uint32_t T = work->chunk.n_tokens, wide = f->d_head % 16 != 0;
    uint64_t scale = run_address(run->scale),
             differences = circuit_difference(run, layer->difference);
    struct circuit_heads_params params = {
        .z = run_address(run->z),
        .base = base_z,
        .entries = run_address(run->tables) + 4 * (uint64_t)layer->output_table,
        .scale = scale,
        .base_scale = scale + 4 * (uint64_t)layer->n_variants * T,
        .dst = run_address(run->heads),
        .n_tokens = T,
        .d_head = f->d_head,
        .z_stride = run->z_stride,
        .base_stride = work->z_stride,
        .out_stride = run->heads_stride,
        .flags = HEADS_DIFFERENCE | (f->post_norms ? HEADS_SCALED : 0) |
                 (wide ? HEADS_COLUMN | HEADS_ZERO : 0),
    };
    RUN(op_circuit_heads(&run->model->ops, &params, layer->n_outputs, error));
    for (uint32_t h = 0; h < f->n_heads; h++) {
        uint64_t row = (uint64_t)layer->output_first[h] * T;
        struct op_linear_args args = {
            .x = params.dst + 4 * row * run->heads_stride,
            .dst = differences + 4 * row * work->d_stride,
            .n_rows = (layer->output_first[h + 1] - layer->output_first[h]) * T,
            .x_stride = run->heads_stride,
            .dst_stride = work->d_stride,
            .first_k = wide ? 0 : h * f->d_head,
            .n_k = wide ? 0 : f->d_head,
            .decode = work->chunk.batch->decode,
        };
        if (args.n_rows)
            RUN(op_linear(&run->model->ops, &weights->o, &args, error));
    }
    if (!f->post_norms)
        return 0;
    return post_norm(run, l, differences, differences, 0, NORM_READ_NORMALIZED,
                     (uint64_t)layer->n_outputs * T, error);
}

int circuit_attention(struct circuit_run *run, int l, uint64_t base_z, uint64_t base_raw,
                      struct error *error) {
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    RUN(circuit_attention_inputs(run, l, error));
    if (layer->n_states)
        RUN(attention_outputs(run, l, error));
    if (layer->n_variants)
        RUN(scales(run, l, base_z, base_raw, error));
    if (layer->n_outputs)
        RUN(heads_out(run, l, base_z, error));
    return circuit_masks(run, 1 + 2 * ((uint32_t)l - run->first_layer), error);
}

/* --- differences of MLPs ---------------------------------------------------------------------- */

int circuit_mlp(struct circuit_run *run, int l, uint64_t base_out, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    const struct model_layer *weights = &run->model->layers[l];
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    struct run_work *work = run->work;
    struct ops *ops = &run->model->ops;
    uint32_t T = work->chunk.n_tokens, decode = work->chunk.batch->decode != 0;
    uint64_t rows = (uint64_t)layer->n_mlp * T, row_bytes = 4 * (uint64_t)work->d_stride,
             differences = circuit_difference(run, layer->difference + layer->n_outputs);
    if (layer->n_mlp)
        RUN(circuit_assemble(run, layer->mlp_entry, layer->n_mlp,
                             circuit_norm_before(run, weights->ln2, weights->b_ln2), 0, T, error));
    for (uint64_t row = 0; row < rows; row += run->mlp_rows) {
        uint32_t n = rows - row < run->mlp_rows ? (uint32_t)(rows - row) : run->mlp_rows;
        struct op_linear_args up = {
            .x = run_address(run->normed) + row * row_bytes,
            .dst = run_address(run->gate_up),
            .bias = weights->b_gate_up,
            .n_rows = n,
            .x_stride = work->d_stride,
            .dst_stride = work->gate_up_stride,
            .decode = decode,
        };
        struct act_params act = {
            .gate_up = up.dst,
            .dst = run_address(run->post),
            .width = f->d_mlp,
            .in_stride = work->gate_up_stride,
            .out_stride = work->mlp_stride,
            .act = f->act,
            .plain = !f->gated,
        };
        struct op_linear_args down = {
            .x = act.dst,
            .dst = differences + row * row_bytes,
            .bias = weights->b_down,
            .n_rows = n,
            .x_stride = work->mlp_stride,
            .dst_stride = work->d_stride,
            .decode = decode,
        };
        struct circuit_outputs_params out = {
            .x = down.dst,
            .base = base_out,
            .gain = weights->ln2_post,
            .dst = down.dst,
            .first = (uint32_t)(row % T),
            .n_tokens = T,
            .width = f->d_model,
            .stride = work->d_stride,
            .flags = f->post_norms ? OUTPUTS_NORM : 0,
            .eps = f->norm_eps,
        };
        RUN(op_linear(ops, &weights->gate_up, &up, error));
        RUN(op_act(ops, &act, n, error));
        RUN(op_linear(ops, &weights->down, &down, error));
        RUN(op_circuit_outputs(ops, &out, n, error));
    }
    return circuit_masks(run, 2 + 2 * ((uint32_t)l - run->first_layer), error);
}
