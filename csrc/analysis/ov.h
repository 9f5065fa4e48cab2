/* The OV circuit on the device (docs/method.md section 7): what a steering vector adds to the
 * output of every head directly, and the logit lens. */
#ifndef VKSTEER_ANALYSIS_OV_H
#define VKSTEER_ANALYSIS_OV_H

#include "run/run.h"

/* Steering value vectors of layers first_layer .. n_layers - 1: out[l, h, :] = (direction * gain_l)
 * W_V^{g(h)} W_O^h, times the gain of the post-norm if `post` and the model has one. LayerNorm
 * takes the direction without its mean; without a norm before attention there is no gain. direction
 * [D] and out [n, H, D] are host arrays. Reads each W_V and W_O once. Waits for the device.
 * ERROR_VALUE if the layer does not exist. */
int ov_value_vectors(struct run_work *work, const float *direction, uint32_t first_layer, int post,
                     float *out, struct error *error);

/* Vectors at once; a tile of logits then takes 32 MiB. */
#define LENS_ROWS 1024

struct ov_lens {
    const float *vectors;    /* host, [n, D] */
    uint32_t n, k;           /* k from 1 to TOPK_MAX, at most V */
    int cosine;              /* 1: rank by logit / |row of W_U| (0 for a row of zeros) */
    float *values, *indices; /* host, [n, k]: descending; tokens as floats (V is below 2^24) */
};
/* The k largest logits of each vector after the final norm, before any soft cap; of equal ones, the
 * lower token comes first. The biases of the final norm and of the unembedding are left out: a
 * vector of the residual stream is a direction, and they do not depend on it. No array [n, V] is
 * made. Waits for the device. ERROR_VALUE if k is out of range. */
int ov_lens_run(struct run_work *work, const struct ov_lens *lens, struct error *error);

#endif
