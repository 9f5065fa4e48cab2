/* Arguments of the kernels of the backward pass; a part of params.h, which includes it. */
#ifndef VKSTEER_PARAMS_BACKWARD_H
#define VKSTEER_PARAMS_BACKWARD_H

/* --- backward: gradients of a scalar with respect to activations; the weights have none. A name
 * with d in front is the gradient with respect to what the name means --- */

/* dx[m, k] = sum_n dy[m, n] W[n, k] (LINEAR_ADD: + dx[m, k]): one chain over ascending n, on the
 * panels of the forward product. LINEAR_SCALE: all of this times `scale`. */
BLOCK(linear_bwd_params) {
    ADDRESS(Inputs) dy; /* [M, y_stride], pad columns zero */
    ADDRESS(Panels) weights;
    ADDRESS(FloatsInOut) dx; /* [M, x_stride] */
    UINT n_rows;             /* M */
    UINT n_sum;              /* rows of W to sum over, padded to 16 */
    UINT first_n;            /* the first of them, a multiple of 16 */
    UINT n_cells;            /* 16-byte cells of k whose columns are written */
    UINT first_cell;
    UINT panel_cells;
    UINT y_stride;
    UINT x_stride;
    UINT flags;
    float scale;
};

#define NORM_BWD_ADD 1        /* dx = add + ... */
#define NORM_BWD_NORMALIZED 2 /* dy is with respect to the normalised value, before the gain */
#define NORM_BWD_WRITE_NORMALIZED 4
#define NORM_BWD_WRITE_SCALE 8
#define NORM_BWD_NO_OUT 16
#define NORM_BWD_ROWS 32  /* row r reads x of token rows[r] */
#define NORM_BWD_LAYER 64 /* of LayerNorm */

/* Backward of the RMS norm: with scale = sqrt(mean x^2 + eps), n = x / scale, dn = dy * gain:
 * dscale = -(dn . n) / scale, dx = dn / scale - n (dn . n) / (D scale). Backward of LayerNorm:
 * scale and n are those of x - mean x, and dx = (dn - mean dn) / scale - n (dn . n) / (D scale).
 * Its n_groups parts of a row are as in norm_params. */
BLOCK(norm_bwd_params) {
    ADDRESS(FloatsIn) x;
    ADDRESS(FloatsIn) gain;
    ADDRESS(FloatsIn) dy;
    ADDRESS(FloatsOut) dx;
    ADDRESS(FloatsIn) add;
    ADDRESS(FloatsOut) dnormalized;
    ADDRESS(FloatsOut) dscale; /* [T, n_groups] */
    ADDRESS(Words) rows;
    UINT width;
    UINT stride;
    UINT flags;
    UINT n_groups; /* NORM_BWD_LAYER; 0: one */
    float eps;
};

/* In place on d: 0 where |x| is larger than limit, so that a clamp to +-limit moved it. */
BLOCK(clip_bwd_params) {
    ADDRESS(FloatsIn) x;    /* [T, stride] before the clamp */
    ADDRESS(FloatsInOut) d; /* [T, stride] */
    UINT width;
    UINT stride;
    float limit;
};

/* dgate = dpost * up * act'(gate), dup = dpost * act(gate); without a gate dup = dpost * act'(up).
 */
BLOCK(act_bwd_params) {
    ADDRESS(FloatsIn) gate_up;   /* [T, in_stride] */
    ADDRESS(FloatsIn) dpost;     /* [T, out_stride] */
    ADDRESS(FloatsOut) dgate_up; /* [T, in_stride] */
    UINT width;
    UINT in_stride;
    UINT out_stride;
    UINT act;
    UINT plain; /* 1: there is no gate */
};

/* In place on dpattern: the gradient with respect to q . k,
 * dscores = pattern * (dpattern - sum_j pattern dpattern) * scale * (1 - (score / softcap)^2).
 * It is 0 where the forward softmax writes 0. */
BLOCK(softmax_bwd_params) {
    ADDRESS(FloatsIn) pattern; /* [T', H, key_stride] */
    ADDRESS(FloatsInOut) dpattern;
    ADDRESS(FloatsIn) scores; /* after the soft cap; 0 without one */
    ADDRESS(Tokens) tokens;
    UINT first_token;
    UINT n_heads;
    UINT key_stride;
    UINT window;
    float scale;
    float softcap;
};

