/* Arguments of the kernels that run circuits; a part of params.h, which includes it. */
#ifndef VKSTEER_PARAMS_CIRCUIT_H
#define VKSTEER_PARAMS_CIRCUIT_H

/* --- circuits (csrc/analysis/circuit.h): T tokens of a chunk; a block is [T, stride], what a node
 * adds minus what it adds in the base run --- */

#define NO_DIFFERENCE 0xffffffffu

/* dst[e, j, :] = gain * v / rms(v), v = x[t, :] + the blocks refs[first[e]] ... in their order, t =
 * tokens[j] (or j): the stream as one input reads it. */
BLOCK(circuit_inputs_params) {
    ADDRESS(FloatsIn) x; /* [T, stride] the base run's stream */
    ADDRESS(FloatsIn) d; /* [blocks, T, stride] */
    ADDRESS(Words) refs;
    ADDRESS(Words) first;  /* [entries + 1] */
    ADDRESS(Words) tokens; /* [n_tokens] */
    ADDRESS(FloatsIn) gain;
    ADDRESS(FloatsOut) dst; /* [entries, n_tokens, stride] */
    UINT all_tokens;        /* 1: all T in order instead */
    UINT n_tokens;
    UINT n_chunk; /* T */
    UINT width;
    UINT stride;
    float eps;
};

#define PLACE_Q 0
#define PLACE_K 1
#define PLACE_V 2
#define PLACE_BASE 4    /* from the base run's rows, which are finished: a copy */
#define PLACE_QK_NORM 1 /* flag */

/* Single heads' queries, keys and values to where attention finds them: RMS norm per head and
 * rotation for q and k, then q[to, t, :] or cache[to, slot, :].
 * Entry: kind, source block (or nothing), column of its first float in the source
 * row, destination block. */
BLOCK(circuit_place_params) {
    ADDRESS(FloatsIn) x;      /* [blocks, T, x_stride] products */
    ADDRESS(FloatsIn) base;   /* [T, base_stride] */
    ADDRESS(Words) entries;   /* [n, 4] */
    ADDRESS(Tokens) tokens;   /* [T] */
    ADDRESS(FloatsIn) angles; /* [positions, dh/2, (cos, sin)] */
    ADDRESS(FloatsIn) q_gain;
    ADDRESS(FloatsIn) k_gain;
    ADDRESS(FloatsOut) q;       /* [blocks, T, q_stride] */
    ADDRESS(FloatsOut) k_cache; /* [blocks, n_slots, dh] */
    ADDRESS(FloatsOut) v_cache;
    UINT n_tokens;
    UINT d_head;
    UINT x_stride;
    UINT base_stride;
    UINT q_stride;
    UINT n_slots;
    UINT flags;
    float eps;
};

#define HEADS_DIFFERENCE 1 /* minus the base run's */
#define HEADS_SCALED 2     /* each divided by its run's scale: a post-norm's own statistic */
#define HEADS_COLUMN 4     /* written at the head's own columns of a wide row, */
#define HEADS_ZERO 8       /* the others zeroed */

/* dst[row, t, :] = f(z of a head's state) [- f(z of the base run)]. Entry: state (NO_DIFFERENCE:
 * the base run's), head, row, scale's block. */
BLOCK(circuit_heads_params) {
    ADDRESS(FloatsIn) z;          /* [states, T, z_stride] */
    ADDRESS(FloatsIn) base;       /* [T, base_stride], all heads */
    ADDRESS(Words) entries;       /* [n, 4] */
    ADDRESS(FloatsIn) scale;      /* [blocks, T] */
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

/* dst[r, :] = [gain * x / rms(x) of] x[r, :] - base[(first + r) % T, :]. */
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

/* logits[e, j] = (a, b) after the soft cap: normed[e, j, :] times rows 2j and 2j + 1. */
BLOCK(pair_logits_params) {
    ADDRESS(FloatsIn) normed;  /* [entries, n, stride] */
    ADDRESS(FloatsIn) rows;    /* [2n, stride] of the unembedding */
    ADDRESS(FloatsOut) logits; /* [entries, n, 2] */
    UINT n;
    UINT width;
    UINT stride;
    float softcap;
};

/* values[r] = KL(reference || x), KL(other || x), log p(target), greedy token of row r of logits
 * before the soft cap; its reference is row (first + r) % n. */
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
