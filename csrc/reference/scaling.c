/* Reference implementations of the ops of activation scaling. */
#include <math.h>

#include "reference/reference.h"

static struct edit_entry entry_at(struct reference_memory *memory, uint64_t entries, uint32_t e) {
    union {
        uint32_t bits;
        float value;
    } coefficient = {.bits = reference_word(memory, entries, 4 * (uint64_t)e + 2)};
    return (struct edit_entry){
        .token = reference_word(memory, entries, 4 * (uint64_t)e),
        .operand = reference_word(memory, entries, 4 * (uint64_t)e + 1),
        .coefficient = coefficient.value,
    };
}

static double dot(struct reference_memory *memory, uint64_t x, uint64_t x_first, uint64_t y,
                  uint64_t y_first, uint32_t width) {
    double sum = 0;
    for (uint32_t i = 0; i < width && !memory->failed; i++)
        sum += *reference_float(memory, x, x_first + i) * *reference_float(memory, y, y_first + i);
    return sum;
}

void reference_scale_dynamic(struct reference_memory *memory, const struct scale_dynamic_params *p,
                             uint32_t n_entries) {
    for (uint32_t e = 0; e < n_entries && !memory->failed; e++) {
        struct edit_entry entry = entry_at(memory, p->entries, e);
        uint64_t at = (uint64_t)entry.token * p->stride;
        double factor = 1 + (double)entry.coefficient *
                                dot(memory, p->x, at, p->operand, entry.operand, p->width);
        for (uint32_t i = 0; i < p->width; i++)
            *reference_float(memory, p->x, at + i) *= factor;
    }
}

void reference_scale_dynamic_bwd(struct reference_memory *memory,
                                 const struct scale_dynamic_bwd_params *p, uint32_t n_entries) {
    for (uint32_t e = 0; e < n_entries && !memory->failed; e++) {
        struct edit_entry entry = entry_at(memory, p->entries, e);
        uint64_t at = (uint64_t)entry.token * p->stride, x = (uint64_t)entry.token * p->x_stride;
        double along = dot(memory, p->x, x, p->operand, entry.operand, p->width),
               across = dot(memory, p->x, x, p->d, at, p->width), factor = entry.coefficient;
        for (uint32_t i = 0; i < p->width; i++) {
            double *d = reference_float(memory, p->d, at + i);
            *d = *d * (1 + factor * along) +
                 factor * across *
                     *reference_float(memory, p->operand, (uint64_t)entry.operand + i);
        }
    }
}

void reference_row_dots(struct reference_memory *memory, const struct row_dots_params *p,
                        uint32_t n_rows) {
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++)
        *reference_float(memory, p->dst, r) = dot(memory, p->x, (uint64_t)r * p->x_stride, p->y,
                                                  (uint64_t)r * p->y_stride, p->width);
}

void reference_row_sums(struct reference_memory *memory, const struct row_sums_params *p,
                        uint32_t n_ranges) {
    for (uint32_t r = 0; r < n_ranges && !memory->failed; r++) {
        uint32_t first = reference_word(memory, p->ranges, 2 * (uint64_t)r),
                 end = reference_word(memory, p->ranges, 2 * (uint64_t)r + 1);
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            double sum = 0;
            for (uint32_t t = first; t < end && !memory->failed; t++)
                sum += *reference_float(memory, p->weights, t) *
                       *reference_float(memory, p->x, (uint64_t)t * p->stride + i);
            *reference_float(memory, p->dst, (uint64_t)r * p->width + i) = sum;
        }
    }
}

/* log sum exp of a row after the soft cap, without tokens a and b */
static double log_sum_without(struct reference_memory *memory, uint64_t x, uint64_t row,
                              uint32_t width, double softcap, uint32_t a, uint32_t b) {
    double top = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < width && !memory->failed; i++)
        if (i != a && i != b)
            top = fmax(top, reference_cap(*reference_float(memory, x, row + i), softcap));
    for (uint32_t i = 0; i < width && !memory->failed; i++)
        if (i != a && i != b)
            sum += exp(reference_cap(*reference_float(memory, x, row + i), softcap) - top);
    return top + log(sum);
}

void reference_choice_grad(struct reference_memory *memory, const struct choice_grad_params *p,
                           uint32_t n_rows) {
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t row = (uint64_t)r * p->stride;
        uint32_t a = reference_word(memory, p->a, r), b = reference_word(memory, p->b, r);
        if (a >= p->width || b >= p->width) {
            reference_fail(memory, "row %u: tokens %u and %u of %u", r, a, b, p->width);
            return;
        }
        double own = log_sum_without(memory, p->logits, row, p->width, p->softcap, a, b),
               other = log_sum_without(memory, p->reference, row, p->width, p->reference_softcap, a,
                                       b),
               side = *reference_float(memory, p->signs, r),
               difference = reference_cap(*reference_float(memory, p->logits, row + a),
                                          p->softcap) -
                            reference_cap(*reference_float(memory, p->logits, row + b), p->softcap),
               pull = p->margin - side * difference > 0 ? -side : 0, divergence = 0;
        for (uint32_t i = 0; i < p->stride && !memory->failed; i++) {
            double *logit = reference_float(memory, p->logits, row + i), d;
            if (i >= p->width) {
                *logit = 0;
                continue;
            }
            double capped = reference_cap(*logit, p->softcap), log_p = capped - own,
                   log_reference = reference_cap(*reference_float(memory, p->reference, row + i),
                                                 p->reference_softcap) -
                                   other;
            if (i == a || i == b) {
                d = i == a ? pull : -pull;
            } else {
                d = p->faith * (exp(log_p) - exp(log_reference));
                divergence += exp(log_reference) * (log_reference - log_p);
            }
            *logit = p->softcap != 0 ? d * (1 - pow(capped / p->softcap, 2)) : d;
        }
        *reference_float(memory, p->values, 2 * (uint64_t)r) = difference;
        *reference_float(memory, p->values, 2 * (uint64_t)r + 1) = divergence;
    }
}
