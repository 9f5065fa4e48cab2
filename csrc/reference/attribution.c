/* Reference implementations of the ops of attribution. */
#include <math.h>

#include "reference/reference.h"

void reference_difference(struct reference_memory *memory, const struct difference_params *p,
                          uint32_t n_sample_tokens) {
    for (uint32_t s = 0; s < n_sample_tokens && !memory->failed; s++) {
        uint64_t row[2];
        double factor[2] = {1, 1};
        for (uint32_t j = 0; j < 2; j++) {
            uint32_t token = reference_word(memory, p->pairs, 2 * (uint64_t)s + j);
            row[j] = (uint64_t)token * p->stride;
            if (p->raw_width)
                factor[j] = reference_inverse_rms(memory, p->raw, (uint64_t)token * p->raw_stride,
                                                  p->raw_width, p->eps);
        }
        for (uint32_t i = 0; i < p->width && !memory->failed; i++)
            *reference_float(memory, p->dst, (uint64_t)s * p->stride + i) =
                factor[0] * *reference_float(memory, p->x, row[0] + i) -
                factor[1] * *reference_float(memory, p->x, row[1] + i);
    }
}

void reference_accumulate(struct reference_memory *memory, const struct accumulate_params *p,
                          uint32_t n_sample_tokens) {
    for (uint32_t s = 0; s < n_sample_tokens && !memory->failed; s++)
        for (uint32_t k = 0; k < p->n_sources && !memory->failed; k++) {
            uint32_t t = reference_word(memory, p->sources, (uint64_t)s * p->n_sources + k);
            for (uint32_t i = 0; t != NO_SOURCE && i < p->width && !memory->failed; i++)
                *reference_float(memory, p->dst, (uint64_t)s * p->stride + i) +=
                    p->weight * *reference_float(memory, p->src, (uint64_t)t * p->stride + i);
        }
}

/* The mean that the norm subtracts from the residual stream of token t; 0 for an RMS norm. */
static double norm_mean(struct reference_memory *memory, const struct head_inputs_params *p,
                        uint32_t t) {
    double sum = 0;
    if (!(p->flags & HEAD_INPUTS_LAYER))
        return 0;
    for (uint32_t i = 0; i < p->width && !memory->failed; i++)
        sum += *reference_float(memory, p->x, (uint64_t)t * p->d_stride + i);
    return sum / p->width;
}

/* 1 / the norm's scale of token t. */
static double norm_inverse(struct reference_memory *memory, const struct head_inputs_params *p,
                           uint32_t t) {
    double mean = norm_mean(memory, p, t), squares = 0;
    for (uint32_t i = 0; i < p->width && !memory->failed; i++)
        squares += pow(*reference_float(memory, p->x, (uint64_t)t * p->d_stride + i) - mean, 2);
    return 1 / sqrt(squares / p->width + p->eps);
}

/* Keeps what the norm's backward needs of token t at one step: the residual stream, and for every
 * input the component of its gradient along it (`steps` of head_inputs_params). */
static void statistic_keep(struct reference_memory *memory, const struct head_inputs_params *p,
                           uint32_t t, uint64_t step, double inverse) {
    double mean = norm_mean(memory, p, t);
    for (uint32_t i = 0; i < p->width && !memory->failed; i++)
        *reference_float(memory, p->xs, step * p->d_stride + i) =
            *reference_float(memory, p->x, (uint64_t)t * p->d_stride + i) - mean;
    for (uint32_t v = 0; v < p->n_inputs && !memory->failed; v++) {
        double dot = 0;
        for (uint32_t i = 0; i < p->d_head; i++) {
            uint64_t at = (uint64_t)v * p->d_head + i;
            double bias = p->has_bias ? *reference_float(memory, p->bias, at) : 0;
            dot += (*reference_float(memory, p->qkv, (uint64_t)t * p->stride + at) - bias) *
                   *reference_float(memory, p->dqkv, (uint64_t)t * p->stride + at);
        }
        *reference_float(memory, p->steps, step * p->n_inputs + v) = p->weight * inverse * inverse /
                                                                     p->width * dot;
    }
}

