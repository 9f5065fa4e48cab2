/* Twins of the backward kernels, but for the product's (twin_linear.c). */
#include <math.h>

#include "ops/twins.h"

/* --- row by row ---------------------------------------------------------------------------------------------------------------------- */

/* Gradient with respect to x of sum_i dn[i] x[i] / scale, scale = sqrt(mean x^2 + eps): dx[i] = dn[i] / scale - n[i] (dn . n) / (width scale). */
struct norm_slope { double scale, along; /* dn . n */ };

static double norm_slope_at(const struct norm_slope *slope, double dn, double x, uint32_t width) {
    return (dn - x / slope->scale * slope->along / width) / slope->scale;
}

void twin_norm_bwd(struct twin_memory *memory, const struct norm_bwd_params *p, uint32_t n_rows) {
    int has_gain = !(p->flags & NORM_BWD_NORMALIZED);
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t from = (uint64_t)(p->flags & NORM_BWD_ROWS ? twin_word(memory, p->rows, r) : r) * p->stride, at = (uint64_t)r * p->stride;
        struct norm_slope slope = {0};
        double squares = 0;
        for (uint32_t i = 0; i < p->width; i++)
            squares += *twin_float(memory, p->x, from + i) * *twin_float(memory, p->x, from + i);
        slope.scale = sqrt(squares / p->width + p->eps);
        for (uint32_t i = 0; i < p->width; i++) {
            double dn = *twin_float(memory, p->dy, at + i) * (has_gain ? *twin_float(memory, p->gain, i) : 1);
            slope.along += dn * *twin_float(memory, p->x, from + i) / slope.scale;
            if (p->flags & NORM_BWD_WRITE_NORMALIZED)
                *twin_float(memory, p->dnormalized, at + i) = dn;
        }
        if (p->flags & NORM_BWD_WRITE_SCALE)
            *twin_float(memory, p->dscale, r) = -slope.along / slope.scale;
        for (uint32_t i = 0; i < p->width && !(p->flags & NORM_BWD_NO_OUT); i++) {
            double dn = *twin_float(memory, p->dy, at + i) * (has_gain ? *twin_float(memory, p->gain, i) : 1);
            double dx = norm_slope_at(&slope, dn, *twin_float(memory, p->x, from + i), p->width);
            *twin_float(memory, p->dx, at + i) = dx + (p->flags & NORM_BWD_ADD ? *twin_float(memory, p->add, at + i) : 0);
        }
    }
}

static void activate(uint32_t act, double x, double *value, double *slope) {
    const double pi = acos(-1);
    if (act == ACT_SILU) {
        double s = 1 / (1 + exp(-x));
        *value = x * s;
        *slope = s + x * s * (1 - s);
    } else if (act == ACT_GELU_TANH) {
        double c = sqrt(2 / pi), t = tanh(c * (x + 0.044715 * x * x * x)), e = cosh(c * (x + 0.044715 * x * x * x));
        *value = 0.5 * x * (1 + t);
        *slope = 0.5 * (1 + t) + (isinf(e) ? 0 : 0.5 * x * c * (1 + 3 * 0.044715 * x * x) / (e * e));
    } else {
        *value = 0.5 * x * erfc(-x * sqrt(0.5));
        *slope = 0.5 * erfc(-x * sqrt(0.5)) + x * exp(-x * x / 2) / sqrt(2 * pi);
    }
}

void twin_act_bwd(struct twin_memory *memory, const struct act_bwd_params *p, uint32_t n_tokens) {
    if (p->act > ACT_GELU)
        twin_fail(memory, "there is no activation %u", p->act);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            uint64_t gate = (uint64_t)t * p->in_stride + i, up = gate + p->width;
            double d = *twin_float(memory, p->dpost, (uint64_t)t * p->out_stride + i), value, slope;
            activate(p->act, *twin_float(memory, p->gate_up, gate), &value, &slope);
            *twin_float(memory, p->dgate_up, gate) = d * *twin_float(memory, p->gate_up, up) * slope;
            *twin_float(memory, p->dgate_up, up) = d * value;
        }
}

/* --- attention ----------------------------------------------------------------------------------------------------------------------- */

static void head_rotate_back(struct twin_memory *memory, const struct rope_bwd_params *p, uint64_t base, uint32_t pos) {
    uint32_t half = p->d_head / 2;
    for (uint32_t i = 0; i < half; i++) {
        double *a = twin_float(memory, p->dqkv, base + i), *b = twin_float(memory, p->dqkv, base + half + i), old_a = *a, old_b = *b;
        double c = *twin_float(memory, p->angles, ((uint64_t)pos * half + i) * 2), s = *twin_float(memory, p->angles, ((uint64_t)pos * half + i) * 2 + 1);
        *a = old_a * c + old_b * s;
        *b = old_b * c - old_a * s;
    }
}

