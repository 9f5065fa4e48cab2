/* Float64 reference implementations on the CPU: every op written a second time as plain loops, for
 * the tests and for `vksteer verify`.
 *
 * A reference takes the same arguments as its op, and every field means what it means to the op.
 * Addresses point into host memory in which each float of the device is a double, so that rounding
 * in the reference is negligible. Every access is checked: a reference that returns without failing
 * has shown that the arguments stay inside their buffers, which is why it runs before the device
 * sees the same arguments. */
#ifndef VKSTEER_REFERENCE_H
#define VKSTEER_REFERENCE_H

#include "ops/ops.h"

#define REFERENCE_BUFFERS 16
/* address = (buffer + 1) << REFERENCE_SHIFT | byte offset on the device, 4 for every item; 0:
 * absent */
#define REFERENCE_SHIFT 40

struct reference_buffer {
    const char *name;
    double *floats;        /* [n], or NULL where the buffer holds words */
    const uint32_t *words; /* [n], or NULL; no op writes words */
    uint64_t n;
};

struct reference_memory {
    struct reference_buffer buffers[REFERENCE_BUFFERS]; /* borrowed */
    uint32_t n_buffers;
    /* an access left its buffer, or an argument made no sense: `error` says which;
     * results are then worthless */
    int failed;
    struct error error;
    double no_float; /* what a refused access gets to read or write */
};

static inline uint64_t reference_address(uint32_t buffer, uint64_t item) {
    return ((uint64_t)(buffer + 1) << REFERENCE_SHIFT) + 4 * item;
}

/* Item `index` after `address`: where a float lies (never NULL), what a word is. */
double *reference_float(struct reference_memory *memory, uint64_t address, uint64_t index);
uint32_t reference_word(struct reference_memory *memory, uint64_t address, uint64_t index);
struct token_meta reference_token(struct reference_memory *memory, uint64_t tokens, uint64_t index);
double reference_activate(uint32_t act, double x); /* act: one of ACT_* */
/* Keys [start, pos] are what a query sees. */
static inline uint32_t reference_window_start(uint32_t pos, uint32_t window) {
    return window && pos + 1 > window ? pos + 1 - window : 0;
}
/* The first failure stays. */
#define reference_fail(memory, ...) \
    do { \
        if (!(memory)->failed) \
            (memory)->failed = error_set(&(memory)->error, ERROR_VALUE, __VA_ARGS__); \
    } while (0)

/* W[n, k], 0 beyond the matrix. */
double reference_weight(struct reference_memory *memory, const struct op_matrix *matrix, uint32_t n,
                        uint32_t k);

/* linear.c: matrices lie in panels of words, as on the device. */
void reference_linear(struct reference_memory *memory, const struct op_matrix *matrix,
                      const struct op_linear_args *args);
void reference_linear_pairs(struct reference_memory *memory, const struct op_matrix *matrix,
                            const struct op_linear_pairs_args *args);
void reference_linear_bwd(struct reference_memory *memory, const struct op_matrix *matrix,
                          const struct op_linear_bwd_args *args);
void reference_embed(struct reference_memory *memory, const struct op_matrix *embedding,
                     uint64_t tokens, uint32_t n_tokens, float scale, uint64_t dst,
                     uint32_t stride);

/* lens.c */
void reference_head_out(struct reference_memory *memory, const struct op_matrix *matrix,
                        const struct op_head_out_args *args);
void reference_row_norms(struct reference_memory *memory, const struct op_matrix *matrix,
                         uint64_t dst);
void reference_topk(struct reference_memory *memory, const struct topk_params *params);

/* norm.c */
void reference_norm(struct reference_memory *memory, const struct norm_params *params,
                    uint32_t n_rows);
void reference_norm_bwd(struct reference_memory *memory, const struct norm_bwd_params *params,
                        uint32_t n_rows);
/* Gradient with respect to x of sum_i dn[i] x[i] / scale, scale = sqrt(mean x^2 + eps): dx[i] =
 * dn[i] / scale - n[i] (dn . n) / (width scale). */
struct norm_slope {
    double scale, along; /* dn . n */
};
double reference_norm_slope_at(const struct norm_slope *slope, double dn, double x, uint32_t width);

/* elementwise.c */
void reference_act(struct reference_memory *memory, const struct act_params *params,
                   uint32_t n_tokens);
void reference_act_bwd(struct reference_memory *memory, const struct act_bwd_params *params,
                       uint32_t n_tokens);
void reference_edit(struct reference_memory *memory, const struct edit_params *params,
                    uint32_t n_entries, uint32_t n_heads);
void reference_copy(struct reference_memory *memory, const struct copy_params *params);
void reference_sum_heads(struct reference_memory *memory, const struct sum_heads_params *params,
                         uint32_t n_tokens);

/* attention.c */
void reference_rope(struct reference_memory *memory, const struct rope_params *params,
                    uint32_t n_tokens);
void reference_attn_scores(struct reference_memory *memory, const struct scores_params *params,
                           uint32_t n_tiles);
void reference_attn_softmax(struct reference_memory *memory, const struct softmax_params *params,
                            uint32_t n_tokens);
void reference_attn_output(struct reference_memory *memory, const struct attn_output_params *params,
                           uint32_t n_tiles);
void reference_attn_decode(struct reference_memory *memory, const struct decode_params *params,
                           uint32_t n_tokens);
void reference_rope_bwd(struct reference_memory *memory, const struct rope_bwd_params *params,
                        uint32_t n_tokens);
void reference_attn_softmax_bwd(struct reference_memory *memory,
                                const struct softmax_bwd_params *params, uint32_t n_tokens);
void reference_attn_output_bwd(struct reference_memory *memory,
                               const struct attn_output_bwd_params *params, uint32_t n_tiles);

/* metric.c */
void reference_pair_grad(struct reference_memory *memory, const struct pair_grad_params *params,
                         uint32_t n_rows);
void reference_logit_grad(struct reference_memory *memory, const struct logit_grad_params *params,
                          uint32_t n_rows);

/* attribution.c */
void reference_difference(struct reference_memory *memory, const struct difference_params *params,
                          uint32_t n_slots);
void reference_accumulate(struct reference_memory *memory, const struct accumulate_params *params,
                          uint32_t n_slots);
void reference_head_inputs(struct reference_memory *memory, const struct head_inputs_params *params,
                           uint32_t n_slots);
void reference_head_gradients(struct reference_memory *memory,
                              const struct head_gradients_params *params);
void reference_dots(struct reference_memory *memory, const struct dots_params *params);
void reference_node_dims(struct reference_memory *memory, const struct node_dims_params *params,
                         uint32_t n_nodes);

/* circuit.c */
void reference_circuit_inputs(struct reference_memory *memory,
                              const struct circuit_inputs_params *params, uint32_t n_entries);
void reference_circuit_place(struct reference_memory *memory,
                             const struct circuit_place_params *params, uint32_t n_entries);
void reference_circuit_heads(struct reference_memory *memory,
                             const struct circuit_heads_params *params, uint32_t n_entries);
void reference_circuit_outputs(struct reference_memory *memory,
                               const struct circuit_outputs_params *params, uint32_t n_rows);
void reference_pair_logits(struct reference_memory *memory, const struct pair_logits_params *params,
                           uint32_t n_entries);
void reference_logit_metrics(struct reference_memory *memory,
                             const struct logit_metrics_params *params, uint32_t n_rows);

#endif
