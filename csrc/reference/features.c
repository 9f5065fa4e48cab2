/* Reference implementations of the ops of sparse autoencoders: activations of features, and their
 * sums over segments of tokens. */
#include <math.h>

#include "reference/reference.h"

void reference_feature_act(struct reference_memory *memory, const struct feature_act_params *p,
                           uint32_t n_tokens) {
    if (p->kind > FEATURE_GATE)
        reference_fail(memory, "there is no activation %u of features", p->kind);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            double *x = reference_float(memory, p->x, (uint64_t)t * p->stride + i), u = *x;
            if (p->kind == FEATURE_JUMP)
                *x = u > *reference_float(memory, p->threshold, i) ? u : 0;
            else if (u + *reference_float(memory, p->gate, i) > 0)
                *x = fmax(u * *reference_float(memory, p->scale, i) +
                              *reference_float(memory, p->bias, i),
                          0);
            else
                *x = 0;
        }
}

void reference_feature_sums(struct reference_memory *memory, const struct feature_sums_params *p,
                            uint32_t n_segments, uint32_t n_tokens) {
    for (uint32_t s = 0; s < n_segments && !memory->failed; s++) {
        uint32_t from = reference_word(memory, p->segments, 3 * (uint64_t)s),
                 n = reference_word(memory, p->segments, 3 * (uint64_t)s + 1),
                 row = reference_word(memory, p->segments, 3 * (uint64_t)s + 2);
        if (from > n_tokens || n > n_tokens - from)
            reference_fail(memory, "segment %u: %u tokens from %u, of %u", s, n, from, n_tokens);
        for (uint32_t i = 0; i < p->width && !memory->failed; i++)
            for (uint32_t t = from; t < from + n && !memory->failed; t++)
                *reference_float(memory, p->sums, (uint64_t)row * p->out_stride + i) +=
                    *reference_float(memory, p->x, (uint64_t)t * p->x_stride + i);
    }
}