static void head_norm_back(struct twin_memory *memory, const struct rope_bwd_params *p, uint64_t base, uint64_t gain) {
    struct norm_slope slope = {0};
    double squares = 0;
    for (uint32_t i = 0; i < p->d_head; i++)
        squares += *twin_float(memory, p->qkv, base + i) * *twin_float(memory, p->qkv, base + i);
    slope.scale = sqrt(squares / p->d_head + p->eps);
    for (uint32_t i = 0; i < p->d_head; i++)
        slope.along += *twin_float(memory, p->dqkv, base + i) * *twin_float(memory, gain, i) * *twin_float(memory, p->qkv, base + i) / slope.scale;
    for (uint32_t i = 0; i < p->d_head; i++) {
        double *d = twin_float(memory, p->dqkv, base + i);
        *d = norm_slope_at(&slope, *d * *twin_float(memory, gain, i), *twin_float(memory, p->qkv, base + i), p->d_head);
    }
}

void twin_rope_bwd(struct twin_memory *memory, const struct rope_bwd_params *p, uint32_t n_tokens) {
    if (p->d_head == 0 || p->d_head % 2)
        twin_fail(memory, "a head of %u cannot be rotated", p->d_head);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t h = 0; h < p->n_heads + p->n_kv_heads && !memory->failed; h++) {
            uint64_t base = (uint64_t)t * p->stride + (uint64_t)h * p->d_head;
            if (p->flags & ROPE_ROTATE)
                head_rotate_back(memory, p, base, twin_token(memory, p->tokens, t).pos);
            if (p->flags & ROPE_QK_NORM)
                head_norm_back(memory, p, base, h < p->n_heads ? p->q_gain : p->k_gain);
        }
}

void twin_attn_softmax_bwd(struct twin_memory *memory, const struct softmax_bwd_params *p, uint32_t n_tokens) {
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++) {
        uint32_t pos = twin_token(memory, p->tokens, (uint64_t)p->first_token + t).pos, start = twin_window_start(pos, p->window);
        if (pos >= p->key_stride)
            twin_fail(memory, "token %u has more than %u keys", t, p->key_stride);
        for (uint32_t h = 0; h < p->n_heads && !memory->failed; h++) {
            uint64_t row = ((uint64_t)t * p->n_heads + h) * p->key_stride;
            double mean = 0;
            for (uint32_t j = start; j <= pos; j++)
                mean += *twin_float(memory, p->pattern, row + j) * *twin_float(memory, p->dpattern, row + j);
            for (uint32_t j = 0; j < p->key_stride && j < pos + OP_TILE; j++) {
                double *d = twin_float(memory, p->dpattern, row + j);
                if (j < start || j > pos) {
                    *d = 0;
                    continue;
                }
                *d = *twin_float(memory, p->pattern, row + j) * (*d - mean) * p->scale;
                if (p->softcap != 0)
                    *d *= 1 - pow(*twin_float(memory, p->scores, row + j) / p->softcap, 2);
            }
        }
    }
}

/* The sum of one key's column `d` of group g over the queries of its row that see it. */
static double key_sum(struct twin_memory *memory, const struct mix_bwd_params *p, uint32_t key, uint32_t g, uint32_t d) {
    struct token_meta meta = twin_token(memory, p->tokens, key);
    uint32_t group = p->n_heads / p->n_kv_heads, last = meta.row_end < p->last_token ? meta.row_end : p->last_token;
    double sum = 0;
    for (uint32_t t = key > p->first_token ? key : p->first_token; t < last && !memory->failed; t++) {
        if (p->window && t - key >= p->window)
            break;
        for (uint32_t h = g * group; h < (g + 1) * group; h++)
            sum += *twin_float(memory, p->a, ((uint64_t)(t - p->first_token) * p->n_heads + h) * p->key_stride + meta.pos) *
                   *twin_float(memory, p->y, (uint64_t)t * p->y_stride + (uint64_t)h * p->d_head + d);
    }
    return sum;
}

void twin_attn_mix_bwd(struct twin_memory *memory, const struct mix_bwd_params *p, uint32_t n_tiles) {
    if (twin_heads_check(memory, p->n_heads, p->n_kv_heads))
        return;
    for (uint32_t y = 0; y < n_tiles && !memory->failed; y++) {
        struct query_tile tile = twin_tile(memory, p->tokens, p->tiles, y, 0, p->key_stride);
        struct token_meta first = twin_token(memory, p->tokens, tile.first);
        if (first.row_end < tile.first + tile.count)
            twin_fail(memory, "tile %u: its row ends at %u", y, first.row_end);
        for (uint32_t t = tile.first; t < first.row_end && !memory->failed; t++) {
            struct token_meta token = twin_token(memory, p->tokens, t);
            if (token.row != first.row || token.pos != first.pos + (t - tile.first) || token.pos >= p->key_stride)
                twin_fail(memory, "tile %u: query %u is not of its row, or has more than %u keys", y, t, p->key_stride);
        }
        for (uint32_t i = 0; i < tile.count && !memory->failed; i++)
            for (uint32_t g = 0; g < p->n_kv_heads && !memory->failed; g++)
                for (uint32_t d = 0; d < p->d_head && !memory->failed; d++) {
                    double *sum = twin_float(memory, p->sums, ((uint64_t)tile.first + i) * p->out_stride + (uint64_t)g * p->d_head + d);
                    *sum = (p->add ? *sum : 0) + key_sum(memory, p, tile.first + i, g, d);
                }
    }
}

