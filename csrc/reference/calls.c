/* The table of calls. A block starts with the op's argument block where it has one; what else the
 * op takes (rows, grid sizes) follows. */
#include <stddef.h>
#include <string.h>

#include "reference/calls.h"

#define ADDRESS_OF(block, path, name) {#name, FIELD_ADDRESS, offsetof(struct block, path name)}
#define UINT_OF(block, path, name) {#name, FIELD_UINT, offsetof(struct block, path name)}
#define FLOAT_OF(block, path, name) {#name, FIELD_FLOAT, offsetof(struct block, path name)}
#define A(name) ADDRESS_OF(BLOCK_NAME, params., name)
#define U(name) UINT_OF(BLOCK_NAME, params., name)
#define F(name) FLOAT_OF(BLOCK_NAME, params., name)
#define EXTRA(name) UINT_OF(BLOCK_NAME, , name) /* a number outside the argument block */

/* --- matrices --------------------------------------------------------------------------------- */

/* Panels at `weights`, cut into chunks of `chunk_rows` rows (a multiple of 32; 0: one chunk). */
struct matrix_block {
    uint64_t weights;
    uint32_t weight_type, n, k, chunk_rows;
};
struct linear_block {
    struct op_linear_args params;
    struct matrix_block matrix;
    uint32_t family_plus_1; /* 0: the device's own choice */
};
struct linear_pairs_block {
    struct op_linear_pairs_args params;
    struct matrix_block matrix;
    uint32_t family_plus_1;
};
struct linear_bwd_block {
    struct op_linear_bwd_args params;
    struct matrix_block matrix;
    uint32_t family_plus_1;
};
struct head_out_block {
    struct op_head_out_args params;
    struct matrix_block matrix;
    uint32_t family_plus_1;
};
struct row_norms_block {
    uint64_t dst;
    struct matrix_block matrix;
};
struct embed_block {
    uint64_t tokens, dst;
    uint32_t n_tokens, stride;
    float scale;
    struct matrix_block matrix;
};

static int matrix_make(const struct matrix_block *block, struct op_matrix *matrix,
                       struct error *error) {
    *matrix = (struct op_matrix){
        .type = block->weight_type,
        .n = block->n,
        .k = block->k,
        .k_cells = op_matrix_cells(block->weight_type, block->k),
    };
    uint32_t rows = block->chunk_rows ? block->chunk_rows
                                      : (block->n + OP_PANEL - 1) / OP_PANEL * OP_PANEL;
    if (block->weight_type > WEIGHT_F16 || block->n == 0 || block->k == 0 || rows % OP_PANEL ||
        (block->n - 1) / rows >= OP_MATRIX_CHUNKS)
        return error_set(error, ERROR_VALUE, "no matrix of %u x %u, type %u, in chunks of %u rows",
                         block->n, block->k, block->weight_type, rows);
    if (block->weights % 16)
        return error_set(error, ERROR_VALUE, "panels must begin at a multiple of 16 bytes");
    for (uint32_t first = 0; first < block->n; first += rows, matrix->n_chunks++) {
        matrix->chunks[matrix->n_chunks].address =
            block->weights + op_matrix_bytes(block->weight_type, first, block->k);
        matrix->chunks[matrix->n_chunks].first = first;
        matrix->chunks[matrix->n_chunks].count = block->n - first < rows ? block->n - first : rows;
    }
    return 0;
}

#define MATRIX \
    ADDRESS_OF(BLOCK_NAME, matrix., weights), UINT_OF(BLOCK_NAME, matrix., weight_type), \
        UINT_OF(BLOCK_NAME, matrix., n), UINT_OF(BLOCK_NAME, matrix., k), \
        UINT_OF(BLOCK_NAME, matrix., chunk_rows)

#define BLOCK_NAME linear_block
static const struct op_field linear_fields[] = {
    A(x),   A(dst),     A(bias),   A(add),  U(n_rows), U(x_stride), U(dst_stride),       U(first_k),
    U(n_k), F(softcap), U(decode), A(gain), F(eps),    MATRIX,      EXTRA(family_plus_1)};
#undef BLOCK_NAME
#define BLOCK_NAME linear_pairs_block
static const struct op_field linear_pairs_fields[] = {A(x),
                                                      A(gain),
                                                      A(dst),
                                                      A(bias),
                                                      A(angles),
                                                      A(tokens),
                                                      A(k_cache),
                                                      A(v_cache),
                                                      U(n_rows),
                                                      U(x_stride),
                                                      U(dst_stride),
                                                      U(kind),
                                                      U(act),
                                                      U(n_heads),
                                                      U(n_kv_heads),
                                                      U(d_head),
                                                      F(eps),
                                                      MATRIX,
                                                      EXTRA(family_plus_1)};
