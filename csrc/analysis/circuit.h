/* The model under many circuits at once (docs/method.md section 5), beside the base run of the same
 * tokens.
 *
 * With the same tokens, the residual stream that enters the steering layer is that of the base run.
 * What an input of a circuit reads is therefore the base run's residual stream plus, over the edges
 * of the circuit that end there, the differences of their upstream nodes. The *difference* of a
 * node, [T, D], is what it adds in this run minus what it adds in the base run. An input without an
 * edge of the circuit is bit-identical to the base run's, and what depends on nothing changed is
 * never computed.
 *
 * python/vksteer/circuits/plan.py compiles circuits into tables of these parts:
 * - an *entry* is one way in which an input is read: a list of differences;
 * - a *state* of a head is a triple of a query, a key and a value, each an entry or the base run's;
 * - where a norm goes over the queries (or keys) of all heads together, a *row* is the entries of
 *   all heads that one run combines, and a state names a row instead of an entry.
 * Circuits that agree on what an input reads share its entry, so that nested circuits cost little
 * more than what they differ in. This module only sees deduplicated entries, not the circuits.
 *
 * The base run is an ordinary forward pass. This module hooks its values (struct run_hook) and
 * computes the circuits' rows from them, layer by layer. */
#ifndef VKSTEER_ANALYSIS_CIRCUIT_H
#define VKSTEER_ANALYSIS_CIRCUIT_H

#include "analysis/read_logits.h"

/* readback memory, for the metrics of a tile of tokens */
#define CIRCUIT_READBACK (UINT64_C(16) << 20)
#define CIRCUIT_ROWS_A_GRID 32768 /* rows of one dispatch with a workgroup a row */

/* Compiled circuits as flat arrays, which circuit_create checks and copies. There are n layers from
 * first_layer on, w = H + 2G + 1 inputs in each (q, k, v and the MLP's), and the logits' input
 * last. Differences are numbered: 0 is what steering adds; then, layer by layer, those of the
 * heads' outputs in the order of `outputs` and one for every entry of the MLP; then the masked
 * copies in the order of `masks`. NO_DIFFERENCE in place of an entry or a state stands for the base
 * run's. */
struct circuit_plan {
    uint32_t first_layer;
    /* [n w + 2] entries of input i: entry_first[i] to entry_first[i + 1] */
    const uint32_t *entry_first;
    const uint32_t *ref_first; /* [entries + 1] */
    /* differences that an entry adds to the base run's residual stream, in this order */
    const uint32_t *refs;
    const uint32_t *state_first; /* [n + 1] */
    /* [states, 4] head, then entries of its query, key and value (counted within that input) or
     * NO_DIFFERENCE. With QK_NORM_WIDE the second and third are rows (counted within the layer). */
    const uint32_t *states;
    const uint32_t *output_first; /* [n + 1] */
    /* [outputs, 3] head (ascending within a layer), state (counted within the layer) or
     * NO_DIFFERENCE, variant (of a post-norm) */
    const uint32_t *outputs;
    const uint32_t *variant_first; /* [n + 1] */
    /* [variants, H] states of all heads of a layer, whose summed output a post-norm normalises */
    const uint32_t *variants;
    /* [2n + 2] masked copies that are made at a stage. Stage 0: after steering, 1 + 2i: after the
     * heads of layer i, 2 + 2i: after its MLP */
    const uint32_t *mask_first;
    /* [masks] differences that are copied: where a token's mask is 1; the copy is zero elsewhere */
    const uint32_t *masks;
    /* QK_NORM_WIDE: [n + 1], and [q_rows, H] or [k_rows, G] entries of all heads (counted within
     * each head's input) or NO_DIFFERENCE, at least one of which is an entry */
    const uint32_t *q_row_first, *q_rows, *k_row_first, *k_rows;
    /* lengths of the arrays */
    uint32_t n_refs, n_states, n_outputs, n_variants, n_masks, n_entries, n_q_rows, n_k_rows;
};

