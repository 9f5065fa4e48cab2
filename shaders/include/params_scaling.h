/* Arguments of the kernels of activation scaling; a part of params.h, which includes it. */
#ifndef VKSTEER_PARAMS_SCALING_H
#define VKSTEER_PARAMS_SCALING_H

/* x[token, :] *= 1 + coefficient (w . x[token, :]) for every entry, w at its operand. */
BLOCK(scale_dynamic_params) {
    ADDRESS(FloatsInOut) x; /* [T, stride] */
    ADDRESS(EditEntries) entries;
    ADDRESS(FloatsIn) operand; /* w [width] at each entry's operand */
    UINT width;
    UINT stride;
};

/* Backward of scale_dynamic, in place on d, of which x was the input:
 * d = d (1 + coefficient (w . x)) + coefficient (x . d) w. */
BLOCK(scale_dynamic_bwd_params) {
    ADDRESS(FloatsInOut) d; /* [T, stride] */
    ADDRESS(FloatsIn) x;    /* [T, x_stride] */
    ADDRESS(EditEntries) entries;
    ADDRESS(FloatsIn) operand;
    UINT width;
    UINT stride;
    UINT x_stride;
};

/* dst[r] = x[r, :] . y[r, :] */
BLOCK(row_dots_params) {
    ADDRESS(FloatsIn) x;    /* [n, x_stride] */
    ADDRESS(FloatsIn) y;    /* [n, y_stride] */
    ADDRESS(FloatsOut) dst; /* [n] */
    UINT width;
    UINT x_stride;
    UINT y_stride;
};

/* dst[r, :] = sum over rows t of x from ranges[2 r] to before ranges[2 r + 1] of
 * weights[t] x[t, :] */
BLOCK(row_sums_params) {
    ADDRESS(FloatsIn) x;       /* [T, stride] */
    ADDRESS(FloatsIn) weights; /* [T] */
    ADDRESS(Words) ranges;     /* [n, 2] */
    ADDRESS(FloatsOut) dst;    /* [n, width] */
    UINT width;
    UINT stride;
};

/* A choice between tokens a and b. With D = logit(a) - logit(b) and K = KL(reference || x) of the
 * distributions over all other tokens, both after the soft cap, the logits of row r become, in
 * place and before the cap, the gradient of max(0, margin - signs[r] D) + faith K; values[r] is
 * (D, K). */
BLOCK(choice_grad_params) {
    ADDRESS(FloatsInOut) logits; /* [n, stride]; pad columns become zero */
    ADDRESS(FloatsIn) reference; /* [n, stride] logits of another run */
    ADDRESS(Words) a;            /* [n] */
    ADDRESS(Words) b;            /* [n] */
    ADDRESS(FloatsIn) signs;     /* [n] */
    ADDRESS(FloatsOut) values;   /* [n, 2] */
    UINT width;
    UINT stride;
    float margin;
    float faith;
    float softcap;           /* of `logits`; 0: none, or not applied */
    float reference_softcap; /* of `reference`; 0: none, or already applied */
};

#endif
