/* Arguments of the kernels of decoding on GPUs; a part of params.h, which includes it. */
#ifndef VKSTEER_PARAMS_DECODE_H
#define VKSTEER_PARAMS_DECODE_H

/* lanes of a workgroup of these kernels, and of the separate kernels that sum in their order */
#define DECODE_WORKGROUP 256

#define FINISH_PLAIN 0 /* dst[m, n] = result n */
#define FINISH_ACT 1   /* dst[m, n] = act(result n) */
#define FINISH_GATE 2  /* dst[m, n] = act(result n) * result (n + N / 2) */

/* The product of linear_params for the few rows of decoding: y = norm(x) W^T (* scale) (+ bias)
 * (clamped) (capped), then act (FINISH_*), then (+ add). */
BLOCK(linear_decode_params) {
    ADDRESS(Vec4sIn) x;         /* [M, x_stride] */
    ADDRESS(FloatsIn) x_floats; /* the same memory */
    ADDRESS(Panels) weights;    /* panels of 32 rows */
    ADDRESS(FloatsOut) dst;     /* [M, out_stride], already offset to the first column */
    ADDRESS(FloatsIn) bias;     /* [N] */
    ADDRESS(FloatsIn) add;      /* [M, out_stride] */
    ADDRESS(Vec4sIn) gain;      /* [K] */
    ADDRESS(Vec4sIn) norm_bias; /* [K] */
    UINT n_rows;                /* M */
    UINT n_out;                 /* columns to write */
    UINT k_cells;               /* cells of k to sum over */
    UINT panel_cells;           /* cells of k in a panel */
    UINT first_cell;            /* first cell of k in a panel, for a slice of the inputs */
    UINT x_stride;
    UINT out_stride;
    UINT flags; /* LINEAR_BIAS, _ADD, _SOFTCAP, _SCALE, _CLIP, _ACT, _NORM_BIAS */
    UINT lanes; /* along columns, 8 or 32; the others split k */
    UINT width; /* K without its padding */
    UINT act;   /* ACT_* */
    float eps;
    float scale;
    float clip;
    float softcap;
};

/* The same with FINISH_GATE for the stream after a sublayer with a post-norm, which it writes, too:
 * mid = x + (RMS norm of out) post_gain, y = norm(mid) W^T and so on. */
BLOCK(linear_decode_post_params) {
    ADDRESS(Vec4sIn) x;         /* [M, x_stride] the residual stream before the sublayer */
    ADDRESS(Vec4sIn) out_;      /* [M, x_stride] the sublayer's output */
    ADDRESS(Vec4sIn) post_gain; /* [K] */
    ADDRESS(FloatsOut) mid;     /* [M, x_stride] */
    ADDRESS(Panels) weights;
    ADDRESS(FloatsOut) dst;
    ADDRESS(FloatsIn) bias;
    ADDRESS(Vec4sIn) gain;
    UINT n_rows;
    UINT n_out;
    UINT k_cells;
    UINT panel_cells;
    UINT x_stride;
    UINT out_stride;
    UINT flags;
    UINT lanes;
    UINT width;
    UINT act;
    float eps;
    float scale;
    float clip;
    float softcap;
};

#define STEP_ROTATE 1      /* queries and the present key are rotated */
#define STEP_INTERLEAVED 2 /* channels (2i, 2i + 1) are a pair, not (i, i + d_rot/2) */
#define STEP_STORE 4       /* the present key and value come from qkv and go into the cache */
#define STEP_NORM_HEAD 8   /* before the rotation: RMS norm of each head, gain [dh] */
#define STEP_NORM_WIDE 16  /* RMS norm of all heads together, gain [H * dh] or [G * dh] */
#define STEP_NORM_LAYER 32 /* LayerNorm of each head, gain [H * dh] or [G * dh] */
#define STEP_NORM_BIAS 128 /* LayerNorm: [gain | bias] for a gain, one right behind the other */
#define STEP_PATTERN 64    /* `scores` holds the pattern: only z is computed */

/* the largest head that attn_step takes; head sizes are multiples of 4 */
#define STEP_D_HEAD_MAX 256

/* z[t, h, :] = sum_j softmax_j(cap(scale * q . k_j)) v_j for single tokens, after the norm and
 * rotation of q and of the present key. Tokens are counted from `tokens`, rows of z and scores
 * with them; token.q_token names a row of qkv. Without STEP_STORE the cache holds the present key
 * and value, too. */
BLOCK(attn_step_params) {
    ADDRESS(FloatsIn) qkv;  /* [rows, stride]: q, k, v of all heads */
    ADDRESS(Vec4s) k_cache; /* [slot, G * dh] */
    ADDRESS(Vec4s) v_cache;
    ADDRESS(Tokens) tokens;      /* [T] */
    ADDRESS(FloatsInOut) scores; /* [T, H, key_stride] */
    ADDRESS(FloatsOut) z;        /* [T, z_stride] */
    ADDRESS(FloatsIn) angles;    /* as in rope_params */
    ADDRESS(FloatsIn) q_angles;
    ADDRESS(FloatsIn) q_gain;
    ADDRESS(FloatsIn) k_gain;
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
    UINT d_rot;
    UINT stride;
    UINT z_stride;
    UINT key_stride;
    UINT window; /* 0: full */
    UINT flags;
    float scale;
    float softcap; /* 0: none */
    float eps;
};

#endif
