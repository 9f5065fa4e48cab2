/* Twins of what works row by row: norm, activation, edits, copies, the sum over heads, the largest of a row. */
#include <float.h>
#include <math.h>

#include "ops/twins.h"

void twin_norm(struct twin_memory *memory, const struct norm_params *p, uint32_t n_rows) {
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t from = (uint64_t)(p->flags & NORM_ROWS ? twin_word(memory, p->rows, r) : r) * p->stride, to = (uint64_t)r * p->stride;
        double scale;
        if (p->flags & NORM_READ_NORMALIZED) {
            scale = 1; /* x is normalised already */
        } else if (p->flags & NORM_READ_SCALE) {
            scale = *twin_float(memory, p->scale, r);
        } else {
            double sum = 0;
            for (uint32_t i = 0; i < p->width; i++)
                sum += *twin_float(memory, p->x, from + i) * *twin_float(memory, p->x, from + i);
            scale = sqrt(sum / p->width + p->eps);
            if (p->flags & NORM_WRITE_SCALE)
                *twin_float(memory, p->scale, r) = scale;
        }
        for (uint32_t i = 0; i < p->width; i++) {
            double x = *twin_float(memory, p->x, from + i) / scale;
            if (p->flags & NORM_WRITE_NORMALIZED)
                *twin_float(memory, p->normalized, to + i) = x;
            x *= *twin_float(memory, p->gain, i);
            if (p->flags & NORM_ADD)
                x += *twin_float(memory, p->add, to + i);
            if (!(p->flags & NORM_NO_OUT))
                *twin_float(memory, p->dst, to + i) = x;
        }
    }
}

double twin_activate(uint32_t act, double x) {
    switch (act) {
    case ACT_SILU:
        return x / (1 + exp(-x));
    case ACT_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x)));
    default:
        return 0.5 * x * erfc(-x * sqrt(0.5)); /* not 1 + erf, which loses the tail of a very negative x */
    }
}

void twin_act(struct twin_memory *memory, const struct act_params *p, uint32_t n_tokens) {
    if (p->act > ACT_GELU)
        twin_fail(memory, "there is no activation %u", p->act);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width; i++) {
            double gate = *twin_float(memory, p->gate_up, (uint64_t)t * p->in_stride + i);
            double up = *twin_float(memory, p->gate_up, (uint64_t)t * p->in_stride + p->width + i);
            *twin_float(memory, p->dst, (uint64_t)t * p->out_stride + i) = twin_activate(p->act, gate) * up;
        }
}

/* x[start : end] of one (token, head) with the operand at `operand`, which steps by p->step. */
static void edit_one(struct twin_memory *memory, const struct edit_params *p, const struct edit_entry *entry, uint64_t x, uint64_t operand,
                     uint32_t start, uint32_t end) {
    double factor = entry->coefficient;
    if (p->kind == EDIT_ADD_SCALED)
        factor /= *twin_float(memory, p->scale, entry->token);
    if (p->kind == EDIT_ABLATE) {
        double along = 0;
        for (uint32_t i = start; i < end; i++)
            along += *twin_float(memory, p->x, x + i) * *twin_float(memory, p->operand, operand + (uint64_t)i * p->step);
        factor = -along;
    }
    for (uint32_t i = start; i < end; i++) {
        double *to = twin_float(memory, p->x, x + i), y = *twin_float(memory, p->operand, operand + (uint64_t)i * p->step);
        *to = p->kind == EDIT_SET ? y : p->kind == EDIT_SCALE ? *to * y : *to + factor * y;
    }
}

