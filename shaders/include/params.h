/* Argument blocks of all kernels, read by C and by GLSL, so that none is typed twice. Addresses
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

/* --- backward: gradients of a scalar with respect to activations; the weights are fixed. d in
 * front of a name: the gradient with respect to it --- */

/* dx[m, k] = sum_n dy[m, n] W[n, k] (LINEAR_ADD: + what dx held): one chain over ascending n, on
 * the panels of the forward product. */
BLOCK(linear_bwd_params) {
    ADDRESS(Inputs) dy; /* [M, y_stride], pad columns zero */
    ADDRESS(Panels) weights;
    ADDRESS(FloatsInOut) dx; /* [M, x_stride] */
    UINT n_rows;             /* M */
    UINT n_sum;              /* rows of W to sum over, padded to 16 */
    UINT first_n;            /* from here: a multiple of 16 */
    UINT n_cells;            /* 16-byte cells of k to write, all columns of each */
    UINT first_cell;
    UINT panel_cells;
    UINT y_stride;
    UINT x_stride;
    UINT flags;
};

#define NORM_BWD_ADD 1        /* dx = add + ... */
#define NORM_BWD_NORMALIZED 2 /* dy is with respect to the normalised value, before the gain */
#define NORM_BWD_WRITE_NORMALIZED 4
#define NORM_BWD_WRITE_SCALE 8
#define NORM_BWD_NO_OUT 16
#define NORM_BWD_ROWS 32 /* row r's x is token rows[r]'s */

/* Backward of the RMS norm: with scale = sqrt(mean x^2 + eps), n = x / scale, dn = dy * gain:
 * dscale = -(dn . n) / scale, dx = dn / scale - n (dn . n) / (D scale). */
BLOCK(norm_bwd_params) {
    ADDRESS(FloatsIn) x;
    ADDRESS(FloatsIn) gain;
    ADDRESS(FloatsIn) dy;
    ADDRESS(FloatsOut) dx;
    ADDRESS(FloatsIn) add;
    ADDRESS(FloatsOut) dnormalized;
    ADDRESS(FloatsOut) dscale; /* [T] */
    ADDRESS(Words) rows;
    UINT width;
    UINT stride;
    UINT flags;
    float eps;
};

/* dgate = dpost * up * act'(gate), dup = dpost * act(gate). */
BLOCK(act_bwd_params) {
    ADDRESS(FloatsIn) gate_up;   /* [T, in_stride] */
    ADDRESS(FloatsIn) dpost;     /* [T, out_stride] */
    ADDRESS(FloatsOut) dgate_up; /* [T, in_stride] */
    UINT width;
    UINT in_stride;
    UINT out_stride;
    UINT act;
};

/* In place on dpattern: dscores = pattern * (dpattern - sum_j pattern dpattern) * scale * (1 -
 * (score / softcap)^2): with respect to q . k. Zeros where the forward softmax writes zeros. */
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

/* sums[j, g, :] (+)= sum over queries t >= j of j's row and heads h of group g of a[t, h,
 * j] y[t, h, :]: values' gradient from pattern and dz, keys' from dscores and q. One chain
 * over ascending (t, h). */
BLOCK(attn_output_bwd_params) {
    ADDRESS(FloatsIn) a; /* [T', H, key_stride], T' counted from token first_token */
    ADDRESS(FloatsIn) y; /* [T, y_stride] */
    ADDRESS(Tokens) tokens;
    ADDRESS(Tiles) tiles;      /* of keys: whole rows lie in the chunk */
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

/* In place on [dq | dk | dv] rows: the rotation undone, then the backward of the norm per
 * head (ROPE_QK_NORM). */
BLOCK(rope_bwd_params) {
    ADDRESS(FloatsInOut) dqkv;
    ADDRESS(FloatsIn) qkv; /* before norm and rotation */
    ADDRESS(FloatsIn) angles;
    ADDRESS(Tokens) tokens;
    ADDRESS(FloatsIn) q_gain;
    ADDRESS(FloatsIn) k_gain;
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head;
    UINT stride;
    UINT flags; /* ROPE_QK_NORM, ROPE_ROTATE */
    float eps;
};

/* Row r: logits a and b of token `normed` row r; dnormed = weight (a' W[a] - b' W[b]), '
 * the soft cap's slope. */
BLOCK(pair_grad_params) {
    ADDRESS(FloatsIn) normed;   /* [n, stride] */
    ADDRESS(FloatsIn) rows;     /* [2n, stride]: W[a] of row r at 2r, W[b] at 2r + 1 */
    ADDRESS(FloatsIn) weights;  /* [n] */
    ADDRESS(FloatsOut) dnormed; /* [n, stride] */
    ADDRESS(FloatsOut) logits;  /* [n, 2] after the soft cap */
    UINT width;
    UINT stride;
    float softcap;
};

#define LOGIT_GRAD_LOG_PROB 0       /* log p(target) */
#define LOGIT_GRAD_KL 1             /* KL(reference || x) */
#define LOGIT_GRAD_DIRECTIONAL_KL 2 /* KL(other || x) - KL(reference || x) */

/* In place: logits of a row (before the soft cap) -> weight * d(value)/d(logit before the cap);
 * value[r] is the scalar itself, without its weight. */
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
    float softcap;           /* of `logits`; 0: none, or not wanted */
    float reference_softcap; /* of `reference` and `other`; 0: none, or already applied */
};

