/* Reference implementations of the elementwise ops: the activation and its backward, edits, copies,
 * the sum over heads. */
#include <math.h>

#include "reference/reference.h"

double reference_activate(uint32_t act, double x, double *slope) {
    const double pi = acos(-1), c = sqrt(2 / pi), inner = c * (x + 0.044715 * x * x * x);
    double value, at;
    if (act == ACT_SILU) {
        double s = 1 / (1 + exp(-x));
        value = x / (1 + exp(-x));
        at = s + x * s * (1 - s);
    } else if (act == ACT_GELU_TANH) {
        double t = tanh(inner), e = cosh(inner);
        value = 0.5 * x * (1 + t);
        at = 0.5 * (1 + t) + (isinf(e) ? 0 : 0.5 * x * c * (1 + 3 * 0.044715 * x * x) / (e * e));
    } else if (act == ACT_RELU) {
        value = x < 0 ? 0 : x; /* NaN stays NaN */
        at = x > 0;
    } else if (act == ACT_RELU2) {
        value = x < 0 ? 0 : x * x;
        at = x > 0 ? 2 * x : 0;
    } else {
        /* erfc, because 1 + erf loses all digits for a very negative x */
        value = 0.5 * x * erfc(-x * sqrt(0.5));
        at = 0.5 * erfc(-x * sqrt(0.5)) + x * exp(-x * x / 2) / sqrt(2 * pi);
    }
    if (slope)
        *slope = at;
    return value;
}

void reference_act(struct reference_memory *memory, const struct act_params *p, uint32_t n_tokens) {
    if (p->act > ACT_RELU2)
        reference_fail(memory, "there is no activation %u", p->act);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width; i++) {
            double gate = *reference_float(memory, p->gate_up, (uint64_t)t * p->in_stride + i);
            double up = p->plain ? 1
                                 : *reference_float(memory, p->gate_up,
                                                    (uint64_t)t * p->in_stride + p->width + i);
            *reference_float(memory, p->dst, (uint64_t)t * p->out_stride + i) =
                reference_activate(p->act, gate, NULL) * up;
        }
}

/* Edits x[start : end] of one (token, head) with the operand at `operand`, in steps of p->step. */
static void edit_one(struct reference_memory *memory, const struct edit_params *p,
                     const struct edit_entry *entry, uint64_t x, uint64_t operand, uint32_t start,
                     uint32_t end) {
    double factor = entry->coefficient;
    if (p->kind == EDIT_ADD_SCALED)
        factor /= *reference_float(memory, p->scale, entry->token);
    if (p->kind == EDIT_ABLATE) {
        double along = 0;
        for (uint32_t i = start; i < end; i++)
            along += *reference_float(memory, p->x, x + i) *
                     *reference_float(memory, p->operand, operand + (uint64_t)i * p->step);
        factor = -along;
    }
    for (uint32_t i = start; i < end; i++) {
        double *to = reference_float(memory, p->x, x + i),
               y = *reference_float(memory, p->operand, operand + (uint64_t)i * p->step);
        *to = p->kind == EDIT_SET ? y : p->kind == EDIT_SCALE ? *to * y : *to + factor * y;
    }
}

void reference_edit(struct reference_memory *memory, const struct edit_params *p,
                    uint32_t n_entries, uint32_t n_edit_heads) {
    if (p->kind > EDIT_ADD_SCALED)
        reference_fail(memory, "there is no edit %u", p->kind);
    for (uint32_t e = 0; e < n_entries && !memory->failed; e++) {
        union {
            uint32_t bits;
            float value;
        } coefficient = {.bits = reference_word(memory, p->entries, 4 * (uint64_t)e + 2)};
        struct edit_entry entry = {
            .token = reference_word(memory, p->entries, 4 * (uint64_t)e),
            .operand = reference_word(memory, p->entries, 4 * (uint64_t)e + 1),
            .coefficient = coefficient.value,
        };
        uint32_t start = 0, end = p->width;
        if (p->flags & EDIT_KEYS) { /* only the keys that this query sees */
            uint32_t seen = reference_token(memory, p->tokens, entry.token).pos + 1;
            end = seen < p->width ? seen : p->width;
            start = p->window && end > p->window ? end - p->window : 0;
        }
        for (uint32_t h = 0; h < n_edit_heads && !memory->failed; h++)
            edit_one(memory, p, &entry,
                     (uint64_t)entry.token * p->token_stride +
                         (uint64_t)reference_word(memory, p->heads, h) * p->head_stride,
                     entry.operand + (uint64_t)h * p->head_step, start, end);
    }
}

void reference_copy(struct reference_memory *memory, const struct copy_params *p) {
    for (uint32_t r = 0; r < p->n_rows && !memory->failed; r++) {
        uint64_t from = (uint64_t)(p->flags & COPY_ROWS ? reference_word(memory, p->rows, r) : r) *
                        p->x_stride,
                 to = (uint64_t)r * p->out_stride;
        for (uint32_t i = 0; i < p->width; i++) {
            double add = p->flags & COPY_ADD ? *reference_float(memory, p->add, to + i) : 0;
            *reference_float(memory, p->dst, to + i) = *reference_float(memory, p->x, from + i) +
                                                       add;
        }
    }
}

void reference_sum_heads(struct reference_memory *memory, const struct sum_heads_params *p,
                         uint32_t n_tokens) {
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            double sum = p->has_bias ? *reference_float(memory, p->bias, i) : 0;
            for (uint32_t h = 0; h < p->n_heads; h++)
                sum += *reference_float(memory, p->x,
                                        ((uint64_t)t * p->n_heads + h) * p->head_stride + i);
            *reference_float(memory, p->dst, (uint64_t)t * p->out_stride + i) = sum;
        }
}

void reference_clip(struct reference_memory *memory, const struct clip_params *p,
                    uint32_t n_tokens) {
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            double *x = reference_float(memory, p->x, (uint64_t)t * p->stride + i);
            *x = fmin(fmax(*x, -p->limit), p->limit);
        }
}

void reference_clip_bwd(struct reference_memory *memory, const struct clip_bwd_params *p,
                        uint32_t n_tokens) {
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            uint64_t at = (uint64_t)t * p->stride + i;
            if (fabs(*reference_float(memory, p->x, at)) > p->limit)
                *reference_float(memory, p->d, at) = 0;
        }
}

void reference_act_bwd(struct reference_memory *memory, const struct act_bwd_params *p,
                       uint32_t n_tokens) {
    if (p->act > ACT_RELU2)
        reference_fail(memory, "there is no activation %u", p->act);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            uint64_t gate = (uint64_t)t * p->in_stride + i, up = gate + p->width;
            double d = *reference_float(memory, p->dpost, (uint64_t)t * p->out_stride + i), slope;
            double value = reference_activate(p->act, *reference_float(memory, p->gate_up, gate),
                                              &slope);
            double times = p->plain ? 1 : *reference_float(memory, p->gate_up, up);
            *reference_float(memory, p->dgate_up, gate) = d * times * slope;
            if (!p->plain)
                *reference_float(memory, p->dgate_up, up) = d * value;
        }
}
