/* Arguments of the kernels that attribution is made of; a part of params.h, which includes it. */
#ifndef VKSTEER_PARAMS_ATTRIBUTION_H
#define VKSTEER_PARAMS_ATTRIBUTION_H

/* --- attribution (csrc/analysis/attribution.c): a sample token is a token of a sample that has
 * accumulators; a source is a token of a batch, NO_SOURCE where there is none. n: sample tokens of
 * the dispatch --- */

#define NO_SOURCE 0xffffffffu

/* dst[s, :] = f(a) x[a, :] - f(b) x[b, :] for (a, b) = pairs[s]; f(token) = 1, or with `raw`
 * 1 / rms(raw[token, :]), the factor of a post-norm. */
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

#define HEAD_INPUTS_NORMED 1 /* gradients after the norm, without its scale */
#define HEAD_INPUTS_LAYER 2  /* the norm is a LayerNorm */

/* What the gradients of a layer's query, key and value inputs are made of later. For source k of
 * sample token s, t = sources[s, k], r = 1 / rms(x[t]) and step = first_step + k:
 *     heads[s, :] += weight r dqkv[t, :]
 *     steps[s, step, v] = weight r^2 / D ((qkv[t] - bias) . dqkv[t] of head v)
 *     xs[s, step, :] = x[t, :]
 * The gradient of input v before the norm is then gain * (W_v^T heads[s, v]) minus the sum over
 * steps of steps[s, step, v] xs[s, step, :]. For a LayerNorm x is x - mean x everywhere, bias
 * includes W_qkv times the norm's bias, and the first term loses its mean over D. */
BLOCK(head_inputs_params) {
    ADDRESS(FloatsIn) dqkv;     /* [T, stride] */
    ADDRESS(FloatsIn) qkv;      /* [T, stride], before norm per head and rotation */
    ADDRESS(FloatsIn) bias;     /* what qkv is where the normalised x is 0 */
    ADDRESS(FloatsIn) x;        /* [T, d_stride] the residual stream before the layer */
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

#define HEAD_GRADIENTS_LAYER 1 /* the norm is a LayerNorm */

/* In place on g[v, t, :] = W_v^T heads[t, v]: the gradient before the norm, see above. Row (v, t)
 * at (v * n_sample_tokens + t) * d_stride. */
BLOCK(head_gradients_params) {
    ADDRESS(FloatsInOut) g;
    ADDRESS(FloatsIn) gain;
    ADDRESS(FloatsIn) steps; /* [n_sample_tokens, n_steps, n_inputs] */
    ADDRESS(FloatsIn) xs;    /* [n_sample_tokens, n_steps, d_stride] */
    UINT n_inputs;
    UINT n_sample_tokens;
    UINT n_steps;
    UINT width;
    UINT d_stride;
    UINT flags;
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

/* dims[u, :] = sum over sample tokens t of du[u, t, :] g[groups[u], t, :]. */
BLOCK(node_dims_params) {
    ADDRESS(FloatsIn) du;    /* [n, n_sample_tokens, d_stride] */
    ADDRESS(FloatsIn) g;     /* [groups, n_sample_tokens, d_stride] */
    ADDRESS(Words) groups;   /* [n] */
    ADDRESS(FloatsOut) dims; /* [n, width] */
    UINT n_sample_tokens;
    UINT width;
    UINT d_stride;
};

#endif