#undef BLOCK_NAME
#define BLOCK_NAME linear_bwd_block
static const struct op_field linear_bwd_fields[] = {
    A(dy),    A(dx),      U(n_rows), U(y_stride), U(x_stride), U(first_n),
    U(n_sum), U(first_k), U(n_k),    U(add),      MATRIX,      EXTRA(family_plus_1)};
#undef BLOCK_NAME
#define BLOCK_NAME embed_block
static const struct op_field embed_fields[] = {ADDRESS_OF(embed_block, , tokens),
                                               ADDRESS_OF(embed_block, , dst),
                                               EXTRA(n_tokens),
                                               EXTRA(stride),
                                               FLOAT_OF(embed_block, , scale),
                                               MATRIX};
#undef BLOCK_NAME

#define BLOCK_NAME head_out_block
static const struct op_field head_out_fields[] = {
    A(x),      A(dst),        A(gain), U(n_heads),          U(n_kv_heads),
    U(d_head), U(dst_stride), MATRIX,  EXTRA(family_plus_1)};
#undef BLOCK_NAME
#define BLOCK_NAME row_norms_block
static const struct op_field row_norms_fields[] = {ADDRESS_OF(row_norms_block, , dst), MATRIX};
#undef BLOCK_NAME

/* The family that a call asks for, until family_end. */
static int family_begin(struct ops *ops, uint32_t family_plus_1, struct error *error) {
    int before = ops->linear_family;
    if (family_plus_1 > LINEAR_FAMILIES)
        return error_set(error, ERROR_VALUE, "there is no family %u of matrix kernels",
                         family_plus_1 - 1);
    if (family_plus_1)
        ops->linear_family = (int)family_plus_1 - 1;
    return before;
}

static int family_end(struct ops *ops, int before, int failed) {
    ops->linear_family = before;
    return failed;
}

/* Products: of a matrix, by a family of kernels. */
#define OP(name) \
    static int name##_run(struct ops *ops, const void *block, struct error *error) { \
        const struct name##_block *b = block; \
        struct op_matrix matrix; \
        int before = family_begin(ops, b->family_plus_1, error); \
        if (before < 0) \
            return -1; \
        return family_end(ops, before, \
                          matrix_make(&b->matrix, &matrix, error) || \
                                  op_##name(ops, &matrix, &b->params, error) \
                              ? -1 \
                              : 0); \
    }
OP(linear)
OP(linear_pairs)
OP(linear_bwd)
OP(head_out)
#undef OP

/* rows: what comes in, which kernels may load in pairs. */
#define OP(name, rows, stride) \
    static void name##_reference(struct reference_memory *memory, const void *block) { \
        const struct name##_block *b = block; \
        struct op_matrix matrix; \
        if (matrix_make(&b->matrix, &matrix, &memory->error)) \
            memory->failed = -1; \
        else if (b->params.rows % 8 || b->params.stride % 2) \
            reference_fail(memory, "rows of " #rows " must begin at multiples of 8 bytes"); \
        else \
            reference_##name(memory, &matrix, &b->params); \
    }
OP(linear, x, x_stride)
OP(linear_pairs, x, x_stride)
OP(linear_bwd, dy, y_stride)
#undef OP

static int embed_run(struct ops *ops, const void *block, struct error *error) {
    const struct embed_block *b = block;
    struct op_matrix matrix;
    if (matrix_make(&b->matrix, &matrix, error))
        return -1;
    return op_embed(ops, &matrix, b->tokens, b->n_tokens, b->scale, b->dst, b->stride, error);
}

static void embed_reference(struct reference_memory *memory, const void *block) {
    const struct embed_block *b = block;
    struct op_matrix matrix;
    if (matrix_make(&b->matrix, &matrix, &memory->error))
        memory->failed = -1;
    else
        reference_embed(memory, &matrix, b->tokens, b->n_tokens, b->scale, b->dst, b->stride);
}

static void head_out_reference(struct reference_memory *memory, const void *block) {
    const struct head_out_block *b = block;
    struct op_matrix matrix;
    if (matrix_make(&b->matrix, &matrix, &memory->error))
        memory->failed = -1;
    else
        reference_head_out(memory, &matrix, &b->params);
}

