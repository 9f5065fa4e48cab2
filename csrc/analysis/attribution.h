/* Edge, node and dimension scores of EAP-IG over whole responses (docs/method.md section 5).
 *
 * A sample token is a token of a sample whose scores are being computed. For each of them the
 * memory holds, layer by layer, the difference that steering makes to the outputs of the nodes and
 * the gradients of the inputs, averaged over the integration steps. Both are kept small: the
 * outputs of heads as z, before W_O, and the gradients of queries, keys and values in head space
 * (H + 2G heads of d_head floats, instead of as many rows of width D). Rows of width D are made by
 * attribution_contract, a contraction tile at a time, so no [nodes, positions, D] array ever
 * exists. */
#ifndef VKSTEER_ANALYSIS_ATTRIBUTION_H
#define VKSTEER_ANALYSIS_ATTRIBUTION_H

#include "run/tape.h"

/* A contraction tile: sample tokens whose scores are summed on the device. Sums over tiles are
 * float64, in order. */
#define ATTRIBUTE_TILE 32

/* Logits of both runs of the picks that are computed at once: at most about these bytes, unless
 * fewer picks than these would fit. */
#define ATTRIBUTION_PICKS_BYTES (UINT64_C(12) << 20)
#define ATTRIBUTION_PICKS_ROWS 8

struct attribution {
    struct run_work *work;       /* owned; holds two runs of the longest sample */
    struct run_tape *tape;       /* owned */
    uint32_t first_layer, depth; /* the steering layer; layers from it on */
    uint32_t n_sample_tokens, n_steps;
    /* 1: gradients with respect to inputs after their norm, gain and bias (at="normed"); 0: before
     */
    int normed;
    struct attribution_layer {
        /* [n_sample_tokens, z_stride]; divided by the post-norm's RMS where there is one */
        struct gpu_buffer *dz;
        struct gpu_buffer *dmlp;               /* [n_sample_tokens, d_stride] */
        struct gpu_buffer *heads, *steps, *xs; /* see head_inputs_params */
        struct gpu_buffer *mlp; /* [n_sample_tokens, d_stride] gradient of the MLP's input */
        /* [n_sample_tokens, d_stride] gradients of the residual stream after attention (NULL in
         * parallel layers, where it is `post`), after the MLP */
        struct gpu_buffer *mid, *post;
        /* [qkv_stride] b_qkv + W_qkv b_ln1; NULL where ln1 has no bias or is not passed */
        struct gpu_buffer *bias;
    } *layers; /* [depth] */
    /* [n_sample_tokens, d_stride] gradients of the steered residual stream and of the logits' input
     */
    struct gpu_buffer *pre, *logits;
    struct gpu_buffer *du, *g, *expanded; /* rows of a contraction tile */
    struct gpu_buffer *picks;             /* rows and logits of two runs */
    struct gpu_buffer *lists;             /* packed tokens of the batch's sample tokens */
    /* the batch that is running, for the hooks */
    uint64_t sources; /* device: pairs (forward) or sources (steps) of the batch's sample tokens */
    uint32_t batch_first, batch_n, n_sources, first_step; /* sample tokens; steps */
    int collecting; /* 1: forward pass, differences; 2: steps, gradients */
};

/* How much goes through at once. */
struct attribution_sizes {
    uint32_t capacity;      /* tokens of a forward pass */
    uint32_t step_capacity; /* tokens of a forward and backward pass, at most `capacity` */
    uint32_t longest;       /* tokens of the longest sample */
    uint32_t first_layer, n_sample_tokens, n_steps;
    int normed, keep_inside; /* see struct attribution and run/tape.h */
};
/* Reserves the memory of an attribution over layers first_layer and above. ERROR_DEVICE if the
 * memory is not free. */
int attribution_create(struct attribution **out, struct model *model,
                       const struct attribution_sizes *sizes, struct error *error);