/* Rows of a layer that a norm over all heads of one kind (queries or keys) normalises together. */
struct circuit_rows {
    uint32_t n, n_heads, table; /* circuit_heads_params; words from the start of the tables */
};

struct circuit_layer {
    uint32_t entry, n_entries; /* of the inputs of attention */
    uint32_t mlp_entry, n_mlp; /* of the MLP's input */
    /* Numbers of queries, and of keys and values in the caches: one for every entry, and after
     * these the base run's queries, keys and values, where a state names them. */
    uint32_t n_q, n_k, n_v;
    struct circuit_rows q_rows, k_rows;
    /* of queries, keys and values; their entries follow each other */
    uint32_t n_places[3];
    uint32_t n_states, n_outputs, n_variants;
    /* [n_states, 3] indices of the query, the key and the value */
    const uint32_t *states;
    uint32_t *input_first;  /* [H + 2G + 1] entries of each input, counted from `entry` */
    uint32_t *output_first; /* [H + 1] outputs of each head */
    /* words from the start of the tables: entries of circuit_place_params, circuit_heads_params for
     * variants, for outputs */
    uint32_t place_table, gather_table, output_table;
    uint32_t difference;      /* the first of the heads' outputs; the MLP's follow */
    struct gpu_buffer *k, *v; /* [n_k, n_slots, dh], [n_v, n_slots, dh] */
};

struct circuit_run {
    struct model *model;
    struct run_work *work; /* owned: the base run's; NULL before circuit_reserve */
    uint32_t first_layer, depth, n_inputs, n_differences, n_entries; /* n_inputs: H + 2G */
    uint32_t capacity, n_slots; /* tokens of a chunk; slots of the caches */
    /* row strides: of the product of one head, of its difference, of its attention output, of the
     * queries and of the keys of all heads */
    uint32_t product_stride, heads_stride, z_stride, q_row_stride, k_row_stride;
    uint32_t most_entries;             /* entries of the input that has the most */
    uint32_t assembled;                /* entries that are assembled at once */
    uint32_t logit_entry, n_logits;    /* entries of the logits' input */
    uint32_t *words;                   /* the device's tables; copies of the plan follow them */
    uint32_t n_words, ref_first, refs; /* words from the start */
    /* copies of the plan's; the first masked difference */
    uint32_t *mask_first, *masks, n_masks, masked;
    struct circuit_layer *layers; /* [depth] */
    struct gpu_buffer *tables, *differences, *normed, *product, *q, *z, *heads, *gathered, *raw,
        *scale, *gate_up, *post, *scores, *steer;
    /* QK_NORM_WIDE: rows of all heads' queries and keys; the base run's before their norm */
    struct gpu_buffer *q_rows, *k_rows, *base_qk;
    uint32_t mlp_rows; /* rows that an MLP computes at once */
    struct read_memory read_memory;
    const struct read_request *read; /* of the pass that is running */
    const uint8_t *mask;             /* [all tokens of the batch] of the pass that is running */
    const float *token_steer;        /* [all tokens, D] likewise, or NULL */
};

/* Checks the plan and makes its tables in host memory; the plan's arrays are copied. The model must
 * outlive the circuits, or the caller sets run->model to NULL. ERROR_VALUE for an invalid plan. */
int circuit_create(struct circuit_run **out, struct model *model, const struct circuit_plan *plan,
                   struct error *error);
/* Waits for the device and frees the circuits; NULL is allowed. */
void circuit_destroy(struct circuit_run *run);
/* Device bytes of a pass with `capacity` tokens at once, caches of n_slots and rows of at most
 * `longest` tokens; *largest: those of the largest buffer. distributions: whether metrics read
 * them. On matrix units with the memory of split rows. */
uint64_t circuit_bytes(const struct circuit_run *run, uint32_t capacity, uint32_t n_slots,
                       uint32_t longest, int distributions, uint64_t *largest);
