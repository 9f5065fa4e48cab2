/* The arguments of all kernels, which C and GLSL both read from here. Addresses (8 bytes) come
 * first, then 4-byte scalars, so that the scalar layout of GLSL agrees with C's own. Each struct
 * has at most 128 bytes, the size of the push constants that every driver offers.
 *
 * T tokens, D width, H query heads, G key/value heads, dh head size, V vocabulary. `stride` counts
 * floats from one token's row to the next. */
#ifndef VKSTEER_PARAMS_H
#define VKSTEER_PARAMS_H

#ifdef VKSTEER_GLSL
#define BLOCK(name) struct name
#define ADDRESS(type) type
#define UINT uint
#else
#include <stdint.h>
#define BLOCK(name) struct name
#define ADDRESS(type) uint64_t
#define UINT uint32_t
#endif

/* One token of a packed batch. */
BLOCK(token_meta) {
    UINT id;   /* vocabulary index */
    UINT pos;  /* counted from the row's own first token */
    UINT slot; /* where its key and value lie in the cache */
    /* packed index of the token whose query is used: this token, or with frozen patterns the base
     * run's */
    UINT q_token;
    UINT k_slot; /* cache slot of position 0 of the row whose keys are used */
    UINT v_slot; /* the same for values */
    UINT row;
    UINT row_end; /* packed index after the row's last token in this chunk */
    UINT angle;   /* row of the rotation tables: pos, or a later one where its row is long */
};

/* the most queries of a row that one workgroup of the attention kernels takes */
#define OP_TILE 8

/* At most OP_TILE consecutive tokens of one row, for one workgroup of the attention kernels. */
BLOCK(query_tile) {
    UINT first; /* packed index of its first token */
    UINT count;
};

#define EMBED_ADD 1 /* dst = add + row, for rows of positions */

/* dst[t, :] = scale * E[id(t), :] for the tokens whose id lies in this segment of the vocabulary.
 * Learned positions: the row is that of the token's position. Picked ids: id(t) is
 * picked[t - t % share], or 0 where that is negative. */
BLOCK(embed_params) {
    ADDRESS(Tokens) tokens;
    ADDRESS(Words) weights;   /* panels, V x D */
    ADDRESS(FloatsOut) dst;   /* [T, stride] */
    ADDRESS(FloatsIn) add;    /* [T, stride] */
    ADDRESS(FloatsIn) picked; /* [T], as pick_params has them */
    UINT n_tokens;
    UINT width;
    UINT stride;
    UINT k_cells;  /* 16-byte cells of k in a row: see linear.comp */
    UINT first_id; /* the first id of this segment of the vocabulary */
    UINT n_ids;
    UINT weight_type; /* WEIGHT_* */
    UINT flags;
    UINT share; /* of picked ids: consecutive tokens that take the first one's id */
    float scale;
};

/* dst[r] = the column of the largest of x[r, :], the first of equal ones; -1 where a value is not
 * finite, or x[r, 0] is `empty` within +-near. */
BLOCK(pick_params) {
    ADDRESS(FloatsIn) x;    /* [n, x_stride] */
    ADDRESS(FloatsOut) dst; /* [n], whole numbers below 2^24, as floats */
    UINT width;
    UINT x_stride;
    float empty;
    float near;
};

#define WEIGHT_F32 0
#define WEIGHT_BF16 1
#define WEIGHT_F16 2
#define WEIGHT_PARTS 3 /* of kernels alone: float16 parts of float32 rows, see params_matrix.h */

#define NORM_KIND_RMS 0
#define NORM_KIND_LAYER 1 /* LayerNorm: the mean is subtracted */
#define NORM_KIND_NONE 2  /* the input of a layer without pre-norms */

/* norm of q and k before rotation */
#define QK_NORM_NONE 0
#define QK_NORM_HEAD 1  /* RMS over each head, one gain [dh] for all heads */
#define QK_NORM_WIDE 2  /* RMS over all heads together, gain [H * dh] or [G * dh] */
#define QK_NORM_LAYER 3 /* LayerNorm over each head, gain [H * dh] or [G * dh] */