/* Waits for the device and frees the attribution; NULL is allowed. If the model was destroyed
 * before, the caller has set work->model to NULL. */
void attribution_destroy(struct attribution *a);
/* Device bytes of an attribution and of the key/value cache of a batch, from the facts alone.
 * scratch: see run_sizes. */
uint64_t attribution_bytes(const struct model_facts *facts, uint64_t scratch,
                           const struct attribution_sizes *sizes);
/* What its products on matrix units split their rows in, which belongs to the model's ops. */
uint64_t attribution_split_bytes(const struct model_facts *facts,
                                 const struct attribution_sizes *sizes);
/* Bytes of the rows and logits of two runs, of picks of at most n tokens; *at_once: how many picks
 * are computed at once. */
uint64_t attribution_picks_bytes(const struct model_facts *facts, uint32_t n, uint32_t *at_once);
/* Zeroes the gradients, before the first step of new samples. */
int attribution_reset(struct attribution *a, struct error *error);

/* What the two runs predict at the tokens where a metric may be read: m pairs of packed tokens, one
 * of each run, in the caller's order. Host arrays. */
struct attribution_picks {
    uint32_t m;
    const uint32_t *tokens; /* [m, 2] */
    int capped;             /* KL of the logits after the soft cap */
    int32_t *top;           /* [m, 2] greedy tokens, the lowest id of equal logits */
    float *margin;          /* [m, 2] between the two largest logits (before the cap) */
    float *kl;              /* [m] KL(second || first); NULL: not computed */
    float *normed;          /* [m, 2, D] final rows after norm and gain; NULL: not copied */
};

/* Runs the batch forward and stores the differences of sample tokens [first, first + n). pairs
 * [n, 2]: the packed tokens of each, whose difference (first - second) it holds. picks: read at the
 * end of the pass; NULL or m = 0 for none. ERROR_VALUE if a range or a token does not exist. Waits.
 */
int attribution_forward(struct attribution *a, struct run_cache *cache,
                        const struct run_batch *batch, uint32_t first, uint32_t n,
                        const uint32_t *pairs, const struct attribution_picks *picks,
                        struct error *error);
/* Runs the batch forward and backward and adds the gradients of integration steps first_step ..
 * first_step + n_sources - 1 to sample tokens [first, first + n). sources [n, n_sources]: the
 * packed token of each sample token and step, or NO_SOURCE. Waits. */
int attribution_step(struct attribution *a, struct run_cache *cache, const struct run_batch *batch,
                     const struct run_metric *metric, uint32_t first, uint32_t n,
                     const uint32_t *sources, uint32_t n_sources, uint32_t first_step,
                     struct error *error);

/* attribution_picks.c: reads the picks of the pass that has just run; waits for the device, also
 * without picks. */
int attribution_picks_read(struct attribution *a, const struct attribution_picks *picks,
                           struct error *error);

/* Are the gradients of q, k and v inputs passed through the backward pass of ln1? Not those after
 * it (normed), nor in a model whose attention has no norm before it. */
int attribution_passes_norm(const struct model_facts *facts, int normed);
/* The number of nodes, in graph order: steer, then layer by layer the heads and the MLP. */
uint32_t attribution_nodes(const struct attribution *a);
/* The number of inputs: layer by layer q (H), k (G), v (G) and the MLP's; the logits' comes last.
 */
uint32_t attribution_inputs(const struct attribution *a);
/* attribution_scores.c: adds the scores of sample tokens [first, first + n), at most
 * ATTRIBUTE_TILE, to edges [nodes, inputs] (entries that are no edge are meaningless), nodes
 * [nodes] and, of the first dims_rows nodes, dims [dims_rows, D]. steer [D]: the difference at the
 * steering node. Waits. ERROR_VALUE for an invalid range. */
int attribution_contract(struct attribution *a, uint32_t first, uint32_t n, const float *steer,
                         double *edges, double *nodes, double *dims, uint32_t dims_rows,
                         struct error *error);

#endif