/* Reserves the memory of passes, which may be done once (ERROR_VALUE after that). steer [D]: what
 * steering adds to the residual stream; copied. */
int circuit_reserve(struct circuit_run *run, uint32_t capacity, uint32_t n_slots, uint32_t longest,
                    const float *steer, struct error *error);
/* One forward pass of the base run with the circuits beside it; the caches of both continue where
 * the pass before ended. read: the outputs to compute for every entry of the logits' input. mask
 * [all tokens]: where masked differences are not zero; NULL if there are none. token_steer [all
 * tokens, D]: what steering adds to each token, in place of the same vector for all; NULL if it is
 * that. ERROR_VALUE without memory, and for a batch that does not fit. Waits. */
int circuit_forward(struct circuit_run *run, struct run_cache *cache, const struct run_batch *batch,
                    const struct read_request *read, const uint8_t *mask, const float *token_steer,
                    struct error *error);

/* circuit_inputs.c */
/* Queries, keys and values of all entries, where the attention kernels read them. run->work->x is
 * the base run's residual stream before the layer. */
int circuit_attention_inputs(struct circuit_run *run, int layer, struct error *error);
/* Keeps what of the base run's rows [q | k | v], before norm and rotation, the layer's rows need.
 */
int circuit_base_rows(struct circuit_run *run, int layer, uint64_t qkv, uint32_t stride,
                      struct error *error);

/* circuit_layer.c: the states and outputs of a layer, and their differences. run->work->x is the
 * base run's residual stream before the layer, base_z its attention outputs per head, base_raw its
 * attention output before the post-norm (0 without one). */
int circuit_attention(struct circuit_run *run, int layer, uint64_t base_z, uint64_t base_raw,
                      struct error *error);
/* The outputs of a layer's MLP for every entry, and their differences. run->work->x is the base
 * run's residual stream before the MLP, base_out what the MLP adds to it. */
int circuit_mlp(struct circuit_run *run, int layer, uint64_t base_out, struct error *error);

/* circuit_plan.c */
/* ERROR_VALUE unless every index of the plan is in range and reads only what exists by then. */
int circuit_plan_check(const struct model_facts *f, const struct circuit_plan *plan,
                       struct error *error);
/* Fills in counts, first entries and first difference of layer first_layer + i. */
int circuit_layer_begin(struct circuit_run *run, const struct circuit_plan *plan, uint32_t i,
                        struct error *error);
/* Makes run->words, after circuit_layer_begin for every layer. */
int circuit_tables_make(struct circuit_run *run, const struct circuit_plan *plan,
                        struct error *error);

/* circuit_differences.c */
struct circuit_norm {
    uint32_t kind; /* NORM_KIND_* */
    uint64_t gain, bias;
};
/* The norm before a layer's attention or MLP, with these parameters. */
struct circuit_norm circuit_norm_before(const struct circuit_run *run, uint64_t gain,
                                        uint64_t bias);
/* run->normed = the inputs of entries [entry, entry + n) after their norm, of the listed tokens
 * of the chunk (device address) or, if `tokens` is 0, of all. */
int circuit_assemble(struct circuit_run *run, uint32_t entry, uint32_t n, struct circuit_norm norm,
                     uint64_t tokens, uint32_t n_tokens, struct error *error);
/* op_norm of n rows, in ranges that fit a grid: x, gain, bias, dst, scale, width, stride, flags and
 * eps of *params. */
int circuit_norm_rows(struct circuit_run *run, const struct norm_params *params, uint64_t n,
                      struct error *error);
/* The plan and the memory of a layer. */
struct circuit_layer *circuit_layer_of(const struct circuit_run *run, int layer);
/* Makes the masked copies of a stage (see circuit_plan.mask_first). */
int circuit_masks(struct circuit_run *run, uint32_t stage, struct error *error);
/* The device address of a difference, for the number of tokens of the chunk. */
uint64_t circuit_difference(const struct circuit_run *run, uint32_t difference);

#endif