/* head columns of a lane of attn_output_bwd, at `lanes` lanes of a subgroup */
#define ATTN_OUTPUT_BWD_RN(lanes) ((lanes) <= 16 ? 4u : (lanes) == 32 ? 2 : 1)

/* sums[j, g, :] (+)= sum over queries t >= j of j's row and heads h of group g of
 * a[t, h, j] y[t, h, :]: the gradient of the values from pattern and dz, and of the keys from
 * dscores and q. One chain over ascending (t, h). */
BLOCK(attn_output_bwd_params) {
    ADDRESS(FloatsIn) a; /* [T', H, key_stride], T' counted from token first_token */
    ADDRESS(FloatsIn) y; /* [T, y_stride] */
    ADDRESS(Tokens) tokens;
    ADDRESS(Tiles) tiles;      /* of keys; the chunk holds whole rows */
    ADDRESS(FloatsInOut) sums; /* [T, out_stride], already offset to the first column */
    UINT first_token;
    UINT last_token; /* queries [first_token, last_token) are in `a` */
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
    UINT y_stride;
    UINT out_stride;
    UINT key_stride;
    UINT window;
    UINT add; /* 1: sums holds the sum over earlier queries */
};

/* In place on [dq | dk | dv] rows: the rotation is undone, then comes the backward of the norm per
 * head (ROPE_QK_NORM). */
BLOCK(rope_bwd_params) {
    ADDRESS(FloatsInOut) dqkv;
    ADDRESS(FloatsIn) qkv; /* before norm and rotation */
    ADDRESS(FloatsIn) angles;
    ADDRESS(FloatsIn) q_angles;
    ADDRESS(Tokens) tokens;
    ADDRESS(FloatsIn) q_gain;
    ADDRESS(FloatsIn) k_gain;
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
    UINT d_rot;
    UINT stride;
    UINT flags; /* ROPE_QK_NORM, ROPE_ROTATE, ROPE_INTERLEAVED */
    float eps;
};

/* For row r of `normed`: its logits a and b, and dnormed = weight (a' W[a] - b' W[b]), where a' and
 * b' are the slopes of the soft cap. */
BLOCK(pair_grad_params) {
    ADDRESS(FloatsIn) normed;   /* [n, stride] */
    ADDRESS(FloatsIn) rows;     /* [2n, stride]: W[a] of row r at 2r, W[b] at 2r + 1 */
    ADDRESS(FloatsIn) weights;  /* [n] */
    ADDRESS(FloatsOut) dnormed; /* [n, stride] */
    ADDRESS(FloatsOut) logits;  /* [n, 2] after the soft cap */
    ADDRESS(FloatsIn) bias;     /* [V] of the unembedding, */
    ADDRESS(Tokens) ids;        /* [2n] where id is a or b */
    UINT has_bias;              /* 0: these two are not read */
    UINT width;
    UINT stride;
    float softcap;
};

#define LOGIT_GRAD_LOG_PROB 0       /* log p(target) */
#define LOGIT_GRAD_KL 1             /* KL(reference || x) */
#define LOGIT_GRAD_DIRECTIONAL_KL 2 /* KL(other || x) - KL(reference || x) */

/* In place: the logits of row r, before the soft cap, become weight * d(value) / d(logit before the
 * cap); values[r] is the scalar itself, without its weight. */
BLOCK(logit_grad_params) {
    ADDRESS(FloatsInOut) logits; /* [n, stride]; pad columns become zero */
    ADDRESS(FloatsIn) reference; /* logits of other runs */
    ADDRESS(FloatsIn) other;
    ADDRESS(Words) targets;    /* [n] */
    ADDRESS(FloatsIn) weights; /* [n] */
    ADDRESS(FloatsOut) values; /* [n] */
    UINT width;
    UINT stride;
    UINT kind;
    float softcap;           /* of `logits`; 0: none, or not applied */
    float reference_softcap; /* of `reference` and `other`; 0: none, or already applied */
};

#endif