/* --- scalars of the logits ----------------------------------------------------------------------------------------------------------- */

static double cap(double x, double softcap) {
    return softcap != 0 ? softcap * tanh(x / softcap) : x;
}

/* The cap's slope where it gave `capped`. */
static double cap_slope(double capped, double softcap) {
    return softcap != 0 ? 1 - pow(capped / softcap, 2) : 1;
}

void twin_pair_grad(struct twin_memory *memory, const struct pair_grad_params *p, uint32_t n_rows) {
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        double slope[2];
        for (uint32_t i = 0; i < 2; i++) {
            double sum = 0;
            for (uint32_t d = 0; d < p->width; d++)
                sum += *twin_float(memory, p->normed, (uint64_t)r * p->stride + d) * *twin_float(memory, p->rows, (2 * (uint64_t)r + i) * p->stride + d);
            sum = cap(sum, p->softcap);
            *twin_float(memory, p->logits, 2 * (uint64_t)r + i) = sum;
            slope[i] = cap_slope(sum, p->softcap) * *twin_float(memory, p->weights, r);
        }
        for (uint32_t d = 0; d < p->width; d++)
            *twin_float(memory, p->dnormed, (uint64_t)r * p->stride + d) =
                slope[0] * *twin_float(memory, p->rows, 2 * (uint64_t)r * p->stride + d) -
                slope[1] * *twin_float(memory, p->rows, (2 * (uint64_t)r + 1) * p->stride + d);
    }
}

/* log sum exp of a row of logits, capped. */
static double log_sum(struct twin_memory *memory, const struct logit_grad_params *p, uint64_t logits, double softcap, uint64_t row) {
    double top = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < p->width; i++)
        top = fmax(top, cap(*twin_float(memory, logits, row + i), softcap));
    for (uint32_t i = 0; i < p->width; i++)
        sum += exp(cap(*twin_float(memory, logits, row + i), softcap) - top);
    return top + log(sum);
}

void twin_logit_grad(struct twin_memory *memory, const struct logit_grad_params *p, uint32_t n_rows) {
    if (p->kind > LOGIT_GRAD_DIRECTIONAL_KL)
        twin_fail(memory, "there is no scalar %u of the logits", p->kind);
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t row = (uint64_t)r * p->stride;
        double value = 0, weight = *twin_float(memory, p->weights, r), own = log_sum(memory, p, p->logits, p->softcap, row), of_reference = 0, of_other = 0;
        uint32_t target = 0;
        if (p->kind == LOGIT_GRAD_LOG_PROB)
            target = twin_word(memory, p->targets, r);
        else
            of_reference = log_sum(memory, p, p->reference, p->reference_softcap, row);
        if (p->kind == LOGIT_GRAD_DIRECTIONAL_KL)
            of_other = log_sum(memory, p, p->other, p->reference_softcap, row);
        for (uint32_t i = 0; i < p->stride && !memory->failed; i++) {
            double *logit = twin_float(memory, p->logits, row + i), d;
            if (i >= p->width) {
                *logit = 0;
                continue;
            }
            double capped = cap(*logit, p->softcap), log_p = capped - own;
            if (p->kind == LOGIT_GRAD_LOG_PROB) {
                d = (i == target) - exp(log_p);
                value += i == target ? log_p : 0;
            } else {
                double log_reference = cap(*twin_float(memory, p->reference, row + i), p->reference_softcap) - of_reference;
                double kl = exp(log_reference) * (log_reference - log_p), dkl = exp(log_p) - exp(log_reference);
                if (p->kind == LOGIT_GRAD_DIRECTIONAL_KL) {
                    double log_other = cap(*twin_float(memory, p->other, row + i), p->reference_softcap) - of_other;
                    kl = exp(log_other) * (log_other - log_p) - kl;
                    dkl = exp(log_p) - exp(log_other) - dkl;
                }
                d = dkl;
                value += kl;
            }
            *logit = weight * d * cap_slope(capped, p->softcap);
        }
        *twin_float(memory, p->values, r) = value;
    }
}
