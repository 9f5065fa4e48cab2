/* Reference implementations of the ops of circuits. */
#include <math.h>

#include "reference/reference.h"

/* The norm of an assembled row, in place. */
static void input_norm(struct reference_memory *memory, const struct circuit_inputs_params *p,
                       uint64_t row) {
    double mean = 0, inverse;
    if (p->kind > NORM_KIND_NONE)
        reference_fail(memory, "norm %u", p->kind);
    if (p->kind == NORM_KIND_NONE)
        return;
    for (uint32_t i = 0; i < p->width && p->kind == NORM_KIND_LAYER && !memory->failed; i++)
        mean += *reference_float(memory, p->dst, row + i) / p->width;
    for (uint32_t i = 0; i < p->width && !memory->failed; i++)
        *reference_float(memory, p->dst, row + i) -= mean;
    inverse = reference_inverse_rms(memory, p->dst, row, p->width, p->eps);
    for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
        double *v = reference_float(memory, p->dst, row + i);
        *v *= inverse * *reference_float(memory, p->gain, i);
        if (p->kind == NORM_KIND_LAYER && p->flags & INPUTS_BIAS)
            *v += *reference_float(memory, p->bias, i);
    }
}

void reference_circuit_inputs(struct reference_memory *memory,
                              const struct circuit_inputs_params *p, uint32_t n_entries,
                              uint32_t n_refs) {
    (void)n_refs;
    if (p->all_tokens && p->n_tokens > p->n_chunk)
        reference_fail(memory, "%u tokens of %u", p->n_tokens, p->n_chunk);
    for (uint32_t e = 0; e < n_entries && !memory->failed; e++)
        for (uint32_t j = 0; j < p->n_tokens && !memory->failed; j++) {
            uint32_t t = p->all_tokens ? j : reference_word(memory, p->tokens, j),
                     begin = reference_word(memory, p->first, e),
                     end = reference_word(memory, p->first, e + 1);
            uint64_t to = ((uint64_t)e * p->n_tokens + j) * p->stride;
            if (t >= p->n_chunk)
                reference_fail(memory, "token %u of %u", t, p->n_chunk);
            for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
                double v = *reference_float(memory, p->x, (uint64_t)t * p->stride + i);
                for (uint32_t k = begin; k < end; k++)
                    v += *reference_float(
                        memory, p->d,
                        ((uint64_t)reference_word(memory, p->refs, k) * p->n_chunk + t) *
                                p->stride +
                            i);
                *reference_float(memory, p->dst, to + i) = v;
            }
            input_norm(memory, p, to);
        }
}

/* Writes one head of one token, RMS-normalised and rotated where it is a query or key that does not
 * come from the base run. */
static void place(struct reference_memory *memory, const struct circuit_place_params *p,
                  uint64_t entry, uint32_t t) {
    uint32_t word = reference_word(memory, p->entries, entry), kind = word & 3, half = p->d_rot / 2;
    uint32_t from_array = reference_word(memory, p->entries, entry + 1),
             column = reference_word(memory, p->entries, entry + 2);
    uint32_t to_array = reference_word(memory, p->entries, entry + 3);
    struct token_meta token = reference_token(memory, p->tokens, t);
    int base = (word & PLACE_BASE) != 0, turned = !base && kind != PLACE_V;
    uint64_t source = base ? p->base : p->x, dst = kind == PLACE_Q   ? p->q
                                                   : kind == PLACE_K ? p->k_cache
                                                                     : p->v_cache;
    uint64_t gain = kind == PLACE_Q ? p->q_gain : p->k_gain,
             angles = kind == PLACE_Q ? p->q_angles : p->angles;
    uint64_t from = (base ? (uint64_t)t * p->base_stride
                          : ((uint64_t)from_array * p->n_tokens + t) * p->x_stride) +
                    column;
    uint64_t to = kind == PLACE_Q ? ((uint64_t)to_array * p->n_tokens + t) * p->q_stride
                                  : ((uint64_t)to_array * p->n_slots + token.slot) * p->d_head;
    double inverse = turned && p->flags & PLACE_QK_NORM
                         ? reference_inverse_rms(memory, source, from, p->d_head, p->eps)
                         : 1;
    if (kind > PLACE_V || (kind != PLACE_Q && token.slot >= p->n_slots))
        reference_fail(memory, "kind %u, slot %u of %u", kind, token.slot, p->n_slots);
    for (uint32_t i = 0; i < p->d_head && !memory->failed; i++)
        *reference_float(memory, dst, to + i) =
            *reference_float(memory, source, from + i) *
            (turned && p->flags & PLACE_QK_NORM ? inverse * *reference_float(memory, gain, i) : 1);
    for (uint32_t i = 0; i < half && turned && !memory->failed; i++) {
        int neighbours = (p->flags & PLACE_INTERLEAVED) != 0;
        uint64_t angle = ((uint64_t)token.angle * half + i) * 2;
        double *first = reference_float(memory, dst, to + (neighbours ? 2 * i : i)),
               *second = reference_float(memory, dst, to + (neighbours ? 2 * i + 1 : half + i));
        double a = *first, b = *second, c = *reference_float(memory, angles, angle),
               s = *reference_float(memory, angles, angle + 1);
        *first = a * c - b * s;
        *second = b * c + a * s;
    }
}

void reference_circuit_place(struct reference_memory *memory, const struct circuit_place_params *p,
                             uint32_t n_entries) {
    if (p->d_rot % 2 || p->d_rot > p->d_head)
        reference_fail(memory, "%u channels of a head of %u cannot be rotated", p->d_rot,
                       p->d_head);
    for (uint32_t e = 0; e < n_entries && !memory->failed; e++)
        for (uint32_t t = 0; t < p->n_tokens && !memory->failed; t++)
            place(memory, p, 4 * (uint64_t)e, t);
}

