/* What a layer's attention reads under circuits: queries, keys and values of entries instead of
 * rows. */
#include "analysis/circuit.h"

/* LayerNorm of the queries or keys of input i, in place at x: n rows of run->product_stride. */
static int head_norm(struct circuit_run *run, const struct model_layer *weights, uint32_t i,
                     uint64_t x, uint64_t n, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    uint32_t H = f->n_heads, is_key = i >= H;
    uint64_t first = 4 * (uint64_t)(is_key ? i - H : i) * f->d_head;
    struct norm_params params = {
        .x = x,
        .gain = (is_key ? weights->k_norm : weights->q_norm) + first,
        .dst = x,
        .width = f->d_head,
        .stride = run->product_stride,
        .flags = NORM_LAYER | (f->qk_norm_bias ? NORM_BIAS : 0),
        .eps = f->norm_eps,
    };
    if (f->qk_norm_bias)
        params.bias = (is_key ? weights->b_k_norm : weights->b_q_norm) + first;
    return circuit_norm_rows(run, &params, n, error);
}

/* run->product of inputs [from, to): their rows of run->normed times their rows of W_QKV. */
static int products(struct circuit_run *run, const struct model_layer *weights,
                    const struct circuit_layer *layer, uint32_t from, uint32_t to,
                    struct error *error) {
    const struct model_facts *f = &run->model->facts;
    uint32_t T = run->work->chunk.n_tokens, start = layer->input_first[from];
    for (uint32_t i = from; i < to; i++) {
        uint32_t n = layer->input_first[i + 1] - layer->input_first[i], row = i * f->d_head;
        if (n == 0)
            continue;
        /* the panels that hold the head's rows */
        uint32_t first = row / OP_PANEL * OP_PANEL,
                 end = (row + f->d_head + OP_PANEL - 1) / OP_PANEL * OP_PANEL;
        end = end < weights->qkv.n ? end : weights->qkv.n;
        struct op_matrix part;
        struct op_linear_args args = {
            .x = run_address(run->normed) +
                 4 * (uint64_t)(layer->input_first[i] - start) * T * run->work->d_stride,
            .dst = run_address(run->product) +
                   4 * (uint64_t)layer->input_first[i] * T * run->product_stride,
            .bias = weights->b_qkv ? weights->b_qkv + 4 * (uint64_t)first : 0,
            .n_rows = n * T,
            .x_stride = run->work->d_stride,
            .dst_stride = run->product_stride,
            .clip = f->clip_qkv,
            .decode = run->work->chunk.batch->decode,
        };
        RUN(op_matrix_rows(&weights->qkv, first, end - first, &part, error));
        RUN(op_linear(&run->model->ops, &part, &args, error));
        if (f->qk_norm == QK_NORM_LAYER && i < f->n_heads + f->n_kv_heads)
            RUN(head_norm(run, weights, i, args.dst + 4 * (uint64_t)(row - first), (uint64_t)n * T,
                          error));
    }
    return 0;
}

/* --- norms over all heads --------------------------------------------------------------------- */

/* Strides of the base run's queries and keys. */
static uint32_t base_stride(const struct model_facts *f) {
    return op_row_stride((f->n_heads + f->n_kv_heads) * f->d_head);
}

int circuit_base_rows(struct circuit_run *run, int l, uint64_t qkv, uint32_t stride,
                      struct error *error) {
    const struct model_facts *f = &run->model->facts;
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    struct copy_params copy = {
        .x = qkv,
        .dst = run_address(run->base_qk),
        .n_rows = run->work->chunk.n_tokens,
        .width = (f->n_heads + f->n_kv_heads) * f->d_head,
        .x_stride = stride,
        .out_stride = base_stride(f),
    };
    if (layer->q_rows.n + layer->k_rows.n == 0)
        return 0;
    return op_copy(&run->model->ops, &copy, error);
}

/* dst [rows, T, stride]: the queries or keys of all heads, which a row names one by one, after the
 * norm of all of them together. base: the base run's, before that norm. */
