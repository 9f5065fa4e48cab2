/* Reference implementations of the norm and its backward. */
#include <math.h>

#include "reference/reference.h"

double reference_inverse_rms(struct reference_memory *memory, uint64_t x, uint64_t first,
                             uint32_t width, double eps) {
    double squares = 0;
    for (uint32_t i = 0; i < width && !memory->failed; i++)
        squares += pow(*reference_float(memory, x, first + i), 2);
    return 1 / sqrt(squares / width + eps);
}

void reference_norm(struct reference_memory *memory, const struct norm_params *p, uint32_t n_rows) {
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t from = (uint64_t)(p->flags & NORM_ROWS ? reference_word(memory, p->rows, r) : r) *
                        p->stride,
                 to = (uint64_t)r * p->stride;
        double scale;
        if (p->flags & NORM_READ_NORMALIZED) {
            scale = 1; /* x is normalised already */
        } else if (p->flags & NORM_READ_SCALE) {
            scale = *reference_float(memory, p->scale, r);
        } else {
            double sum = 0;
            for (uint32_t i = 0; i < p->width; i++)
                sum += *reference_float(memory, p->x, from + i) *
                       *reference_float(memory, p->x, from + i);
            scale = sqrt(sum / p->width + p->eps);
            if (p->flags & NORM_WRITE_SCALE)
                *reference_float(memory, p->scale, r) = scale;
        }
        for (uint32_t i = 0; i < p->width; i++) {
            double x = *reference_float(memory, p->x, from + i) / scale;
            if (p->flags & NORM_WRITE_NORMALIZED)
                *reference_float(memory, p->normalized, to + i) = x;
            x *= *reference_float(memory, p->gain, i);
            if (p->flags & NORM_ADD)
                x += *reference_float(memory, p->add, to + i);
            if (!(p->flags & NORM_NO_OUT))
                *reference_float(memory, p->dst, to + i) = x;
        }
    }
}

double reference_norm_slope_at(const struct norm_slope *slope, double dn, double x,
                               uint32_t width) {
    return (dn - x / slope->scale * slope->along / width) / slope->scale;
}

void reference_norm_bwd(struct reference_memory *memory, const struct norm_bwd_params *p,
                        uint32_t n_rows) {
    int has_gain = !(p->flags & NORM_BWD_NORMALIZED);
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t from = (uint64_t)(p->flags & NORM_BWD_ROWS ? reference_word(memory, p->rows, r)
                                                            : r) *
                        p->stride,
                 at = (uint64_t)r * p->stride;
        struct norm_slope slope = {0};
        double squares = 0;
        for (uint32_t i = 0; i < p->width; i++)
            squares += *reference_float(memory, p->x, from + i) *
                       *reference_float(memory, p->x, from + i);
        slope.scale = sqrt(squares / p->width + p->eps);
        for (uint32_t i = 0; i < p->width; i++) {
            double dn = *reference_float(memory, p->dy, at + i) *
                        (has_gain ? *reference_float(memory, p->gain, i) : 1);
            slope.along += dn * *reference_float(memory, p->x, from + i) / slope.scale;
            if (p->flags & NORM_BWD_WRITE_NORMALIZED)
                *reference_float(memory, p->dnormalized, at + i) = dn;
        }
        if (p->flags & NORM_BWD_WRITE_SCALE)
            *reference_float(memory, p->dscale, r) = -slope.along / slope.scale;
        for (uint32_t i = 0; i < p->width && !(p->flags & NORM_BWD_NO_OUT); i++) {
            double dn = *reference_float(memory, p->dy, at + i) *
                        (has_gain ? *reference_float(memory, p->gain, i) : 1);
            double dx = reference_norm_slope_at(&slope, dn,
                                                *reference_float(memory, p->x, from + i), p->width);
            *reference_float(memory, p->dx, at + i) =
                dx + (p->flags & NORM_BWD_ADD ? *reference_float(memory, p->add, at + i) : 0);
        }
    }
}