static int row_norms_run(struct ops *ops, const void *block, struct error *error) {
    const struct row_norms_block *b = block;
    struct op_matrix matrix;
    return matrix_make(&b->matrix, &matrix, error) || op_row_norms(ops, &matrix, b->dst, error) ? -1
                                                                                                : 0;
}

static void row_norms_reference(struct reference_memory *memory, const void *block) {
    const struct row_norms_block *b = block;
    struct op_matrix matrix;
    if (matrix_make(&b->matrix, &matrix, &memory->error))
        memory->failed = -1;
    else
        reference_row_norms(memory, &matrix, b->dst);
}

/* --- ops that take their argument block and a few sizes --------------------------------------- */

struct norm_block {
    struct norm_params params;
    uint32_t n_rows;
};
struct rope_block {
    struct rope_params params;
    uint32_t n_tokens;
};
struct attn_scores_block {
    struct scores_params params;
    uint32_t n_tiles, n_keys;
};
struct attn_softmax_block {
    struct softmax_params params;
    uint32_t n_tokens, n_keys;
};
struct attn_output_block {
    struct attn_output_params params;
    uint32_t n_tiles, n_keys;
};
struct attn_decode_block {
    struct decode_params params;
    uint32_t n_tokens, n_keys;
};
struct act_block {
    struct act_params params;
    uint32_t n_tokens;
};
struct edit_block {
    struct edit_params params;
    uint32_t n_entries, n_edit_heads;
};
struct copy_block {
    struct copy_params params;
};
struct sum_heads_block {
    struct sum_heads_params params;
    uint32_t n_tokens;
};
struct topk_block {
    struct topk_params params;
};
struct norm_bwd_block {
    struct norm_bwd_params params;
    uint32_t n_rows;
};
struct rope_bwd_block {
    struct rope_bwd_params params;
    uint32_t n_tokens;
};
struct attn_softmax_bwd_block {
    struct softmax_bwd_params params;
    uint32_t n_tokens, n_keys;
};
struct attn_output_bwd_block {
    struct attn_output_bwd_params params;
    uint32_t n_tiles, n_keys;
};
struct act_bwd_block {
    struct act_bwd_params params;
    uint32_t n_tokens;
};
struct pair_grad_block {
    struct pair_grad_params params;
    uint32_t n_rows;
};
struct logit_grad_block {
    struct logit_grad_params params;
    uint32_t n_rows;
};
struct difference_block {
    struct difference_params params;
    uint32_t n_slots;
};
struct accumulate_block {
    struct accumulate_params params;
    uint32_t n_slots;
};
struct head_inputs_block {
    struct head_inputs_params params;
    uint32_t n_slots;
};
struct head_gradients_block {
    struct head_gradients_params params;
};
struct dots_block {
    struct dots_params params;
};
struct circuit_inputs_block {
    struct circuit_inputs_params params;
    uint32_t n_entries, n_refs;
};
struct circuit_place_block {
    struct circuit_place_params params;
    uint32_t n_entries;
};
struct circuit_heads_block {
    struct circuit_heads_params params;
    uint32_t n_entries;
};
struct circuit_outputs_block {
    struct circuit_outputs_params params;
    uint32_t n_rows;
};
struct pair_logits_block {
    struct pair_logits_params params;
    uint32_t n_entries;
};
struct logit_metrics_block {
    struct logit_metrics_params params;
    uint32_t n_rows;
};
struct node_dims_block {
    struct node_dims_params params;
    uint32_t n_nodes;
};

#define BLOCK_NAME norm_block
static const struct op_field norm_fields[] = {A(x),      A(gain),  A(dst),  A(normalized),
                                              A(scale),  A(add),   A(rows), U(width),
                                              U(stride), U(flags), F(eps),  EXTRA(n_rows)};
#undef BLOCK_NAME
#define BLOCK_NAME rope_block
static const struct op_field rope_fields[] = {
    A(qkv),     A(angles),     A(tokens), A(q_gain), A(k_gain), A(k_cache), A(v_cache),
    U(n_heads), U(n_kv_heads), U(d_head), U(stride), U(flags),  F(eps),     EXTRA(n_tokens)};
#undef BLOCK_NAME
#define BLOCK_NAME attn_scores_block
static const struct op_field attn_scores_fields[] = {
    A(qkv),         A(k_cache), A(tokens),     A(tiles),       A(scores),
    U(first_token), U(n_heads), U(n_kv_heads), U(d_head),      U(stride),
    U(key_stride),  F(scale),   F(softcap),    EXTRA(n_tiles), EXTRA(n_keys)};
