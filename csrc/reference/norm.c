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

/* The mean of the `width` floats from item `first` on; 0 for an RMS norm, which subtracts none. */
static double mean_of(struct reference_memory *memory, uint64_t x, uint64_t first, uint32_t width,
                      int layer) {
    double sum = 0;
    for (uint32_t i = 0; i < width && layer && !memory->failed; i++)
        sum += *reference_float(memory, x, first + i);
    return layer ? sum / width : 0;
}

/* sqrt(mean of (x - mean)^2 + eps) over the `width` floats from item `first` on. */
static double scale_of(struct reference_memory *memory, uint64_t x, uint64_t first, uint32_t width,
                       double mean, double eps) {
    double squares = 0;
    for (uint32_t i = 0; i < width && !memory->failed; i++)
        squares += pow(*reference_float(memory, x, first + i) - mean, 2);
    return sqrt(squares / width + eps);
}

/* Part `group` of row r; the part of x begins at float `from`. */
static void norm_part(struct reference_memory *memory, const struct norm_params *p, uint32_t r,
                      uint32_t group, uint32_t n_groups, uint64_t from) {
    uint64_t first = (uint64_t)group * p->width, to = (uint64_t)r * p->stride + first,
             scale_at = (uint64_t)r * n_groups + group;
    double mean = 0, scale = 1; /* for x that is normalised already */
    if (!(p->flags & NORM_READ_NORMALIZED)) {
        mean = mean_of(memory, p->x, from, p->width, (p->flags & NORM_LAYER) != 0);
        scale = p->flags & NORM_READ_SCALE ? *reference_float(memory, p->scale, scale_at)
                                           : scale_of(memory, p->x, from, p->width, mean, p->eps);
        if (p->flags & NORM_WRITE_SCALE && !(p->flags & NORM_READ_SCALE))
            *reference_float(memory, p->scale, scale_at) = scale;
    }
    for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
        double x = (*reference_float(memory, p->x, from + i) - mean) / scale;
        if (p->flags & NORM_WRITE_NORMALIZED)
            *reference_float(memory, p->normalized, to + i) = x;
        x *= *reference_float(memory, p->gain, first + i);
        if (p->flags & NORM_BIAS)
            x += *reference_float(memory, p->bias, first + i);
        if (p->flags & NORM_ADD)
            x += *reference_float(memory, p->add, to + i);
        if (!(p->flags & NORM_NO_OUT))
            *reference_float(memory, p->dst, to + i) = x;
    }
}

void reference_norm(struct reference_memory *memory, const struct norm_params *p, uint32_t n_rows) {
    uint32_t n_groups = p->n_groups > 1 ? p->n_groups : 1;
    if (!(p->flags & NORM_LAYER) && (n_groups > 1 || p->flags & NORM_BIAS))
        reference_fail(memory, "an RMS norm has neither groups nor a bias");
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t row = p->flags & NORM_ROWS ? reference_word(memory, p->rows, r) : r;
        for (uint32_t g = 0; g < n_groups && !memory->failed; g++)
            norm_part(memory, p, r, g, n_groups, row * p->stride + (uint64_t)g * p->width);
    }
}

double reference_norm_slope_at(const struct norm_slope *slope, double dn, double x,
                               uint32_t width) {
    return (dn - slope->dn_mean - (x - slope->mean) / slope->scale * slope->along / width) /
           slope->scale;
}

/* Part `group` of row r; the part of x begins at float `from`. */
static void norm_bwd_part(struct reference_memory *memory, const struct norm_bwd_params *p,
                          uint32_t r, uint32_t group, uint32_t n_groups, uint64_t from) {
    uint64_t first = (uint64_t)group * p->width, at = (uint64_t)r * p->stride + first;
    int has_gain = !(p->flags & NORM_BWD_NORMALIZED), layer = (p->flags & NORM_BWD_LAYER) != 0;
    struct norm_slope slope = {.mean = mean_of(memory, p->x, from, p->width, layer)};
    slope.scale = scale_of(memory, p->x, from, p->width, slope.mean, p->eps);
    for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
        double dn = *reference_float(memory, p->dy, at + i) *
                    (has_gain ? *reference_float(memory, p->gain, first + i) : 1);
        slope.dn_mean += layer ? dn / p->width : 0;
        slope.along += dn * (*reference_float(memory, p->x, from + i) - slope.mean) / slope.scale;
        if (p->flags & NORM_BWD_WRITE_NORMALIZED)
            *reference_float(memory, p->dnormalized, at + i) = dn;
    }
    if (p->flags & NORM_BWD_WRITE_SCALE)
        *reference_float(memory, p->dscale, (uint64_t)r * n_groups + group) = -slope.along /
                                                                              slope.scale;
    for (uint32_t i = 0; i < p->width && !(p->flags & NORM_BWD_NO_OUT) && !memory->failed; i++) {
        double dn = *reference_float(memory, p->dy, at + i) *
                    (has_gain ? *reference_float(memory, p->gain, first + i) : 1);
        double dx = reference_norm_slope_at(&slope, dn, *reference_float(memory, p->x, from + i),
                                            p->width);
        *reference_float(memory, p->dx, at + i) =
            dx + (p->flags & NORM_BWD_ADD ? *reference_float(memory, p->add, at + i) : 0);
    }
}

void reference_norm_bwd(struct reference_memory *memory, const struct norm_bwd_params *p,
                        uint32_t n_rows) {
    uint32_t n_groups = p->n_groups > 1 ? p->n_groups : 1;
    if (!(p->flags & NORM_BWD_LAYER) && n_groups > 1)
        reference_fail(memory, "an RMS norm has no groups");
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t row = p->flags & NORM_BWD_ROWS ? reference_word(memory, p->rows, r) : r;
        for (uint32_t g = 0; g < n_groups && !memory->failed; g++)
            norm_bwd_part(memory, p, r, g, n_groups, row * p->stride + (uint64_t)g * p->width);
    }
}