#define NORM_WRITE_NORMALIZED 1
#define NORM_WRITE_SCALE 2
#define NORM_ADD 4              /* dst = add + norm: a post-norm and the residual */
#define NORM_READ_SCALE 8       /* the scale was edited: read it */
#define NORM_READ_NORMALIZED 16 /* the normalised value was edited: read it */
#define NORM_ROWS 32            /* row r reads token rows[r] */
#define NORM_NO_OUT 64
#define NORM_LAYER 128  /* LayerNorm: the mean is subtracted first */
#define NORM_BIAS 256   /* LayerNorm only: out = normalized * gain + bias */
#define NORM_DECODE 512 /* sums in the order of the fused kernels of decoding on GPUs */

/* RMS norm: scale = sqrt(mean x^2 + eps), normalized = x / scale, out = normalized * gain.
 * LayerNorm: the same of x - mean x, and of n_groups parts of a row, each `width` wide, by
 * themselves: a norm of every head. */
BLOCK(norm_params) {
    ADDRESS(FloatsIn) x;
    ADDRESS(FloatsIn) gain; /* [n_groups * width] */
    ADDRESS(FloatsOut) dst;
    ADDRESS(FloatsOut) normalized;
    ADDRESS(FloatsOut) scale; /* [T, n_groups] */
    ADDRESS(FloatsIn) add;
    ADDRESS(Words) rows;
    ADDRESS(FloatsIn) bias; /* [n_groups * width] */
    UINT width;
    UINT stride;
    UINT flags;
    UINT n_groups; /* NORM_LAYER; 0: one */
    float eps;
};

#define LINEAR_BIAS 1
#define LINEAR_ADD 2 /* dst = add + result: the residual stream */
#define LINEAR_SOFTCAP 4
#define LINEAR_NORM 8   /* x is RMS-normalised first: few rows, software drivers */
#define LINEAR_SCALE 16 /* the sum is multiplied by `scale`, before the bias */
#define LINEAR_CLIP 32  /* the sum with its bias is clamped to +-clip */
#define LINEAR_ACT 64   /* in linear_decode, the result is act(...) */
#define LINEAR_NORM_BIAS 128
#define LINEAR_GATE 256 /* in linear_decode, an output has two rows of W */

/* dst[m, n] = sum_k x[m, k] W[n, k] (* scale) (+ bias) (+ add): one chain over ascending k for
 * every output. */
BLOCK(linear_params) {
    ADDRESS(Inputs) x;       /* [M, x_stride] */
    ADDRESS(Panels) weights; /* panels of 32 rows */
    ADDRESS(FloatsOut) dst;  /* [M, out_stride], already offset to the first column */
    ADDRESS(FloatsIn) bias;  /* [N] */
    ADDRESS(FloatsIn) add;   /* [M, out_stride] */
    ADDRESS(FloatsIn) gain;  /* [K] */
    UINT n_rows;             /* M */
    UINT n_out;              /* columns to write */
    UINT k_cells;            /* cells of k to sum over */
    UINT panel_cells;        /* cells of k in a panel */
    UINT first_cell;         /* first cell of k in a panel, for a slice of the inputs */
    UINT x_stride;
    UINT out_stride;
    UINT flags;
    float softcap;
    UINT width; /* K without its padding */
    float eps;
    float scale;
    float clip;
};

#define PAIRS_GATE 0 /* dst[m, i] = act(first) * second */
/* [q | k | v] of heads: q rotated into dst, k rotated and v into the cache */
#define PAIRS_ROTATE 1

/* A product of the RMS-normalised x whose outputs n and n + half are finished together, by the
 * arithmetic of act.comp or rope.comp. For few rows on software drivers: see linear.comp. */