#undef BLOCK_NAME
#define BLOCK_NAME attn_softmax_block
static const struct op_field attn_softmax_fields[] = {
    A(scores),     A(tokens), U(first_token),  U(n_heads),
    U(key_stride), U(window), EXTRA(n_tokens), EXTRA(n_keys)};
#undef BLOCK_NAME
#define BLOCK_NAME attn_output_block
static const struct op_field attn_output_fields[] = {
    A(pattern),     A(v_cache), A(tokens),      A(tiles),     A(z),
    U(first_token), U(n_heads), U(n_kv_heads),  U(d_head),    U(z_stride),
    U(key_stride),  U(window),  EXTRA(n_tiles), EXTRA(n_keys)};
#undef BLOCK_NAME
#define BLOCK_NAME attn_decode_block
static const struct op_field attn_decode_fields[] = {
    A(qkv),         A(k_cache), A(v_cache),    A(tokens),  A(scores),       A(z),
    U(first_token), U(n_heads), U(n_kv_heads), U(d_head),  U(stride),       U(z_stride),
    U(key_stride),  U(window),  F(scale),      F(softcap), EXTRA(n_tokens), EXTRA(n_keys)};
#undef BLOCK_NAME
#define BLOCK_NAME act_block
static const struct op_field act_fields[] = {A(gate_up),    A(dst), U(width),       U(in_stride),
                                             U(out_stride), U(act), EXTRA(n_tokens)};
#undef BLOCK_NAME
#define BLOCK_NAME edit_block
static const struct op_field edit_fields[] = {
    A(x),     A(entries),   A(operand),       A(heads),
    A(scale), A(tokens),    U(token_stride),  U(head_stride),
    U(width), U(head_step), U(step),          U(kind),
    U(flags), U(window),    EXTRA(n_entries), EXTRA(n_edit_heads)};
#undef BLOCK_NAME
#define BLOCK_NAME copy_block
static const struct op_field copy_fields[] = {
    A(x), A(dst), A(rows), A(add), U(n_rows), U(width), U(x_stride), U(out_stride), U(flags)};
#undef BLOCK_NAME
#define BLOCK_NAME sum_heads_block
static const struct op_field sum_heads_fields[] = {A(x),          A(dst),      A(bias),
                                                   U(n_heads),    U(width),    U(head_stride),
                                                   U(out_stride), U(has_bias), EXTRA(n_tokens)};
#undef BLOCK_NAME
#define BLOCK_NAME topk_block
static const struct op_field topk_fields[] = {A(x),      A(factor),    A(values),   A(indices),
                                              U(n_rows), U(n_columns), U(x_stride), U(first),
                                              U(k),      U(flags)};
#undef BLOCK_NAME
#define BLOCK_NAME norm_bwd_block
static const struct op_field norm_bwd_fields[] = {
    A(x),    A(gain),  A(dy),     A(dx),    A(add), A(dnormalized), A(dscale),
    A(rows), U(width), U(stride), U(flags), F(eps), EXTRA(n_rows)};
#undef BLOCK_NAME
#define BLOCK_NAME rope_bwd_block
static const struct op_field rope_bwd_fields[] = {
    A(dqkv),       A(qkv),    A(angles), A(tokens), A(q_gain), A(k_gain),      U(n_heads),
    U(n_kv_heads), U(d_head), U(stride), U(flags),  F(eps),    EXTRA(n_tokens)};
#undef BLOCK_NAME
#define BLOCK_NAME attn_softmax_bwd_block
static const struct op_field attn_softmax_bwd_fields[] = {
    A(pattern),    A(dpattern), A(scores), A(tokens),  U(first_token),  U(n_heads),
    U(key_stride), U(window),   F(scale),  F(softcap), EXTRA(n_tokens), EXTRA(n_keys)};
#undef BLOCK_NAME
#define BLOCK_NAME attn_output_bwd_block
static const struct op_field attn_output_bwd_fields[] = {
    A(a),          A(y),       A(tokens),     A(tiles),       A(sums),      U(first_token),
    U(last_token), U(n_heads), U(n_kv_heads), U(d_head),      U(y_stride),  U(out_stride),
    U(key_stride), U(window),  U(add),        EXTRA(n_tiles), EXTRA(n_keys)};
