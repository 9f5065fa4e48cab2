/* The encoder of a sparse autoencoder on the device: the features of many tokens, a tile of tokens
 * times a tile of features at a time, of which only sums or the largest are kept. */
#ifndef VKSTEER_ANALYSIS_ENCODE_H
#define VKSTEER_ANALYSIS_ENCODE_H

#include "model/model.h"

/* How u = x W_enc + bias becomes a feature's activation. */
enum encoder_kind {
    ENCODER_JUMP,   /* u where u > threshold, else 0 */
    ENCODER_GATE,   /* see FEATURE_GATE; the bias is part of it */
    ENCODER_LINEAR, /* u itself: a caller that keeps the k largest has TopK */
    ENCODER_KINDS
};

struct encoder;

/* An encoder without weights yet: n_features features of inputs of `width` floats. rows, columns:
 * the largest tile. ERROR_VALUE for numbers out of range, ERROR_DEVICE where memory is short. */
int encoder_create(struct encoder **out, struct model *model, uint32_t n_features, uint32_t width,
                   uint32_t kind, uint32_t rows, uint32_t columns, struct error *error);
/* The device must be idle; NULL is allowed. */
void encoder_destroy(struct encoder *encoder);
/* Weights of features [first, first + n), rows [n, width]; `first` is a multiple of 32. Waits. */
int encoder_load(struct encoder *encoder, uint32_t first, uint32_t n, const float *rows,
                 struct error *error);
/* Vectors of n_features floats. JUMP: bias and threshold; LINEAR: bias; GATE: gate, scale, bias of
 * feature_act_params, in this order. Others are NULL. Waits. */
int encoder_vectors(struct encoder *encoder, const float *const vectors[3], struct error *error);
/* The sums of the features over segments of tokens, which follow one another: counts[i] rows of x
 * make row i of out [n_segments, n_features]. Each is one chain over the segment's tokens in
 * float32, whatever the tiles are. Waits for the device. */
int encoder_sums(struct encoder *encoder, const float *x, const uint32_t *counts,
                 uint32_t n_segments, float *out, struct error *error);
/* The k largest features of every row of x [n, width], descending, of equal ones the lower index
 * first: values and indices [n, k]. Waits for the device. */
int encoder_top(struct encoder *encoder, const float *x, uint32_t n, uint32_t k, float *values,
                float *indices, struct error *error);

#endif
