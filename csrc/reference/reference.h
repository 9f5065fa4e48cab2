/* Float64 CPU twins: every op once more as plain loops, for the tests, `vksteer verify` and
 * whoever doubts a driver.
 *
 * A twin takes the op's own argument block and means by every field what the op means by it. Its
 * addresses point into a small memory of the host's, in which a float is a double, so that a twin
 * rounds nothing that matters. Every access is checked: a twin that runs without failing has shown
 * that the op's argument block stays inside its buffers, which is why tests run it before the
 * device sees the same block. */
#ifndef VKSTEER_TWINS_H
#define VKSTEER_TWINS_H

#include "ops/ops.h"

#define TWIN_BUFFERS 16
/* address = (buffer + 1) << TWIN_SHIFT | byte offset on the device, 4 for every item; 0: absent */
#define TWIN_SHIFT 40

struct twin_buffer {
    const char *name;
    double *floats;        /* [n], or NULL where the buffer holds words */
    const uint32_t *words; /* [n], or NULL; no op writes words */
    uint64_t n;
};

struct twin_memory {
    struct twin_buffer buffers[TWIN_BUFFERS]; /* borrowed */
    uint32_t n_buffers;
    /* an access left its buffer, or an argument made no sense: `error` says which;
     * results are then worthless */
    int failed;
    struct error error;
    double no_float; /* what a refused access gets to read or write */
};

static inline uint64_t twin_address(uint32_t buffer, uint64_t item) {
    return ((uint64_t)(buffer + 1) << TWIN_SHIFT) + 4 * item;
}

/* Item `index` after `address`: where a float lies (never NULL), what a word is. */
double *twin_float(struct twin_memory *memory, uint64_t address, uint64_t index);
uint32_t twin_word(struct twin_memory *memory, uint64_t address, uint64_t index);
struct token_meta twin_token(struct twin_memory *memory, uint64_t tokens, uint64_t index);
/* Sizes that a kernel divides by or takes for granted; nonzero: senseless. */
int twin_heads_check(struct twin_memory *memory, uint32_t n_heads, uint32_t n_kv_heads);
double twin_activate(uint32_t act, double x); /* act: one of ACT_* */
/* A tile is 1 to 8 tokens of one row with positions that count up, and every key of its last one
 * fits a row of scores. */
struct query_tile twin_tile(struct twin_memory *memory, uint64_t tokens, uint64_t tiles,
                            uint32_t index, uint32_t first_token, uint32_t key_stride);
/* Keys [start, pos] are what a query sees. */
static inline uint32_t twin_window_start(uint32_t pos, uint32_t window) {
    return window && pos + 1 > window ? pos + 1 - window : 0;
}
/* The first failure stays. */
#define twin_fail(memory, ...) \
    do { \
        if (!(memory)->failed) \
            (memory)->failed = error_set(&(memory)->error, ERROR_VALUE, __VA_ARGS__); \
    } while (0)

/* W[n, k], 0 beyond the matrix. */
double twin_weight(struct twin_memory *memory, const struct op_matrix *matrix, uint32_t n,
                   uint32_t k);

/* linear.c: matrices lie in panels of words, as on the device. */
void twin_linear(struct twin_memory *memory, const struct op_matrix *matrix,
                 const struct op_linear_args *args);
void twin_linear_pairs(struct twin_memory *memory, const struct op_matrix *matrix,
                       const struct op_linear_pairs_args *args);
void twin_linear_bwd(struct twin_memory *memory, const struct op_matrix *matrix,
                     const struct op_linear_bwd_args *args);
void twin_embed(struct twin_memory *memory, const struct op_matrix *embedding, uint64_t tokens,
                uint32_t n_tokens, float scale, uint64_t dst, uint32_t stride);

/* lens.c */
void twin_head_out(struct twin_memory *memory, const struct op_matrix *matrix,
                   const struct op_head_out_args *args);