#undef BLOCK_NAME
#define BLOCK_NAME act_bwd_block
static const struct op_field act_bwd_fields[] = {A(gate_up), A(dpost),       A(dgate_up),
                                                 U(width),   U(in_stride),   U(out_stride),
                                                 U(act),     EXTRA(n_tokens)};
#undef BLOCK_NAME
#define BLOCK_NAME pair_grad_block
static const struct op_field pair_grad_fields[] = {A(normed),  A(rows),    A(weights),
                                                   A(dnormed), A(logits),  U(width),
                                                   U(stride),  F(softcap), EXTRA(n_rows)};
#undef BLOCK_NAME
#define BLOCK_NAME logit_grad_block
static const struct op_field logit_grad_fields[] = {
    A(logits), A(reference), A(other), A(targets), A(weights),           A(values),
    U(width),  U(stride),    U(kind),  F(softcap), F(reference_softcap), EXTRA(n_rows)};
#undef BLOCK_NAME
#define BLOCK_NAME difference_block
static const struct op_field difference_fields[] = {
    A(x),      A(raw),       A(pairs),      A(dst), U(width),
    U(stride), U(raw_width), U(raw_stride), F(eps), EXTRA(n_slots)};
#undef BLOCK_NAME
#define BLOCK_NAME accumulate_block
static const struct op_field accumulate_fields[] = {
    A(src), A(sources), A(dst), U(width), U(stride), U(n_sources), F(weight), EXTRA(n_slots)};
#undef BLOCK_NAME
#define BLOCK_NAME head_inputs_block
static const struct op_field head_inputs_fields[] = {
    A(dqkv),       A(qkv),      A(bias),   A(x),        A(sources), A(heads),    A(steps),
    A(xs),         U(n_inputs), U(d_head), U(stride),   U(width),   U(d_stride), U(n_sources),
    U(first_step), U(n_steps),  U(flags),  U(has_bias), F(eps),     F(weight),   EXTRA(n_slots)};
#undef BLOCK_NAME
#define BLOCK_NAME head_gradients_block
static const struct op_field head_gradients_fields[] = {
    A(g), A(gain), A(steps), A(xs), U(n_inputs), U(n_slots), U(n_steps), U(width), U(d_stride)};
#undef BLOCK_NAME
#define BLOCK_NAME dots_block
static const struct op_field dots_fields[] = {A(a), A(b), A(dst), U(n_a), U(n_b), U(n_k)};
#undef BLOCK_NAME
#define BLOCK_NAME node_dims_block
static const struct op_field node_dims_fields[] = {
    A(du), A(g), A(groups), A(dims), U(n_slots), U(width), U(d_stride), EXTRA(n_nodes)};
#undef BLOCK_NAME
#define BLOCK_NAME circuit_inputs_block
static const struct op_field circuit_inputs_fields[] = {
    A(x),     A(d),      A(refs),       A(first),         A(tokens),
    A(gain),  A(dst),    U(all_tokens), U(n_tokens),      U(n_chunk),
    U(width), U(stride), F(eps),        EXTRA(n_entries), EXTRA(n_refs)};
#undef BLOCK_NAME
#define BLOCK_NAME circuit_place_block
static const struct op_field circuit_place_fields[] = {
    A(x),        A(base),    A(entries), A(tokens),   A(angles),       A(q_gain),   A(k_gain),
    A(q),        A(k_cache), A(v_cache), U(n_tokens), U(d_head),       U(x_stride), U(base_stride),
    U(q_stride), U(n_slots), U(flags),   F(eps),      EXTRA(n_entries)};
#undef BLOCK_NAME
#define BLOCK_NAME circuit_heads_block
static const struct op_field circuit_heads_fields[] = {
    A(z),          A(base),     A(entries),      A(scale),    A(base_scale),
    A(dst),        U(n_tokens), U(d_head),       U(z_stride), U(base_stride),
    U(out_stride), U(flags),    EXTRA(n_entries)};
#undef BLOCK_NAME
#define BLOCK_NAME circuit_outputs_block
static const struct op_field circuit_outputs_fields[] = {
    A(x),     A(base),   A(gain),  A(dst), U(first),     U(n_tokens),
    U(width), U(stride), U(flags), F(eps), EXTRA(n_rows)};
#undef BLOCK_NAME
#define BLOCK_NAME pair_logits_block
static const struct op_field pair_logits_fields[] = {
    A(normed), A(rows), A(logits), U(n), U(width), U(stride), F(softcap), EXTRA(n_entries)};
