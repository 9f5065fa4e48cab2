/* Arguments of the kernels that run circuits; a part of params.h, which includes it. */
#ifndef VKSTEER_PARAMS_CIRCUIT_H
#define VKSTEER_PARAMS_CIRCUIT_H

/* --- circuits (csrc/analysis/circuit.h): T tokens of a chunk. A difference is [T, stride]: what a
 * node adds to the residual stream minus what it adds in the base run --- */

#define NO_DIFFERENCE 0xffffffffu

#define INPUTS_BIAS 1 /* flag */

/* dst[e, j, :] = norm(v), where v = x[t, :] + the differences refs[first[e]] to
 * refs[first[e + 1] - 1] in this order, and t = tokens[j] (or j): the residual stream as one input
 * reads it. norm(v) = gain * v / rms(v), or the LayerNorm gain * (v - mean) / sqrt(var + eps)
 * [+ bias], or v itself. */
BLOCK(circuit_inputs_params) {
    ADDRESS(FloatsIn) x; /* [T, stride] residual stream of the base run */
    ADDRESS(FloatsIn) d; /* [differences, T, stride] */
    ADDRESS(Words) refs;
    ADDRESS(Words) first;   /* [entries + 1] */
    ADDRESS(Words) tokens;  /* [n_tokens] */
    ADDRESS(FloatsIn) gain; /* not read with NORM_KIND_NONE */
    ADDRESS(FloatsIn) bias;
    ADDRESS(FloatsOut) dst; /* [entries, n_tokens, stride] */
    UINT kind;              /* NORM_KIND_* */
    UINT flags;
    UINT all_tokens; /* 1: all T tokens in order, and `tokens` is not read */
    UINT n_tokens;
    UINT n_chunk; /* T */
    UINT width;
    UINT stride;
    float eps;
};

#define PLACE_Q 0
#define PLACE_K 1
#define PLACE_V 2
#define PLACE_BASE 4    /* copied from the base run's rows, which are finished */
#define PLACE_QK_NORM 1 /* flags */
#define PLACE_INTERLEAVED 2

/* Writes queries, keys and values of single heads to where the attention kernels read them, which
 * is q[to, t, :] or cache[to, slot, :], after RMS norm per head and rotation of the first d_rot
 * channels for q and k. A rotated pair is (i, i + d_rot / 2), or (2i, 2i + 1) with
 * PLACE_INTERLEAVED. An entry is: kind (PLACE_*), source array of x (unused with PLACE_BASE),
 * column of the head's first float in the source row, destination array `to`. */
BLOCK(circuit_place_params) {
    ADDRESS(FloatsIn) x;      /* [arrays, T, x_stride] products */
    ADDRESS(FloatsIn) base;   /* [T, base_stride] */
    ADDRESS(Words) entries;   /* [n, 4] */
    ADDRESS(Tokens) tokens;   /* [T] */
    ADDRESS(FloatsIn) angles; /* of keys, [positions, d_rot / 2, (cos, sin)] */
    ADDRESS(FloatsIn) q_angles;
    ADDRESS(FloatsIn) q_gain;
    ADDRESS(FloatsIn) k_gain;
    ADDRESS(FloatsOut) q;       /* [arrays, T, q_stride] */
    ADDRESS(FloatsOut) k_cache; /* [arrays, n_slots, dh] */
    ADDRESS(FloatsOut) v_cache;
    UINT n_tokens;
    UINT d_head;
    UINT d_rot;
    UINT x_stride;
    UINT base_stride;
    UINT q_stride;
    UINT n_slots;
    UINT flags;
    float eps;
};

#define HEADS_DIFFERENCE 1 /* minus the value of the base run */
#define HEADS_SCALED 2     /* each divided by the scale of its run's post-norm */
#define HEADS_COLUMN 4     /* written at the head's own columns of a row of all heads */
#define HEADS_ZERO 8       /* the other columns of the row become 0 */
#define HEADS_OFFSET 16    /* a state's first float is not that of its row; never with a scale */

/* dst[row, t, :] = f(z of a head's state) [- f(z of the base run)]. An entry is: state
 * (NO_DIFFERENCE: that of the base run), head, row, row of `scale` or (HEADS_OFFSET) column of the
 * state's first float. */
BLOCK(circuit_heads_params) {
    ADDRESS(FloatsIn) z;          /* [states, T, z_stride] */
    ADDRESS(FloatsIn) base;       /* [T, base_stride], all heads */
    ADDRESS(Words) entries;       /* [n, 4] */
    ADDRESS(FloatsIn) scale;      /* [scale rows, T] */
    ADDRESS(FloatsIn) base_scale; /* [T] */
    ADDRESS(FloatsOut) dst;       /* [rows, T, out_stride] */
    UINT n_tokens;
    UINT d_head;
    UINT z_stride;
    UINT base_stride;
    UINT out_stride;
    UINT flags;
};

#define OUTPUTS_NORM 1

/* dst[r, :] = x[r, :] (OUTPUTS_NORM: gain * x / rms(x) of it) - base[(first + r) % T, :]. */
BLOCK(circuit_outputs_params) {
    ADDRESS(FloatsIn) x;
    ADDRESS(FloatsIn) base;
    ADDRESS(FloatsIn) gain;
    ADDRESS(FloatsOut) dst;
    UINT first;
    UINT n_tokens;
    UINT width;
    UINT stride;
    UINT flags;
    float eps;
};

/* logits[e, j] = (a, b), the products of normed[e, j, :] with rows 2j and 2j + 1 (and the bias),
 * after the soft cap. */
BLOCK(pair_logits_params) {
    ADDRESS(FloatsIn) normed;  /* [entries, n, stride] */
    ADDRESS(FloatsIn) rows;    /* [2n, stride] of the unembedding */
    ADDRESS(FloatsOut) logits; /* [entries, n, 2] */
    ADDRESS(FloatsIn) bias;    /* [V] of the unembedding, */
    ADDRESS(Tokens) ids;       /* [2n] where id is a or b */
    UINT has_bias;             /* 0: these two are not read */
    UINT n;
    UINT width;
    UINT stride;
    float softcap;
};

/* values[r] = KL(reference || x), KL(other || x), log p(target) and the most probable token, for
 * row r of the logits x before the soft cap. Its reference is row (first + r) % n. */
BLOCK(logit_metrics_params) {
    ADDRESS(FloatsIn) logits;    /* [rows, stride] */
    ADDRESS(FloatsIn) reference; /* [n, stride] */
    ADDRESS(FloatsIn) other;     /* [n, stride] */
    ADDRESS(Words) targets;      /* [n] */
    ADDRESS(FloatsOut) values;   /* [rows, 4] */
    UINT first;
    UINT n;
    UINT width;
    UINT stride;
    float softcap;
};

#endif
