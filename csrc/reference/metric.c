/* Reference implementations of the gradients of scalars of the logits. */
#include <math.h>

#include "reference/reference.h"

double reference_cap(double x, double softcap) {
    return softcap != 0 ? softcap * tanh(x / softcap) : x;
}

double reference_log_sum(struct reference_memory *memory, uint64_t x, uint64_t first,
                         uint32_t width, double softcap) {
    double top = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < width && !memory->failed; i++)
        top = fmax(top, reference_cap(*reference_float(memory, x, first + i), softcap));
    for (uint32_t i = 0; i < width && !memory->failed; i++)
        sum += exp(reference_cap(*reference_float(memory, x, first + i), softcap) - top);
    return top + log(sum);
}

/* The slope of the soft cap where its value is `capped`. */
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
            if (p->has_bias)
                sum += *reference_float(memory, p->bias,
                                        reference_token(memory, p->ids, 2 * (uint64_t)r + i).id);
            sum = reference_cap(sum, p->softcap);
            *reference_float(memory, p->logits, 2 * (uint64_t)r + i) = sum;
            slope[i] = cap_slope(sum, p->softcap) * *reference_float(memory, p->weights, r);
        }
        for (uint32_t d = 0; d < p->width; d++)
            *reference_float(memory, p->dnormed, (uint64_t)r * p->stride + d) =
                slope[0] * *reference_float(memory, p->rows, 2 * (uint64_t)r * p->stride + d) -
                slope[1] * *reference_float(memory, p->rows, (2 * (uint64_t)r + 1) * p->stride + d);
    }
}

void reference_logit_grad(struct reference_memory *memory, const struct logit_grad_params *p,
                          uint32_t n_rows) {
    if (p->kind > LOGIT_GRAD_DIRECTIONAL_KL)
        reference_fail(memory, "there is no scalar %u of the logits", p->kind);
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t row = (uint64_t)r * p->stride;
        double value = 0, weight = *reference_float(memory, p->weights, r),
               own = reference_log_sum(memory, p->logits, row, p->width, p->softcap),
               of_reference = 0, of_other = 0;
        uint32_t target = 0;
        if (p->kind == LOGIT_GRAD_LOG_PROB)
            target = reference_word(memory, p->targets, r);
        else
            of_reference = reference_log_sum(memory, p->reference, row, p->width,
                                             p->reference_softcap);
        if (p->kind == LOGIT_GRAD_DIRECTIONAL_KL)
            of_other = reference_log_sum(memory, p->other, row, p->width, p->reference_softcap);
        for (uint32_t i = 0; i < p->stride && !memory->failed; i++) {
            double *logit = reference_float(memory, p->logits, row + i), d;
            if (i >= p->width) {
                *logit = 0;
                continue;
            }
            double capped = reference_cap(*logit, p->softcap), log_p = capped - own;
            if (p->kind == LOGIT_GRAD_LOG_PROB) {
                d = (i == target) - exp(log_p);
                value += i == target ? log_p : 0;
            } else {
                double log_reference =
                    reference_cap(*reference_float(memory, p->reference, row + i),
                                  p->reference_softcap) -
                    of_reference;
                double kl = exp(log_reference) * (log_reference - log_p),
                       dkl = exp(log_p) - exp(log_reference);
                if (p->kind == LOGIT_GRAD_DIRECTIONAL_KL) {
                    double log_other = reference_cap(*reference_float(memory, p->other, row + i),
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
