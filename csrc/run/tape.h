/* What a forward pass keeps for the backward pass, and the backward pass itself.
 *
 * A tape holds the residual stream before every layer from `first_layer` on. Of what a layer
 * computes it keeps either everything (keep_inside) or only the last layer run: the backward pass
 * then runs each layer again. Both are bit-identical. */
#ifndef VKSTEER_TAPE_H
#define VKSTEER_TAPE_H

#include "run/work.h"

struct tape_layer {
    struct gpu_buffer *x;      /* [N, d_stride] the residual stream before the layer, after edits */
    struct gpu_buffer *mid;    /* [N, d_stride] before the MLP; NULL in parallel layers: it is x */
    struct gpu_buffer *qkv_in; /* [N, qkv_stride] before norm per head and rotation, after edits */
    struct gpu_buffer *qkv;    /* [N, qkv_stride] after */
    struct gpu_buffer *gate_up; /* [N, gate_up_stride] */
    /* [N, d_stride] sublayer outputs before a post-norm; NULL without one */
    struct gpu_buffer *attn_raw, *mlp_raw;
};

/* What a site's value was before one of its groups of edits (visit.c), for the backward pass. */
struct tape_kept {
    int site, layer;
    uint32_t group;
    struct gpu_buffer *value; /* [N, d_stride] */
};

struct run_tape {
    uint32_t capacity, first_layer, n_layers;
    int keep_inside;
    /* [n_layers], used from first_layer on; without keep_inside all share the buffers of the last
     * one, except x */
    struct tape_layer *layers;
    /* the backward pass's own memory, [N, stride] each */
    struct gpu_buffer *dx, *dnorm, *draw, *dqkv, *dz, *dgate_up, *dpost;
    struct gpu_buffer *parallel_dx_pre;             /* tape_dx_pre of models with parallel layers */
    struct gpu_buffer *dscores, *capped;            /* grown when needed */
    struct gpu_buffer *metric, *logits, *reference; /* rows of the scalar, grown when needed */
    struct tape_kept *kept;                         /* made when needed, and used again */
    uint32_t n_kept;
    struct gpu_buffer *dots;             /* [N], made when needed */
    const struct run_backward *backward; /* of the call; NULL outside it */
};
/* dx with the gradient through the layer's MLP: dx itself, or in parallel layers beside it. */
static inline struct gpu_buffer *tape_dx_pre(const struct run_tape *tape) {
    return tape->parallel_dx_pre ? tape->parallel_dx_pre : tape->dx;
}
/* What the layer's MLP read. */
static inline struct gpu_buffer *tape_mlp_input(const struct run_tape *tape, int layer) {
    return tape->layers[layer].mid ? tape->layers[layer].mid : tape->layers[layer].x;
}
/* capacity: tokens, at most the work's. */
int run_tape_create(struct run_tape **out, const struct run_work *work, uint32_t capacity,
                    uint32_t first_layer, int keep_inside, struct error *error);
void run_tape_destroy(struct run_tape *tape);
/* Device bytes for rows of up to n_keys tokens, from the facts alone. scratch: see run_sizes. */
uint64_t run_tape_bytes(const struct model_facts *facts, uint64_t scratch, uint32_t capacity,
                        uint32_t n_keys, uint32_t first_layer, int keep_inside);

/* For the forward pass; they do nothing without a tape. begin: sets work->at_*, keeps the layer's
 * input. middle: keeps the MLP's input. */
int tape_layer_begin(struct run_work *work, int layer, struct error *error);
int tape_layer_middle(struct run_work *work, int layer, struct error *error);
int tape_keep_qkv(struct run_work *work, int layer, struct error *error);

/* Keeps the view's values before the group of edits (0: before all edits), for sites of width D. */
int tape_keep_value(struct run_work *work, const struct site_view *view, uint32_t group,
                    struct error *error);
/* Where they lie: [N, d_stride]; 0: they were not kept. */
uint64_t tape_kept_value(const struct run_tape *tape, int site, int layer, uint32_t group);
/* Does the call ask for the scaling gradient of this site? */
const struct run_scaling *tape_scaling(const struct run_work *work, int site, int layer);

/* The scalar of every row whose gradient is taken: sum over its metric tokens of weight x value. */
enum run_metric_kind {
    METRIC_PAIR,
    METRIC_LOG_PROB,
    METRIC_KL,
    METRIC_DIRECTIONAL_KL,
    METRIC_CHOICE /* max(0, margin - weight (logit(a) - logit(b))) + faith KL (choice_grad_params)
                   */
};
struct run_metric {
    enum run_metric_kind kind;
    int capped;             /* logits after the final soft cap; otherwise before it */
    uint32_t n;             /* metric tokens, ascending, none twice */
    const uint32_t *tokens; /* [n] packed index */
    /* PAIR: [n] logit(a) - logit(b); LOG_PROB: [n] a is the target; CHOICE: [n] the two tokens */
    const uint32_t *a, *b;
    const float *weights; /* [n]; CHOICE: the signs */
    float margin, faith;  /* CHOICE */
    /* KL, DIRECTIONAL_KL: normed final rows [n, D] of other runs, on the host, whose
     * logits are the references, */
    const float *reference, *other;
    /* or KL, CHOICE: their logits themselves, after the soft cap [n, V] */
    const float *reference_logits;
    /* out: PAIR: [n, 2] the logits; CHOICE: [n, 2] difference and KL; else [n] the values */
    float *values;
};

/* Of a site of width D: the dot product of every token's value before all edits with the gradient
 * with respect to the value after them, which is the gradient with respect to a factor of the
 * value. Given as it is, [n_out_rows, n_columns], or for every row of the batch as the sum of the
 * values times their dot products [n_rows, D], without the row's first `skip` tokens. */
struct run_scaling {
    int site, layer;
    int sums;
    uint32_t skip;
    float *to;
};

struct run_backward {
    const struct run_metric *metric;
    /* the lowest layer that is differentiated, at least the tape's first; the number of layers,
     * without captures: only the metric's values */
    uint32_t stop_layer;
    /* gradients to capture: as run_batch's captures, in the same output places */
    const struct run_capture *captures;
    uint32_t n_captures;
    const struct run_scaling *scalings;
    uint32_t n_scalings;
};
/* The forward pass of a batch of whole rows, at most work->capacity tokens, with its own captures
 * and logits; then the backward pass. */
int run_differentiate(struct run_work *work, struct run_tape *tape, struct run_cache *cache,
                      const struct run_batch *batch, const struct run_backward *back,
                      struct error *error);

/* metric.c: the values, on the host after a drain; unless values_only, also the gradient with
 * respect to the final norm's output [T, d_stride], in tape->dnorm. */
int metric_gradient(struct run_work *work, struct run_tape *tape, const struct run_metric *metric,
                    int values_only, struct error *error);

#endif