void twin_edit(struct twin_memory *memory, const struct edit_params *p, uint32_t n_entries, uint32_t n_heads) {
    if (p->kind > EDIT_ADD_SCALED)
        twin_fail(memory, "there is no edit %u", p->kind);
    for (uint32_t e = 0; e < n_entries && !memory->failed; e++) {
        union { uint32_t bits; float value; } coefficient = {.bits = twin_word(memory, p->entries, 4 * (uint64_t)e + 2)};
        struct edit_entry entry = {.token = twin_word(memory, p->entries, 4 * (uint64_t)e), .operand = twin_word(memory, p->entries, 4 * (uint64_t)e + 1),
                                   .coefficient = coefficient.value};
        uint32_t start = 0, end = p->width;
        if (p->flags & EDIT_KEYS) { /* only the keys that this query sees */
            uint32_t seen = twin_token(memory, p->tokens, entry.token).pos + 1;
            end = seen < p->width ? seen : p->width;
            start = p->window && end > p->window ? end - p->window : 0;
        }
        for (uint32_t h = 0; h < n_heads && !memory->failed; h++)
            edit_one(memory, p, &entry, (uint64_t)entry.token * p->token_stride + (uint64_t)twin_word(memory, p->heads, h) * p->head_stride,
                     entry.operand + (uint64_t)h * p->head_step, start, end);
    }
}

void twin_copy(struct twin_memory *memory, const struct copy_params *p) {
    for (uint32_t r = 0; r < p->n_rows && !memory->failed; r++) {
        uint64_t from = (uint64_t)(p->flags & COPY_ROWS ? twin_word(memory, p->rows, r) : r) * p->x_stride, to = (uint64_t)r * p->out_stride;
        for (uint32_t i = 0; i < p->width; i++) {
            double add = p->flags & COPY_ADD ? *twin_float(memory, p->add, to + i) : 0;
            *twin_float(memory, p->dst, to + i) = *twin_float(memory, p->x, from + i) + add;
        }
    }
}

void twin_sum_heads(struct twin_memory *memory, const struct sum_heads_params *p, uint32_t n_tokens) {
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            double sum = p->has_bias ? *twin_float(memory, p->bias, i) : 0;
            for (uint32_t h = 0; h < p->n_heads; h++)
                sum += *twin_float(memory, p->x, ((uint64_t)t * p->n_heads + h) * p->head_stride + i);
            *twin_float(memory, p->dst, (uint64_t)t * p->out_stride + i) = sum;
        }
}

/* Where a value goes that is to stand behind all that are not smaller; k: it is too small for the list. */
static uint32_t topk_place(struct twin_memory *memory, const struct topk_params *p, uint64_t list, double value) {
    uint32_t place = p->k;
    while (place > 0 && *twin_float(memory, p->values, list + place - 1) < value)
        place--;
    return place;
}

void twin_topk(struct twin_memory *memory, const struct topk_params *p) {
    if (p->k == 0 || p->k > TOPK_MAX || p->x_stride < p->n_columns || (uint64_t)p->first + p->n_columns > 1u << 24)
        twin_fail(memory, "no list of the %u largest of columns %u to %u", p->k, p->first, p->first + p->n_columns);
    for (uint32_t r = 0; r < p->n_rows && !memory->failed; r++) {
        uint64_t list = (uint64_t)r * p->k;
        for (uint32_t j = 0; j < p->k && p->flags & TOPK_BEGIN; j++) {
            *twin_float(memory, p->values, list + j) = -FLT_MAX;
            *twin_float(memory, p->indices, list + j) = 0;
        }
        for (uint32_t c = 0; c < p->n_columns && !memory->failed; c++) {
            double value = *twin_float(memory, p->x, (uint64_t)r * p->x_stride + c) * (p->flags & TOPK_SCALED ? *twin_float(memory, p->factor, c) : 1);
            uint32_t place = topk_place(memory, p, list, value);
            for (uint32_t j = p->k; j-- > place + 1;) {
                *twin_float(memory, p->values, list + j) = *twin_float(memory, p->values, list + j - 1);
                *twin_float(memory, p->indices, list + j) = *twin_float(memory, p->indices, list + j - 1);
            }
            if (place < p->k) {
                *twin_float(memory, p->values, list + place) = value;
                *twin_float(memory, p->indices, list + place) = p->first + c;
            }
        }
    }
}