void reference_head_inputs(struct reference_memory *memory, const struct head_inputs_params *p,
                           uint32_t n_sample_tokens) {
    int normed = (p->flags & HEAD_INPUTS_NORMED) != 0;
    uint32_t n = p->n_inputs * p->d_head;
    if (n > p->stride ||
        (!normed && (p->first_step > p->n_steps || p->n_sources > p->n_steps - p->first_step)))
        reference_fail(memory, "%u columns in rows of %u, steps %u to %u of %u", n, p->stride,
                       p->first_step, p->first_step + p->n_sources, p->n_steps);
    for (uint32_t s = 0; s < n_sample_tokens && !memory->failed; s++)
        for (uint32_t k = 0; k < p->n_sources && !memory->failed; k++) {
            uint32_t t = reference_word(memory, p->sources, (uint64_t)s * p->n_sources + k);
            if (t == NO_SOURCE)
                continue;
            double inverse = normed ? 1 : norm_inverse(memory, p, t);
            if (!normed)
                statistic_keep(memory, p, t, (uint64_t)s * p->n_steps + p->first_step + k, inverse);
            for (uint32_t i = 0; i < n && !memory->failed; i++)
                *reference_float(memory, p->heads, (uint64_t)s * p->stride + i) +=
                    p->weight * inverse *
                    *reference_float(memory, p->dqkv, (uint64_t)t * p->stride + i);
        }
}

/* The gradient of input v of sample token t. */
static void head_gradient(struct reference_memory *memory, const struct head_gradients_params *p,
                          uint32_t v, uint32_t t) {
    uint64_t row = ((uint64_t)v * p->n_sample_tokens + t) * p->d_stride;
    double mean = 0;
    for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
        double *g = reference_float(memory, p->g, row + i);
        *g *= *reference_float(memory, p->gain, i);
        mean += p->flags & HEAD_GRADIENTS_LAYER ? *g / p->width : 0;
    }
    for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
        double *g = reference_float(memory, p->g, row + i);
        *g -= mean;
        for (uint32_t k = 0; k < p->n_steps; k++) {
            uint64_t step = (uint64_t)t * p->n_steps + k;
            *g -= *reference_float(memory, p->steps, step * p->n_inputs + v) *
                  *reference_float(memory, p->xs, step * p->d_stride + i);
        }
    }
}

void reference_head_gradients(struct reference_memory *memory,
                              const struct head_gradients_params *p) {
    for (uint32_t v = 0; v < p->n_inputs && !memory->failed; v++)
        for (uint32_t t = 0; t < p->n_sample_tokens && !memory->failed; t++)
            head_gradient(memory, p, v, t);
}

void reference_dots(struct reference_memory *memory, const struct dots_params *p) {
    for (uint32_t i = 0; i < p->n_a && !memory->failed; i++)
        for (uint32_t j = 0; j < p->n_b && !memory->failed; j++) {
            double sum = 0;
            for (uint32_t k = 0; k < p->n_k && !memory->failed; k++)
                sum += *reference_float(memory, p->a, (uint64_t)i * p->n_k + k) *
                       *reference_float(memory, p->b, (uint64_t)j * p->n_k + k);
            *reference_float(memory, p->dst, (uint64_t)i * p->n_b + j) = sum;
        }
}

void reference_node_dims(struct reference_memory *memory, const struct node_dims_params *p,
                         uint32_t n_nodes) {
    for (uint32_t u = 0; u < n_nodes && !memory->failed; u++) {
        uint64_t du = (uint64_t)u * p->n_sample_tokens,
                 g = (uint64_t)reference_word(memory, p->groups, u) * p->n_sample_tokens;
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            double sum = 0;
            for (uint32_t t = 0; t < p->n_sample_tokens && !memory->failed; t++)
                sum += *reference_float(memory, p->du, (du + t) * p->d_stride + i) *
                       *reference_float(memory, p->g, (g + t) * p->d_stride + i);
            *reference_float(memory, p->dims, (uint64_t)u * p->width + i) = sum;
        }
    }
}