static int rows_normed(struct circuit_run *run, const struct circuit_rows *rows, uint64_t base,
                       uint64_t gain, uint64_t dst, uint32_t stride, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    uint32_t T = run->work->chunk.n_tokens;
    struct circuit_heads_params gather = {
        .z = run_address(run->product),
        .base = base,
        .entries = run_address(run->tables) + 4 * (uint64_t)rows->table,
        .dst = dst,
        .n_tokens = T,
        .d_head = f->d_head,
        .z_stride = run->product_stride,
        .base_stride = base_stride(f),
        .out_stride = stride,
        .flags = HEADS_COLUMN | HEADS_OFFSET,
    };
    struct norm_params norm = {
        .x = dst,
        .gain = gain,
        .dst = dst,
        .width = rows->n_heads * f->d_head,
        .stride = stride,
        .eps = f->norm_eps,
    };
    if (rows->n == 0)
        return 0;
    RUN(op_circuit_heads(&run->model->ops, &gather, rows->n * rows->n_heads, error));
    return circuit_norm_rows(run, &norm, (uint64_t)rows->n * T, error);
}

/* --- where the attention kernels read them ---------------------------------------------------- */

/* Places n entries of the layer's table from entry `first` on. x: products or rows. */
static int place(struct circuit_run *run, int l, uint64_t x, uint32_t x_stride, uint32_t first,
                 uint32_t n, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    const struct model_layer *weights = &run->model->layers[l];
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    struct run_work *work = run->work;
    struct circuit_place_params params = {
        .x = x,
        .base = work->at_qkv,
        .entries = run_address(run->tables) + 4 * ((uint64_t)layer->place_table + 4 * first),
        .tokens = work->chunk.tokens,
        .angles = model_angles(run->model, (uint32_t)l, 0),
        .q_angles = model_angles(run->model, (uint32_t)l, 1),
        .q_gain = weights->q_norm,
        .k_gain = weights->k_norm,
        .q = run_address(run->q),
        .k_cache = run_address(layer->k),
        .v_cache = run_address(layer->v),
        .n_tokens = work->chunk.n_tokens,
        .d_head = f->d_head,
        .d_rot = f->rope_table[l] == MODEL_NO_ROPE ? 0 : f->d_rot,
        .x_stride = x_stride,
        .base_stride = work->qkv_stride,
        .q_stride = run->z_stride,
        .n_slots = run->n_slots,
        .flags = (f->qk_norm == QK_NORM_HEAD ? PLACE_QK_NORM : 0) |
                 (f->rope_interleaved ? PLACE_INTERLEAVED : 0),
        .eps = f->norm_eps,
    };
    return n ? op_circuit_place(&run->model->ops, &params, n, error) : 0;
}

/* The norm over all heads, and where it leaves queries and keys. */
static int place_rows(struct circuit_run *run, int l, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    const struct model_layer *weights = &run->model->layers[l];
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    uint64_t base = run_address(run->base_qk), q = run_address(run->q_rows),
             k = run_address(run->k_rows);
    const uint32_t *n = layer->n_places;
    RUN(rows_normed(run, &layer->q_rows, base, weights->q_norm, q, run->q_row_stride, error));
    RUN(rows_normed(run, &layer->k_rows, base + 4 * (uint64_t)f->n_heads * f->d_head,
                    weights->k_norm, k, run->k_row_stride, error));
    RUN(place(run, l, q, run->q_row_stride, 0, n[PLACE_Q], error));
    RUN(place(run, l, k, run->k_row_stride, n[PLACE_Q], n[PLACE_K], error));
    return place(run, l, run_address(run->product), run->product_stride, n[PLACE_Q] + n[PLACE_K],
                 n[PLACE_V], error);
}

int circuit_attention_inputs(struct circuit_run *run, int l, struct error *error) {
    const struct model_layer *weights = &run->model->layers[l];
    const struct circuit_layer *layer = circuit_layer_of(run, l);
    const uint32_t *n = layer->n_places;
    struct circuit_norm norm = circuit_norm_before(run, weights->ln1, weights->b_ln1);
    for (uint32_t from = 0, to; from < run->n_inputs; from = to) {
        uint32_t start = layer->input_first[from];
        for (to = from + 1;
             to < run->n_inputs && layer->input_first[to + 1] - start <= run->assembled; to++)
            ;
        if (layer->input_first[to] == start)
            continue;
        RUN(circuit_assemble(run, layer->entry + start, layer->input_first[to] - start, norm, 0,
                             run->work->chunk.n_tokens, error));
        RUN(products(run, weights, layer, from, to, error));
    }
    if (run->model->facts.qk_norm == QK_NORM_WIDE)
        return place_rows(run, l, error);
    return place(run, l, run_address(run->product), run->product_stride, 0,
                 n[PLACE_Q] + n[PLACE_K] + n[PLACE_V], error);
}
