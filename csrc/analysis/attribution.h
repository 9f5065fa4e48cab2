/* Edge, node and dimension scores of EAP-IG over whole responses (method.md section 5), streamed.
 *
 * Slots are tokens of samples whose scores are being computed. For each the memory holds, per
 * layer, the difference that steering makes to the nodes' outputs (heads as z, which W_O turns into
 * what they add to the stream) and the gradients of the inputs, averaged over the integration's
 * steps and kept small: queries, keys and values in the heads' own space (H + 2G heads of d_head
 * floats, instead of as many rows of width D). Only attribute_contract makes rows of width D of
 * them, a tile of slots at a time. So no [nodes x positions x D] tensor ever exists. */
#ifndef VKSTEER_ATTRIBUTE_H
#define VKSTEER_ATTRIBUTE_H

#include "run/tape.h"

/* slots whose scores are summed on the device; sums over tiles are float64, in order */
#define ATTRIBUTE_TILE 32

struct attribution {
    struct run_work *work;       /* owned: for two runs of the longest sample */
    struct run_tape *tape;       /* owned */
    uint32_t first_layer, depth; /* layers from the steering layer on */
    uint32_t n_slots, n_steps;
    /* gradients after the inputs' norm and gain (at="normed"), not before */
    int normed;
    struct attribution_layer {
        /* [n_slots, z_stride]; divided by the post-norm's rms where there is one */
        struct gpu_buffer *dz;
        struct gpu_buffer *dmlp;               /* [n_slots, d_stride] */
        struct gpu_buffer *heads, *steps, *xs; /* see head_inputs_params */
        struct gpu_buffer *mlp;                /* [n_slots, d_stride] gradient of the MLP's input */
        /* [n_slots, d_stride] gradients of the stream after attention, after the MLP */
        struct gpu_buffer *mid, *post;
    } *layers; /* [depth] */
    /* [n_slots, d_stride] gradients of the steered stream and of the logits' input */
    struct gpu_buffer *pre, *logits;
    struct gpu_buffer *du, *g, *expanded; /* a tile's rows */
    struct gpu_buffer *picks;             /* rows and logits of two runs */
    struct gpu_buffer *lists;             /* the tokens of the slots of the batch under way */
    /* the batch under way, for the hook */
    uint64_t sources; /* device: pairs (forward) or sources (steps) of the batch's slots */
    uint32_t batch_slot, batch_slots, n_sources, first_step;
    int collecting; /* 1: forward pass, differences; 2: steps, gradients */
};

/* capacity: tokens that a forward pass holds; step_capacity: tokens that go forward and
 * back (at most capacity). */
int attribution_create(struct attribution **out, struct model *model, uint32_t capacity,
                       uint32_t step_capacity, uint32_t first_layer, uint32_t n_slots,
                       uint32_t n_steps, int normed, int keep_inside, struct error *error);
void attribution_destroy(struct attribution *a);
/* Device bytes, from the facts alone, with a batch's cache. */
uint64_t attribution_bytes(const struct model_facts *facts, uint32_t capacity,
                           uint32_t step_capacity, uint32_t first_layer, uint32_t n_slots,
                           uint32_t n_steps, int normed, int keep_inside);
/* Gradients become zero: before the first step of new samples. */
int attribution_reset(struct attribution *a, struct error *error);

/* What the two runs predict at the tokens where a metric may be read: m pairs of packed
 * tokens (corrupt or base run, clean or steered: as the caller pairs them). Host arrays,
 * NULL where not wanted. */
struct attribution_picks {
    uint32_t m;
    const uint32_t *tokens; /* [m, 2] */
    int capped;
    int32_t *top;  /* [m, 2] greedy tokens, the lowest id of equals */
    float *margin; /* [m, 2] between the two largest logits (before the cap) */
    float *kl;     /* [m] KL(second || first) */
    float *normed; /* [m, 2, D] final rows after norm and gain */
};

/* Slots [slot, slot + n) of this batch. pairs [n, 2]: the packed tokens whose difference a slot
 * holds (first - second). */
int attribution_forward(struct attribution *a, struct run_cache *cache,
                        const struct run_batch *batch, uint32_t slot, uint32_t n,
                        const uint32_t *pairs, const struct attribution_picks *picks,
                        struct error *error);
/* Adds steps first_step, ..., first_step + n_sources - 1: sources [n, n_sources], the packed token
 * of each slot and step, or NO_SOURCE. */
int attribution_step(struct attribution *a, struct run_cache *cache, const struct run_batch *batch,
                     const struct run_metric *metric, uint32_t slot, uint32_t n,
                     const uint32_t *sources, uint32_t n_sources, uint32_t first_step,
                     struct error *error);

/* Nodes in graph order: steer, then layer by layer heads and MLP. Inputs: layer by layer q (H), k
 * (G), v (G), MLP; logits last. */
uint32_t attribution_nodes(const struct attribution *a);
uint32_t attribution_inputs(const struct attribution *a);
/* Scores of at most ATTRIBUTE_TILE slots. steer [D]: the difference at the steering node. edges
 * [nodes, inputs] and nodes [nodes] are added to; entries that are no edge are meaningless. dims:
 * NULL, or [dims_rows, D], the first nodes' (1: steer's alone; all), added to. */
int attribution_contract(struct attribution *a, uint32_t slot, uint32_t n, const float *steer,
                         double *edges, double *nodes, double *dims, uint32_t dims_rows,
                         struct error *error);

#endif
