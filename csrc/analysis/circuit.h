/* The model under many circuits at once (method.md section 5), beside the base
 * run of the same tokens.
 *
 * With the same tokens the stream entering the steering layer is that of the base run, so what an
 * input of a circuit reads is the base run's stream plus, over the edges of the circuit that end
 * there, what their upstream nodes add in this run minus what they add in the base run. A circuit
 * without an edge into an input leaves that input the base run's, to the last bit; whatever depends
 * on nothing changed is never computed.
 *
 * The caller has done the thinking (python/vksteer/circuit_plan.py): an *entry* is one way in which
 * one input is read (a list of *blocks*), a *state* of a head is a triple of a query, a key and a
 * value, each an entry or the base run's, and a *block* [T, D] is what a node adds minus what it
 * adds in the base run. Circuits that agree on what an input reads share its entry, so that a
 * family of circuits costs little more than what they differ in. Which circuit is which, and how
 * many there are, nobody here knows.
 *
 * The base run is an ordinary forward pass; this module hooks its values (struct run_hook) and
 * computes its rows where the values that it needs pass by. */
#ifndef VKSTEER_CIRCUIT_H
#define VKSTEER_CIRCUIT_H

#include "analysis/read_logits.h"

/* metrics of a tile of tokens come back through it */
#define CIRCUIT_READBACK (UINT64_C(16) << 20)

/* Flat arrays; copied by circuit_create, which checks every number. n layers from first_layer on; w
 * = H + 2G + 1 inputs a layer (q, k, v, MLP), and the logits' last. Blocks: 0 what steering adds;
 * then layer by layer the heads' outputs in the order of `outputs` and one for every entry of the
 * MLP; then the masked copies in the order of `masks`. NO_BLOCK stands for the base run's. */
struct circuit_plan {
    uint32_t first_layer;
    /* [n w + 2] entries of input i: entry_first[i] to entry_first[i + 1] */
    const uint32_t *entry_first;
    const uint32_t *ref_first; /* [entries + 1] */
    /* blocks that an entry adds to the base run's stream, in this order */
    const uint32_t *refs;
    const uint32_t *state_first; /* [n + 1] */
    /* [states, 4] head, then entries of its query, key and value (counted within
     * that input) or NO_BLOCK */
    const uint32_t *states;
    const uint32_t *output_first; /* [n + 1] */
    /* [outputs, 3] head (ascending within a layer), state (within the layer) or NO_BLOCK,
     * variant (post-norms) */
    const uint32_t *outputs;
    const uint32_t *variant_first; /* [n + 1] */
    /* [variants, H] states of all heads of a layer, whose sum a post-norm normalises */
    const uint32_t *variants;
    /* [2n + 2] stage 0: after steering, 1 + 2i: after the heads of layer i,
     * 2 + 2i: after its MLP */
    const uint32_t *mask_first;
    /* [masks] blocks whose rows are copied where a token's mask is 1 and zero elsewhere */
    const uint32_t *masks;
    /* lengths of the arrays */
    uint32_t n_refs, n_states, n_outputs, n_variants, n_masks, n_entries;
};

struct circuit_layer {
    uint32_t entry, n_entries; /* of attention's inputs */
    uint32_t mlp_entry, n_mlp;
    /* blocks of queries, regions of the caches: entries, then the base run's as
     * far as they are used */
    uint32_t n_q, n_k, n_v;
    uint32_t n_places, n_states, n_outputs, n_variants;
    /* [n_states, 3] block of the query, region of the key, region of the value */
    const uint32_t *states;
    uint32_t *input_first;  /* [H + 2G + 1] entries of each input, counted from `entry` */
    uint32_t *output_first; /* [H + 1] outputs of each head */
    /* words from the start of the tables: entries of circuit_place, circuit_heads */
    uint32_t places, gathers, differences;
    uint32_t block;           /* first of the heads' outputs; the MLP's follow */
    struct gpu_buffer *k, *v; /* [regions, n_slots, dh] */
};

struct circuit_run {
    struct model *model;
    struct run_work *work; /* owned: the base run's; NULL before circuit_reserve */
    uint32_t first_layer, depth, n_inputs, n_blocks, n_entries; /* n_inputs: H + 2G */
    uint32_t capacity, n_slots;
    /* rows of one head's product, of its difference, of its mix */
    uint32_t product_stride, heads_stride, z_stride;
    uint32_t most_entries, assembled; /* largest input; entries that are assembled at once */
    uint32_t logit_entry, n_logits;
    uint32_t *words;                   /* what the device gets, and the plan's copies behind it */
    uint32_t n_words, ref_first, refs; /* words from the start */
    uint32_t *mask_first, *masks, n_masks, mask_block;
    struct circuit_layer *layers; /* [depth] */
    struct gpu_buffer *tables, *d, *normed, *product, *q, *z, *heads, *gathered, *raw, *scale,
        *gate_up, *post, *scores, *steer;
    uint32_t mlp_rows; /* rows that go through an MLP at once */
    struct read_memory read_memory;
    const struct read_request *read; /* of the pass under way */
    const uint8_t *mask;             /* [all tokens of the batch] of the pass under way */
};

int circuit_create(struct circuit_run **out, struct model *model, const struct circuit_plan *plan,
                   struct error *error);
void circuit_destroy(struct circuit_run *run);
/* Device bytes of a pass with `capacity` tokens at once over caches of n_slots; *largest:
 * of the largest buffer. */
uint64_t circuit_bytes(const struct circuit_run *run, uint32_t capacity, uint32_t n_slots,
                       uint64_t *largest);
/* Memory for passes. steer [D]: what steering adds. */
int circuit_reserve(struct circuit_run *run, uint32_t capacity, uint32_t n_slots,
                    const float *steer, struct error *error);
/* One forward pass of the base run with the circuits beside it; the caches of both go on where they
 * were left. read: what is asked for, of every entry of the logits' input. mask [all tokens] says
 * where masked blocks are not zero (NULL without any). */
int circuit_forward(struct circuit_run *run, struct run_cache *cache, const struct run_batch *batch,
                    const struct read_request *read, const uint8_t *mask, struct error *error);

/* circuit_layer.c: one layer, from the base run's stream before it (run->work->x). */
int circuit_attention(struct circuit_run *run, int layer, uint64_t base_z, uint64_t base_raw,
                      struct error *error);
int circuit_mlp(struct circuit_run *run, int layer, uint64_t base_out, struct error *error);
/* circuit_plan.c */
int circuit_plan_check(const struct model_facts *f, const struct circuit_plan *plan,
                       struct error *error);
int circuit_layer_begin(struct circuit_run *run, const struct circuit_plan *plan, uint32_t i,
                        struct error *error);
int circuit_tables_make(struct circuit_run *run, const struct circuit_plan *plan,
                        struct error *error);

/* circuit_blocks.c */
/* run->normed = normed inputs of entries [entry, entry + n), of the listed tokens
 * (device address) or all. */
int circuit_assemble(struct circuit_run *run, uint32_t entry, uint32_t n, uint64_t gain,
                     uint64_t tokens, uint32_t n_tokens, struct error *error);
int circuit_masks(struct circuit_run *run, uint32_t stage, struct error *error);
/* its address, for the chunk's number of tokens */
uint64_t circuit_block(const struct circuit_run *run, uint32_t block);

#endif
