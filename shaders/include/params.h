/* Arguments of all kernels, read by C and by GLSL, so that none is typed twice. Addresses
 * first (8 bytes), then 4-byte scalars: the scalar layout of GLSL and C's own then agree. At most
 * 128 bytes each (push constants of the strictest driver).
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
    UINT pos;  /* from the row's own first token */
    UINT slot; /* where its key and value lie in the cache */
    /* packed index of the token whose query is used (itself, or the base run's when
     * patterns are frozen) */
    UINT q_token;
    UINT k_slot; /* cache slot of position 0 of the row whose keys are used */
    UINT v_slot; /* the same for values */
    UINT row;
    UINT row_end; /* packed index after the row's last token in this chunk */
};

/* A run of at most 8 tokens of one row: what one workgroup of the attention kernels works on. */
BLOCK(query_tile) {
    UINT first; /* packed index of its first token */
    UINT count;
};

BLOCK(embed_params) {
    ADDRESS(Tokens) tokens;
    ADDRESS(Words) weights; /* panels, V x D */
    ADDRESS(FloatsOut) dst; /* [T, stride] */
    UINT n_tokens;
    UINT width;
    UINT stride;
    UINT k_cells;  /* 16-byte cells of k a row: see linear.comp */
    UINT first_id; /* this chunk of the vocabulary starts here */
    UINT n_ids;
    UINT weight_type; /* WEIGHT_* */
    float scale;
};

#define WEIGHT_F32 0
#define WEIGHT_BF16 1
#define WEIGHT_F16 2

#define NORM_WRITE_NORMALIZED 1
#define NORM_WRITE_SCALE 2
#define NORM_ADD 4              /* dst = add + norm: a post-norm with its residual */
#define NORM_READ_SCALE 8       /* the scale was edited: use it */
#define NORM_READ_NORMALIZED 16 /* the normalised value was edited: only the gain is left to do */
#define NORM_ROWS 32            /* row r reads token rows[r] */
#define NORM_NO_OUT 64

/* RMS norm: scale = sqrt(mean x^2 + eps), normalized = x / scale, out = normalized * gain. */
BLOCK(norm_params) {
    ADDRESS(FloatsIn) x;
    ADDRESS(FloatsIn) gain;
    ADDRESS(FloatsOut) dst;
    ADDRESS(FloatsOut) normalized;
    ADDRESS(FloatsOut) scale; /* [T] */
    ADDRESS(FloatsIn) add;
    ADDRESS(Words) rows;
    UINT width;
    UINT stride;
    UINT flags;
    float eps;
};

#define LINEAR_BIAS 1
#define LINEAR_ADD 2 /* dst = add + result: the residual stream */
#define LINEAR_SOFTCAP 4
#define LINEAR_NORM 8 /* the input is RMS-normalised on the way in: few rows, software drivers */

/* dst[m, n] = sum_k in[m, k] W[n, k] (+ bias) (+ add): one sequential chain over
 * ascending k for every output. */
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
    UINT first_cell;         /* first cell of k in a panel: a slice of the inputs */
    UINT x_stride;
    UINT out_stride;
    UINT flags;
    float softcap;
    UINT width; /* K without its pad */
    float eps;
};

#define PAIRS_GATE 0 /* dst[m, i] = act(first) * second */
/* [q | k | v] of heads: q rotated into dst, k rotated and v into the cache */
#define PAIRS_ROTATE 1

/* A product whose outputs meet in pairs (n, n + half), each input RMS-normalised on the way in:
 * what act.comp or rope.comp would make of it. Few rows, software drivers: see linear.comp. */
BLOCK(linear_pairs_params) {
    ADDRESS(Inputs) x;        /* [M, x_stride] */
    ADDRESS(Panels) weights;  /* panels of 32 rows */
    ADDRESS(FloatsOut) dst;   /* GATE: [M, out_stride]; ROTATE: q in [M, out_stride] */
    ADDRESS(FloatsIn) bias;   /* [N] */
    ADDRESS(FloatsIn) gain;   /* [K] */
    ADDRESS(FloatsIn) angles; /* ROTATE: as rope_params, and what follows */
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
#define ROPE_STORE 4 /* write k and v into the cache */

/* In place on [q | k | v] rows: RMS norm per head, half-split rotation, then
 * store into the cache. */
BLOCK(rope_params) {
    ADDRESS(FloatsInOut) qkv;
    ADDRESS(FloatsIn) angles; /* [positions, dh/2, (cos, sin)] */
    ADDRESS(Tokens) tokens;
    ADDRESS(FloatsIn) q_gain;
    ADDRESS(FloatsIn) k_gain;
    ADDRESS(FloatsOut) k_cache; /* [slot, G * dh] */
    ADDRESS(FloatsOut) v_cache;
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
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
};

/* In place: softmax over the keys that a query sees; zeros before its window and for a tile's
 * worth of keys after it. */
BLOCK(softmax_params) {
    ADDRESS(FloatsInOut) scores;
    ADDRESS(Tokens) tokens;
    UINT first_token;
    UINT n_heads;
    UINT key_stride;
    UINT window; /* 0: full */
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
};

/* The three steps above for tiles of one token. */
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

BLOCK(act_params) {
    ADDRESS(FloatsIn) gate_up; /* [T, in_stride]: gate at 0, up at width */
    ADDRESS(FloatsOut) dst;    /* [T, out_stride] */
    UINT width;
    UINT in_stride;
    UINT out_stride;
    UINT act;
};

#define EDIT_SET 0
#define EDIT_ADD 1
#define EDIT_SCALE 2
#define EDIT_ABLATE 3     /* x -= u (u . x), u the operand, of unit length */
#define EDIT_ADD_SCALED 4 /* x += operand / scale[token]: ablations of what a norm lets through */
#define EDIT_KEYS 1       /* flag: a site over keys; what the query does not see stays masked */

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

/* dst[h, n] = sum_i x[h / group, i] W[n, h * d_head + i] (* gain[n]): one vector per key/value head
 * through every query head's part of W_O. */
BLOCK(head_out_params) {
    ADDRESS(FloatsIn) x;     /* [n_heads / group, d_head] */
    ADDRESS(Panels) weights; /* panels of 32 rows */
    ADDRESS(FloatsOut) dst;  /* [n_heads, out_stride], already offset to the first column */
    ADDRESS(FloatsIn) gain;  /* [N] */
    UINT n_heads;
    UINT group; /* query heads that share a key/value head */
    UINT d_head;
    UINT heads_each;  /* heads that a workgroup takes one after the other */
    UINT n_out;       /* columns to write */
    UINT panel_cells; /* cells of k in a panel */
    UINT out_stride;
    UINT has_gain;
};

/* dst[n] = 1 / |W[n, :]|, 0 for a row of zeros. */
BLOCK(row_norms_params) {
    ADDRESS(Panels) weights;
    ADDRESS(FloatsOut) dst; /* [N], already offset to the first row */
    UINT n_out;
    UINT panel_cells;
};

#define TOPK_BEGIN 1  /* the lists are empty: what they hold is not read */
#define TOPK_SCALED 2 /* column c counts as x * factor[c] */
#define TOPK_MAX 512  /* the longest list */

/* Merges columns first, first + 1, ... of every row into its list of the k largest, which falls;
 * equal values stand by index. */
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

/* Reads n_cells of 16 bytes, cells_each by every subgroup. */
BLOCK(read_params) {
    ADDRESS(Panels) x;
    ADDRESS(FloatsOut) dst; /* one float */
    UINT n_cells;
    UINT cells_each;
};

#include "params_backward.h"
#include "params_attribution.h"
#include "params_circuit.h"

#endif