BLOCK(linear_pairs_params) {
    ADDRESS(Inputs) x;        /* [M, x_stride] */
    ADDRESS(Panels) weights;  /* panels of 32 rows */
    ADDRESS(FloatsOut) dst;   /* GATE: [M, out_stride]; ROTATE: q in [M, out_stride] */
    ADDRESS(FloatsIn) bias;   /* [N] */
    ADDRESS(FloatsIn) gain;   /* [K] */
    ADDRESS(FloatsIn) angles; /* ROTATE: this and the next three as in rope_params */
    ADDRESS(Tokens) tokens;   /* [M] */
    ADDRESS(FloatsOut) k_cache;
    ADDRESS(FloatsOut) v_cache;
    UINT n_rows;
    UINT n_out; /* pairs: N / 2 */
    UINT half_; /* GATE: N / 2; ROTATE: dh / 2 */
    UINT k_cells;
    UINT panel_cells;
    UINT x_stride;
    UINT out_stride;
    UINT flags; /* LINEAR_BIAS, LINEAR_NORM */
    UINT width;
    float eps;
    UINT kind;    /* PAIRS_* */
    UINT act;     /* GATE */
    UINT n_heads; /* ROTATE */
    UINT n_kv_heads;
};

#define ROPE_QK_NORM 1
#define ROPE_ROTATE 2
#define ROPE_STORE 4       /* write k and v into the cache */
#define ROPE_INTERLEAVED 8 /* channels (2i, 2i + 1) are a pair, not (i, i + d_rot/2) */

/* In place on [q | k | v] rows: RMS norm per head, rotation of the first d_rot channels of a head,
 * and a copy of k and v into the cache. */
BLOCK(rope_params) {
    ADDRESS(FloatsInOut) qkv;
    ADDRESS(FloatsIn) angles;   /* [rows, d_rot/2, (cos, sin)], of keys */
    ADDRESS(FloatsIn) q_angles; /* of queries, which may have a factor of their own */
    ADDRESS(Tokens) tokens;
    ADDRESS(FloatsIn) q_gain;
    ADDRESS(FloatsIn) k_gain;
    ADDRESS(FloatsOut) k_cache; /* [slot, G * dh] */
    ADDRESS(FloatsOut) v_cache;
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
    UINT d_rot;
    UINT stride;
    UINT flags;
    float eps;
};

/* scores[t, h, j] = cap(scale * q . k_j) for keys j <= pos(t). */
BLOCK(scores_params) {
    ADDRESS(FloatsIn) qkv;
    ADDRESS(FloatsIn) k_cache;
    ADDRESS(Tokens) tokens;
    ADDRESS(Tiles) tiles;
    ADDRESS(FloatsOut) scores; /* [T', H, key_stride], T' counted from token first_token */
    UINT first_token;
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
    UINT stride;
    UINT key_stride;
    float scale;
    float softcap; /* 0: none */
    UINT decode;   /* 1: sums in the order of attn_decode and attn_step: not on matrix units */
};

/* In place: softmax over the keys that a query sees. The keys before its window and the up to
 * OP_TILE - 1 keys after it that its tile computed become 0. */
BLOCK(softmax_params) {
    ADDRESS(FloatsInOut) scores;
    ADDRESS(Tokens) tokens;
    UINT first_token;
    UINT n_heads;
    UINT key_stride;
    UINT window; /* 0: full */
    UINT decode; /* 1: sums in the order of attn_step */
};

/* z[t, h, :] = sum_j pattern[t, h, j] v_j. */
BLOCK(attn_output_params) {
    ADDRESS(FloatsIn) pattern;
    ADDRESS(FloatsIn) v_cache;
    ADDRESS(Tokens) tokens;
    ADDRESS(Tiles) tiles;
    ADDRESS(FloatsOut) z; /* [T, z_stride] */
    UINT first_token;
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
    UINT z_stride;
    UINT key_stride;
    UINT window;
    UINT decode; /* as in scores_params */
};

