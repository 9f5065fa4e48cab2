/* The OV circuit on the device: what steering adds to every head, and what vectors say through the
 * unembedding (method.md section 7). */
#ifndef VKSTEER_ANALYSIS_OV_H
#define VKSTEER_ANALYSIS_OV_H

#include "run/run.h"

/* out[l, h, :] = (direction * gain_l) W_V^{g(h)} W_O^h [* post gain_l] for layers first_layer ..
 * n_layers - 1; host arrays [D] and [n, H, D]. post: with the post-norm's gain where the model has
 * one. Reads each W_V and W_O once. */
int ov_value_vectors(struct run_work *work, const float *direction, uint32_t first_layer, int post,
                     float *out, struct error *error);

struct ov_lens {
    const float *vectors;    /* host, [n, D] */
    uint32_t n, k;           /* k from 1 to TOPK_MAX, at most V */
    int cosine;              /* rank by logit / |row of W_U|, not by logit; a row of zeros has 0 */
    float *values, *indices; /* host, [n, k]: falling; tokens as whole floats (V is below 2^24) */
};
/* The k largest logits of each vector after the final norm, before any softcap; equal ones by the
 * lower token. No [n, V] is ever whole. */
int ov_lens_run(struct run_work *work, const struct ov_lens *lens, struct error *error);

#endif