/* --- attribution (csrc/analysis/attribution.c): slots are tokens of samples; sources are tokens of
 * a batch, NO_SOURCE where there is none --- */

#define NO_SOURCE 0xffffffffu

/* dst[s, :] = f(a) x[a, :] - f(b) x[b, :] for (a, b) = pairs[s]; f = 1, or with `raw` 1 /
 * rms(raw[token, :]): a post-norm's own statistic. */
BLOCK(difference_params) {
    ADDRESS(FloatsIn) x;
    ADDRESS(FloatsIn) raw; /* 0: none */
    ADDRESS(Words) pairs;  /* [n, 2] */
    ADDRESS(FloatsOut) dst;
    UINT width;
    UINT stride;    /* of x and dst */
    UINT raw_width; /* 0: no raw */
    UINT raw_stride;
    float eps;
};

/* dst[s, :] += weight * sum over k of src[sources[s, k], :], in ascending k. */
BLOCK(accumulate_params) {
    ADDRESS(FloatsIn) src;
    ADDRESS(Words) sources; /* [n, n_sources] */
    ADDRESS(FloatsInOut) dst;
    UINT width;
    UINT stride;
    UINT n_sources;
    float weight;
};

#define HEAD_INPUTS_NORMED 1 /* gradients after the norm: no statistic comes in */

/* What a layer's query, key and value inputs need later: with r = 1 / rms(x[t]),
 * heads[s, :] += weight r dqkv[t, :]; for step first_step + k: steps[s, step, v] = weight r^2 / D
 * ((qkv - bias) . dqkv of head v), xs[s, step, :] = x[t, :]. The gradient of input v before the
 * norm is then gain * (W_v^T heads[s, v]) - sum over steps of steps[s, step, v] xs[s, step, :]. */
BLOCK(head_inputs_params) {
    ADDRESS(FloatsIn) dqkv; /* [T, stride] */
    ADDRESS(FloatsIn) qkv;  /* [T, stride], before norm per head and rotation */
    ADDRESS(FloatsIn) bias;
    ADDRESS(FloatsIn) x;        /* [T, d_stride] the stream entering the layer */
    ADDRESS(Words) sources;     /* [n, n_sources] */
    ADDRESS(FloatsInOut) heads; /* [n, stride] */
    ADDRESS(FloatsOut) steps;   /* [n, n_steps, n_inputs] */
    ADDRESS(FloatsOut) xs;      /* [n, n_steps, d_stride] */
    UINT n_inputs;              /* H + 2 G */
    UINT d_head;
    UINT stride;
    UINT width; /* D */
    UINT d_stride;
    UINT n_sources;
    UINT first_step;
    UINT n_steps;
    UINT flags;
    UINT has_bias;
    float eps;
    float weight;
};

/* In place on g[v, t, :] = W_v^T heads[t, v]: the gradient before the norm, see above. Row (v, t)
 * at (v * n_slots + t) * d_stride. */
BLOCK(head_gradients_params) {
    ADDRESS(FloatsInOut) g;
    ADDRESS(FloatsIn) gain;
    ADDRESS(FloatsIn) steps; /* [n_slots, n_steps, n_inputs] */
    ADDRESS(FloatsIn) xs;    /* [n_slots, n_steps, d_stride] */
    UINT n_inputs;
    UINT n_slots;
    UINT n_steps;
    UINT width;
    UINT d_stride;
};

/* dst[i, j] = sum over k of a[i, k] b[j, k]. */
BLOCK(dots_params) {
    ADDRESS(FloatsIn) a;    /* [n_a, n_k] */
    ADDRESS(FloatsIn) b;    /* [n_b, n_k] */
    ADDRESS(FloatsOut) dst; /* [n_a, n_b] */
    UINT n_a;
    UINT n_b;
    UINT n_k;
};

/* dims[u, :] = sum over t of du[u, t, :] g[group[u], t, :]. */
BLOCK(node_dims_params) {
    ADDRESS(FloatsIn) du;    /* [n, n_slots, d_stride] */
    ADDRESS(FloatsIn) g;     /* [groups, n_slots, d_stride] */
    ADDRESS(Words) groups;   /* [n] */
    ADDRESS(FloatsOut) dims; /* [n, width] */
    UINT n_slots;
    UINT width;
    UINT d_stride;
};

/* Reads n_cells of 16 bytes, cells_each by every subgroup. */
BLOCK(read_params) {
    ADDRESS(Panels) x;
    ADDRESS(FloatsOut) dst; /* one float */
    UINT n_cells;
    UINT cells_each;
};

#include "params_circuit.h"

#endif