/* The three steps above for single tokens: see attn_decode.comp. */
BLOCK(decode_params) {
    ADDRESS(FloatsIn) qkv;
    ADDRESS(FloatsIn) k_cache;
    ADDRESS(FloatsIn) v_cache;
    ADDRESS(Tokens) tokens;
    ADDRESS(FloatsInOut) scores;
    ADDRESS(FloatsOut) z;
    UINT first_token;
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
    UINT stride;
    UINT z_stride;
    UINT key_stride;
    UINT window;
    float scale;
    float softcap;
};

#define ACT_SILU 0
#define ACT_GELU_TANH 1
#define ACT_GELU 2
#define ACT_RELU 3
#define ACT_RELU2 4 /* relu squared */

/* dst[t, i] = act(gate[t, i]) * up[t, i], or dst[t, i] = act(up[t, i]) where there is no gate. */
BLOCK(act_params) {
    ADDRESS(FloatsIn) gate_up; /* [T, in_stride]: gate at 0, up at width; or up alone */
    ADDRESS(FloatsOut) dst;    /* [T, out_stride] */
    UINT width;
    UINT in_stride;
    UINT out_stride;
    UINT act;
    UINT plain; /* 1: there is no gate */
};

#define EDIT_SET 0
#define EDIT_ADD 1
#define EDIT_SCALE 2
#define EDIT_ABLATE 3     /* x -= u (u . x), where the operand u has unit length */
#define EDIT_ADD_SCALED 4 /* x += operand / scale[token]: ablation of a normalised value */
#define EDIT_DYNAMIC 5    /* x *= 1 + coefficient (operand . x): op_scale_dynamic, not op_edit */
#define EDIT_KEYS 1       /* flag: a site over keys; keys that the query does not see stay masked */

BLOCK(edit_entry) {
    UINT token;   /* packed index, counted from the view's first token */
    UINT operand; /* first float of its operand */
    float coefficient;
    UINT spare;
};

/* x[token, head, i] is changed by operand[entry.operand + head_ordinal * head_step + i * step]. */
BLOCK(edit_params) {
    ADDRESS(FloatsInOut) x;
    ADDRESS(EditEntries) entries;
    ADDRESS(FloatsIn) operand;
    ADDRESS(Words) heads;    /* which heads, one workgroup column each */
    ADDRESS(FloatsIn) scale; /* EDIT_ADD_SCALED: [T] */
    /* EDIT_KEYS: for positions, already offset to the view's first token */
    ADDRESS(Tokens) tokens;
    UINT token_stride;
    UINT head_stride;
    UINT width;
    UINT head_step;
    UINT step; /* 0: one value for all, else 1 */
    UINT kind;
    UINT flags;
    UINT window; /* EDIT_KEYS: keys before it stay masked; 0: none */
};

#define COPY_ROWS 1 /* row r reads source row rows[r] */
#define COPY_ADD 2  /* dst = add + copied */

/* dst[r, 0:width] = x[r, 0:width] (+ add[r]). */
BLOCK(copy_params) {
    ADDRESS(FloatsIn) x;
    ADDRESS(FloatsOut) dst;
    ADDRESS(Words) rows;
    ADDRESS(FloatsIn) add;
    UINT n_rows;
    UINT width;
    UINT x_stride;
    UINT out_stride;
    UINT flags;
};

/* x = clamp(x, -limit, limit), in place. */
BLOCK(clip_params) {
    ADDRESS(FloatsInOut) x; /* [T, stride] */
    UINT width;
    UINT stride;
    float limit;
};

/* dst[t, i] = sum over heads of x[t, head, i] (+ bias[i]). */
BLOCK(sum_heads_params) {
    ADDRESS(FloatsIn) x;
    ADDRESS(FloatsOut) dst;
    ADDRESS(FloatsIn) bias;
    UINT n_heads;
    UINT width;
    UINT head_stride;
    UINT out_stride;
    UINT has_bias;
};