void twin_row_norms(struct twin_memory *memory, const struct op_matrix *matrix, uint64_t dst);
void twin_topk(struct twin_memory *memory, const struct topk_params *params);

/* norm.c */
void twin_norm(struct twin_memory *memory, const struct norm_params *params, uint32_t n_rows);
void twin_norm_bwd(struct twin_memory *memory, const struct norm_bwd_params *params,
                   uint32_t n_rows);
/* Gradient with respect to x of sum_i dn[i] x[i] / scale, scale = sqrt(mean x^2 + eps): dx[i] =
 * dn[i] / scale - n[i] (dn . n) / (width scale). */
struct norm_slope {
    double scale, along; /* dn . n */
};
double twin_norm_slope_at(const struct norm_slope *slope, double dn, double x, uint32_t width);

/* elementwise.c */
void twin_act(struct twin_memory *memory, const struct act_params *params, uint32_t n_tokens);
void twin_act_bwd(struct twin_memory *memory, const struct act_bwd_params *params,
                  uint32_t n_tokens);
void twin_edit(struct twin_memory *memory, const struct edit_params *params, uint32_t n_entries,
               uint32_t n_heads);
void twin_copy(struct twin_memory *memory, const struct copy_params *params);
void twin_sum_heads(struct twin_memory *memory, const struct sum_heads_params *params,
                    uint32_t n_tokens);

/* attention.c */
void twin_rope(struct twin_memory *memory, const struct rope_params *params, uint32_t n_tokens);
void twin_attn_scores(struct twin_memory *memory, const struct scores_params *params,
                      uint32_t n_tiles);
void twin_attn_softmax(struct twin_memory *memory, const struct softmax_params *params,
                       uint32_t n_tokens);
void twin_attn_mix(struct twin_memory *memory, const struct mix_params *params, uint32_t n_tiles);
void twin_attn_decode(struct twin_memory *memory, const struct decode_params *params,
                      uint32_t n_tokens);
void twin_rope_bwd(struct twin_memory *memory, const struct rope_bwd_params *params,
                   uint32_t n_tokens);
void twin_attn_softmax_bwd(struct twin_memory *memory, const struct softmax_bwd_params *params,
                           uint32_t n_tokens);
void twin_attn_mix_bwd(struct twin_memory *memory, const struct mix_bwd_params *params,
                       uint32_t n_tiles);

/* metric.c */
void twin_pair_grad(struct twin_memory *memory, const struct pair_grad_params *params,
                    uint32_t n_rows);
void twin_logit_grad(struct twin_memory *memory, const struct logit_grad_params *params,
                     uint32_t n_rows);

/* attribution.c */
void twin_difference(struct twin_memory *memory, const struct difference_params *params,
                     uint32_t n_slots);
void twin_accumulate(struct twin_memory *memory, const struct accumulate_params *params,
                     uint32_t n_slots);
void twin_head_inputs(struct twin_memory *memory, const struct head_inputs_params *params,
                      uint32_t n_slots);
void twin_head_gradients(struct twin_memory *memory, const struct head_gradients_params *params);
void twin_dots(struct twin_memory *memory, const struct dots_params *params);
void twin_node_dims(struct twin_memory *memory, const struct node_dims_params *params,
                    uint32_t n_nodes);

/* circuit.c */
void twin_circuit_inputs(struct twin_memory *memory, const struct circuit_inputs_params *params,
                         uint32_t n_entries);
void twin_circuit_place(struct twin_memory *memory, const struct circuit_place_params *params,
                        uint32_t n_entries);
void twin_circuit_heads(struct twin_memory *memory, const struct circuit_heads_params *params,
                        uint32_t n_entries);
void twin_circuit_outputs(struct twin_memory *memory, const struct circuit_outputs_params *params,
                          uint32_t n_rows);
void twin_pair_logits(struct twin_memory *memory, const struct pair_logits_params *params,
                      uint32_t n_entries);
void twin_logit_metrics(struct twin_memory *memory, const struct logit_metrics_params *params,
                        uint32_t n_rows);

#endif
