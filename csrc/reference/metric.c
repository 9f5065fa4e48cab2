/* Reference implementations of the gradients of scalars of the logits. */
#include <math.h>

#include "reference/reference.h"

static double cap(double x, double softcap) {
    return softcap != 0 ? softcap * tanh(x / softcap) : x;
}

/* The cap's slope where it gave `capped`. */
static double cap_slope(double capped, double softcap) {
    return softcap != 0 ? 1 - pow(capped / softcap, 2) : 1;
}

void reference_pair_grad(struct reference_memory *memory, const struct pair_grad_params *p,
                         uint32_t n_rows) {
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        double slope[2];
        for (uint32_t i = 0; i < 2; i++) {
            double sum = 0;
            for (uint32_t d = 0; d < p->width; d++)
                sum += *reference_float(memory, p->normed, (uint64_t)r * p->stride + d) *
                       *reference_float(memory, p->rows, (2 * (uint64_t)r + i) * p->stride + d);
            sum = cap(sum, p->softcap);
            *reference_float(memory, p->logits, 2 * (uint64_t)r + i) = sum;
            slope[i] = cap_slope(sum, p->softcap) * *reference_float(memory, p->weights, r);
        }
        for (uint32_t d = 0; d < p->width; d++)
            *reference_float(memory, p->dnormed, (uint64_t)r * p->stride + d) =
                slope[0] * *reference_float(memory, p->rows, 2 * (uint64_t)r * p->stride + d) -
                slope[1] * *reference_float(memory, p->rows, (2 * (uint64_t)r + 1) * p->stride + d);
    }
}

/* log sum exp of a row of logits, capped. */
static double log_sum(struct reference_memory *memory, const struct logit_grad_params *p,
                      uint64_t logits, double softcap, uint64_t row) {
    double top = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < p->width; i++)
        top = fmax(top, cap(*reference_float(memory, logits, row + i), softcap));
    for (uint32_t i = 0; i < p->width; i++)
        sum += exp(cap(*reference_float(memory, logits, row + i), softcap) - top);
    return top + log(sum);
}

void reference_logit_grad(struct reference_memory *memory, const struct logit_grad_params *p,
                          uint32_t n_rows) {
    if (p->kind > LOGIT_GRAD_DIRECTIONAL_KL)
        reference_fail(memory, "there is no scalar %u of the logits", p->kind);
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t row = (uint64_t)r * p->stride;
        double value = 0, weight = *reference_float(memory, p->weights, r),
               own = log_sum(memory, p, p->logits, p->softcap, row), of_reference = 0, of_other = 0;
        uint32_t target = 0;
        if (p->kind == LOGIT_GRAD_LOG_PROB)
            target = reference_word(memory, p->targets, r);
        else
            of_reference = log_sum(memory, p, p->reference, p->reference_softcap, row);
        if (p->kind == LOGIT_GRAD_DIRECTIONAL_KL)
            of_other = log_sum(memory, p, p->other, p->reference_softcap, row);
        for (uint32_t i = 0; i < p->stride && !memory->failed; i++) {
            double *logit = reference_float(memory, p->logits, row + i), d;
            if (i >= p->width) {
                *logit = 0;
                continue;
            }
            double capped = cap(*logit, p->softcap), log_p = capped - own;
            if (p->kind == LOGIT_GRAD_LOG_PROB) {
                d = (i == target) - exp(log_p);
                value += i == target ? log_p : 0;
            } else {
                double log_reference = cap(*reference_float(memory, p->reference, row + i),
                                           p->reference_softcap) -
                                       of_reference;
                double kl = exp(log_reference) * (log_reference - log_p),
                       dkl = exp(log_p) - exp(log_reference);
                if (p->kind == LOGIT_GRAD_DIRECTIONAL_KL) {
                    double log_other = cap(*reference_float(memory, p->other, row + i),
                                           p->reference_softcap) -
                                       of_other;
                    kl = exp(log_other) * (log_other - log_p) - kl;
                    dkl = exp(log_p) - exp(log_other) - dkl;
                }
                d = dkl;
                value += kl;
            }
            *logit = weight * d * cap_slope(capped, p->softcap);
        }
        *reference_float(memory, p->values, r) = value;
    }
}