/* dst[h, n] = scale sum_i x[h / group, i] W[n, h * d_head + i] (* gain[n]): one vector for each
 * key/value head, multiplied by the part of W_O of each of its query heads. */
BLOCK(head_out_params) {
    ADDRESS(FloatsIn) x;     /* [n_heads / group, d_head] */
    ADDRESS(Panels) weights; /* panels of 32 rows */
    ADDRESS(FloatsOut) dst;  /* [n_heads, out_stride], already offset to the first column */
    ADDRESS(FloatsIn) gain;  /* [N] */
    UINT n_heads;
    UINT group; /* query heads that share a key/value head */
    UINT d_head;
    UINT heads_each;  /* heads that a workgroup takes in turn */
    UINT n_out;       /* columns to write */
    UINT panel_cells; /* cells of k in a panel */
    UINT out_stride;
    UINT has_gain;
    float scale;
};

/* dst[n] = 1 / |W[n, :]|, or 0 for a row of zeros. */
BLOCK(row_norms_params) {
    ADDRESS(Panels) weights;
    ADDRESS(FloatsOut) dst; /* [N], already offset to the first row */
    UINT n_out;
    UINT panel_cells;
};

#define TOPK_BEGIN 1  /* the lists are empty and are not read */
#define TOPK_SCALED 2 /* column c counts as x * factor[c] */
#define TOPK_MAX 512  /* the longest list */

/* Merges columns first, first + 1, ... of every row into its list of the k largest values, which is
 * in descending order; equal values are in ascending order of their index. */
BLOCK(topk_params) {
    ADDRESS(FloatsIn) x;          /* [n_rows, x_stride], the first of n_columns columns */
    ADDRESS(FloatsIn) factor;     /* [n_columns] */
    ADDRESS(FloatsInOut) values;  /* [n_rows, k] */
    ADDRESS(FloatsInOut) indices; /* [n_rows, k], whole numbers below 2^24, as floats */
    UINT n_rows;
    UINT n_columns;
    UINT x_stride;
    UINT first;
    UINT k;
    UINT flags;
};

/* Activations of a sparse autoencoder's features, in place on u = x W_enc. */
#define FEATURE_JUMP 0 /* u where u > threshold, else 0 */
#define FEATURE_GATE 1 /* max(u * scale + bias, 0) where u + gate > 0, else 0 */
BLOCK(feature_act_params) {
    ADDRESS(FloatsInOut) x;      /* [T, stride] */
    ADDRESS(FloatsIn) threshold; /* JUMP: [width] */
    ADDRESS(FloatsIn) gate;      /* GATE: this and the next two, [width] */
    ADDRESS(FloatsIn) scale;
    ADDRESS(FloatsIn) bias;
    UINT width;
    UINT stride;
    UINT kind; /* FEATURE_* */
};

#define FEATURE_COLUMNS 256 /* columns that a workgroup of these two ops takes */

/* sums[row, i] += sum over the tokens of a segment of x[t, i]: one chain over ascending t. */
BLOCK(feature_sums_params) {
    ADDRESS(FloatsIn) x;       /* [T, x_stride] */
    ADDRESS(Words) segments;   /* [n_segments, 3]: first token, tokens, row of sums */
    ADDRESS(FloatsInOut) sums; /* [rows, out_stride], already offset to the first column */
    UINT width;
    UINT x_stride;
    UINT out_stride;
};

/* Reads n_cells cells of 16 bytes; every subgroup reads cells_each of them. */
BLOCK(read_params) {
    ADDRESS(Panels) x;
    ADDRESS(FloatsOut) dst; /* one float */
    UINT n_cells;
    UINT cells_each;
};

#include "params_decode.h"
#include "params_backward.h"
#include "params_attribution.h"
#include "params_circuit.h"
#include "params_scaling.h"
#include "params_matrix.h"

#endif