void reference_circuit_heads(struct reference_memory *memory, const struct circuit_heads_params *p,
                             uint32_t n_entries) {
    for (uint32_t e = 0; e < n_entries && !memory->failed; e++)
        for (uint32_t t = 0; t < p->n_tokens && !memory->failed; t++) {
            uint32_t state = reference_word(memory, p->entries, 4 * (uint64_t)e),
                     head = reference_word(memory, p->entries, 4 * (uint64_t)e + 1);
            uint32_t scale_row = reference_word(memory, p->entries, 4 * (uint64_t)e + 3),
                     column = p->flags & HEADS_COLUMN ? head * p->d_head : 0;
            uint64_t row =
                ((uint64_t)reference_word(memory, p->entries, 4 * (uint64_t)e + 2) * p->n_tokens +
                 t) *
                p->out_stride;
            uint64_t base = (uint64_t)t * p->base_stride + (uint64_t)head * p->d_head,
                     from = ((uint64_t)state * p->n_tokens + t) * p->z_stride +
                            (p->flags & HEADS_OFFSET ? scale_row : 0);
            double scale = 1, base_scale = 1;
            if (p->flags & HEADS_SCALED && p->flags & HEADS_OFFSET)
                reference_fail(memory, "an entry with both a scale and an offset");
            if (p->flags & HEADS_SCALED) {
                scale = *reference_float(memory, p->scale, (uint64_t)scale_row * p->n_tokens + t);
                base_scale = *reference_float(memory, p->base_scale, t);
            }
            for (uint32_t i = 0; i < p->out_stride && p->flags & HEADS_ZERO && !memory->failed; i++)
                *reference_float(memory, p->dst, row + i) = 0;
            for (uint32_t i = 0; i < p->d_head && !memory->failed; i++) {
                double there = *reference_float(memory, p->base, base + i),
                       here = state == NO_DIFFERENCE ? there
                                                     : *reference_float(memory, p->z, from + i);
                *reference_float(memory, p->dst, row + column + i) =
                    here / scale - (p->flags & HEADS_DIFFERENCE ? there / base_scale : 0);
            }
        }
}

void reference_circuit_outputs(struct reference_memory *memory,
                               const struct circuit_outputs_params *p, uint32_t n_rows) {
    if (p->n_tokens == 0)
        reference_fail(memory, "rows of no tokens");
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t at = (uint64_t)r * p->stride,
                 base = (uint64_t)((p->first + r) % p->n_tokens) * p->stride;
        double inverse = p->flags & OUTPUTS_NORM
                             ? reference_inverse_rms(memory, p->x, at, p->width, p->eps)
                             : 1;
        for (uint32_t i = 0; i < p->width && !memory->failed; i++)
            *reference_float(memory, p->dst, at + i) =
                *reference_float(memory, p->x, at + i) * inverse *
                    (p->flags & OUTPUTS_NORM ? *reference_float(memory, p->gain, i) : 1) -
                *reference_float(memory, p->base, base + i);
    }
}

void reference_pair_logits(struct reference_memory *memory, const struct pair_logits_params *p,
                           uint32_t n_entries) {
    for (uint32_t e = 0; e < n_entries && !memory->failed; e++)
        for (uint32_t k = 0; k < 2 * p->n && !memory->failed; k++) {
            double sum = 0;
            for (uint32_t i = 0; i < p->width; i++)
                sum += *reference_float(memory, p->normed,
                                        ((uint64_t)e * p->n + k / 2) * p->stride + i) *
                       *reference_float(memory, p->rows, (uint64_t)k * p->stride + i);
            if (p->has_bias)
                sum += *reference_float(memory, p->bias, reference_token(memory, p->ids, k).id);
            *reference_float(memory, p->logits,
                             2 * (uint64_t)e * p->n + k) = reference_cap(sum, p->softcap);
        }
}

void reference_logit_metrics(struct reference_memory *memory, const struct logit_metrics_params *p,
                             uint32_t n_rows) {
    if (p->n == 0)
        reference_fail(memory, "rows without references");
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint32_t j = (p->first + r) % p->n, target = reference_word(memory, p->targets, j),
                 greedy = 0;
        uint64_t row = (uint64_t)r * p->stride, at = (uint64_t)j * p->stride;
        double x = reference_log_sum(memory, p->logits, row, p->width, p->softcap),
               reference = reference_log_sum(memory, p->reference, at, p->width, p->softcap);
        double other = reference_log_sum(memory, p->other, at, p->width, p->softcap), kl = 0,
               kl_other = 0, best = -INFINITY;
        if (target >= p->width)
            reference_fail(memory, "target %u of %u", target, p->width);
        for (uint32_t i = 0; i < p->width && !memory->failed; i++) {
            double logit = reference_cap(*reference_float(memory, p->logits, row + i), p->softcap);
            double a = reference_cap(*reference_float(memory, p->reference, at + i), p->softcap) -
                       reference,
                   b = reference_cap(*reference_float(memory, p->other, at + i), p->softcap) -
                       other;
            kl += exp(a) * (a - (logit - x));
            kl_other += exp(b) * (b - (logit - x));
            if (logit > best) {
                best = logit;
                greedy = i;
            }
        }
        const double values[4] = {
            kl, kl_other,
            reference_cap(*reference_float(memory, p->logits, row + target), p->softcap) - x,
            greedy};
        for (uint32_t k = 0; k < 4 && !memory->failed; k++)
            *reference_float(memory, p->values, 4 * (uint64_t)r + k) = values[k];
    }
}