#undef BLOCK_NAME
#define BLOCK_NAME logit_metrics_block
static const struct op_field logit_metrics_fields[] = {
    A(logits), A(reference), A(other),  A(targets), A(values),    U(first),
    U(n),      U(width),     U(stride), F(softcap), EXTRA(n_rows)};
#undef BLOCK_NAME

/* name, arguments of the op after its block, arguments of the reference after its block */
#define OPS_WITH_BLOCKS(OP) \
    OP(norm, COMMA b->n_rows, COMMA b->n_rows) \
    OP(rope, COMMA b->n_tokens, COMMA b->n_tokens) \
    OP(attn_scores, COMMA b->n_tiles COMMA b->n_keys, COMMA b->n_tiles) \
    OP(attn_softmax, COMMA b->n_tokens COMMA b->n_keys, COMMA b->n_tokens) \
    OP(attn_output, COMMA b->n_tiles COMMA b->n_keys, COMMA b->n_tiles) \
    OP(attn_decode, COMMA b->n_tokens COMMA b->n_keys, COMMA b->n_tokens) \
    OP(act, COMMA b->n_tokens, COMMA b->n_tokens) \
    OP(edit, COMMA b->n_entries COMMA b->n_edit_heads, COMMA b->n_entries COMMA b->n_edit_heads) \
    OP(copy, , ) \
    OP(sum_heads, COMMA b->n_tokens, COMMA b->n_tokens) \
    OP(topk, , ) \
    OP(norm_bwd, COMMA b->n_rows, COMMA b->n_rows) \
    OP(rope_bwd, COMMA b->n_tokens, COMMA b->n_tokens) \
    OP(attn_softmax_bwd, COMMA b->n_tokens COMMA b->n_keys, COMMA b->n_tokens) \
    OP(attn_output_bwd, COMMA b->n_tiles COMMA b->n_keys, COMMA b->n_tiles) \
    OP(act_bwd, COMMA b->n_tokens, COMMA b->n_tokens) \
    OP(pair_grad, COMMA b->n_rows, COMMA b->n_rows) \
    OP(logit_grad, COMMA b->n_rows, COMMA b->n_rows) \
    OP(difference, COMMA b->n_slots, COMMA b->n_slots) \
    OP(accumulate, COMMA b->n_slots, COMMA b->n_slots) \
    OP(head_inputs, COMMA b->n_slots, COMMA b->n_slots) \
    OP(head_gradients, , ) \
    OP(dots, , ) \
    OP(circuit_inputs, COMMA b->n_entries COMMA b->n_refs, COMMA b->n_entries) \
    OP(circuit_place, COMMA b->n_entries, COMMA b->n_entries) \
    OP(circuit_heads, COMMA b->n_entries, COMMA b->n_entries) \
    OP(circuit_outputs, COMMA b->n_rows, COMMA b->n_rows) \
    OP(pair_logits, COMMA b->n_entries, COMMA b->n_entries) \
    OP(logit_metrics, COMMA b->n_rows, COMMA b->n_rows) \
    OP(node_dims, COMMA b->n_nodes, COMMA b->n_nodes)
#define COMMA ,

#define OP(name, run_arguments, reference_arguments) \
    static int name##_run(struct ops *ops, const void *block, struct error *error) { \
        const struct name##_block *b = block; \
        return op_##name(ops, &b->params run_arguments, error); \
    } \
    static void name##_reference(struct reference_memory *memory, const void *block) { \
        const struct name##_block *b = block; \
        reference_##name(memory, &b->params reference_arguments); \
    }
OPS_WITH_BLOCKS(OP)
#undef OP

#define ROW(name, params_bytes) \
    {#name, \
     sizeof(struct name##_block), \
     params_bytes, \
     name##_fields, \
     sizeof name##_fields / sizeof name##_fields[0], \
     name##_run, \
     name##_reference}
#define OP(name, run_arguments, reference_arguments) \
    ROW(name, sizeof(((struct name##_block *)0)->params)),
const struct op_call op_calls[] = {ROW(embed, 0),      ROW(linear, 0),   ROW(linear_pairs, 0),
                                   ROW(linear_bwd, 0), ROW(head_out, 0), ROW(row_norms, 0),
                                   OPS_WITH_BLOCKS(OP)};
#undef OP
const int op_calls_count = sizeof op_calls / sizeof op_calls[0];

const struct op_call *op_call_find(const char *name) {
    for (int i = 0; i < op_calls_count; i++)
        if (strcmp(op_calls[i].name, name) == 0)
            return &op_calls[i];
    return NULL;
}
