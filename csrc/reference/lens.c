/* Reference implementations of the lens's ops: the outputs of heads, the norms of rows, the largest
 * values of a row; the token that a row of logits picks. */
#include <float.h>
#include <math.h>

#include "reference/reference.h"

/* dst[h, n] = scale * gain[n] * sum_i x[h / group, i] W[n, h * d_head + i] */
void reference_head_out(struct reference_memory *memory, const struct op_matrix *matrix,
                        const struct op_head_out_args *args) {
    if (args->n_kv_heads == 0 || args->n_heads % args->n_kv_heads ||
        (uint64_t)args->n_heads * args->d_head != matrix->k)
        reference_fail(memory, "%u heads of %u over %u do not make %u inputs", args->n_heads,
                       args->d_head, args->n_kv_heads, matrix->k);
    for (uint32_t h = 0; h < args->n_heads && !memory->failed; h++)
        for (uint32_t n = 0; n < matrix->n && !memory->failed; n++) {
            uint64_t from = (uint64_t)(h / (args->n_heads / args->n_kv_heads)) * args->d_head;
            double sum = 0;
            for (uint32_t i = 0; i < args->d_head; i++)
                sum += *reference_float(memory, args->x, from + i) *
                       reference_weight(memory, matrix, n, h * args->d_head + i);
            sum *= matrix->scale != 0 ? matrix->scale : 1;
            *reference_float(memory, args->dst, (uint64_t)h * args->dst_stride + n) =
                args->gain ? sum * *reference_float(memory, args->gain, n) : sum;
        }
}

/* dst[n] = 1 / |W[n, :]| */
void reference_row_norms(struct reference_memory *memory, const struct op_matrix *matrix,
                         uint64_t dst) {
    for (uint32_t n = 0; n < matrix->n && !memory->failed; n++) {
        double sum = 0;
        for (uint32_t k = 0; k < matrix->k; k++) {
            double w = reference_weight(memory, matrix, n, k);
            sum += w * w;
        }
        *reference_float(memory, dst, n) = sum > 0 ? 1 / sqrt(sum) : 0;
    }
}

/* The place of a value in the list, behind all values that are not smaller; k: the value is too
 * small for the list. */
static uint32_t topk_place(struct reference_memory *memory, const struct topk_params *p,
                           uint64_t list, double value) {
    uint32_t place = p->k;
    while (place > 0 && *reference_float(memory, p->values, list + place - 1) < value)
        place--;
    return place;
}

void reference_topk(struct reference_memory *memory, const struct topk_params *p) {
    if (p->k == 0 || p->k > TOPK_MAX || p->x_stride < p->n_columns ||
        (uint64_t)p->first + p->n_columns > 1u << 24)
        reference_fail(memory, "no list of the %u largest of columns %u to %u", p->k, p->first,
                       p->first + p->n_columns);
    for (uint32_t r = 0; r < p->n_rows && !memory->failed; r++) {
        uint64_t list = (uint64_t)r * p->k;
        for (uint32_t j = 0; j < p->k && p->flags & TOPK_BEGIN; j++) {
            *reference_float(memory, p->values, list + j) = -FLT_MAX;
            *reference_float(memory, p->indices, list + j) = 0;
        }
        for (uint32_t c = 0; c < p->n_columns && !memory->failed; c++) {
            double value = *reference_float(memory, p->x, (uint64_t)r * p->x_stride + c) *
                           (p->flags & TOPK_SCALED ? *reference_float(memory, p->factor, c) : 1);
            uint32_t place = topk_place(memory, p, list, value);
            for (uint32_t j = p->k; j-- > place + 1;) {
                *reference_float(memory, p->values, list + j) = *reference_float(memory, p->values,
                                                                                 list + j - 1);
                *reference_float(memory, p->indices,
                                 list + j) = *reference_float(memory, p->indices, list + j - 1);
            }
            if (place < p->k) {
                *reference_float(memory, p->values, list + place) = value;
                *reference_float(memory, p->indices, list + place) = p->first + c;
            }
        }
    }
}

void reference_pick(struct reference_memory *memory, const struct pick_params *p, uint32_t n_rows) {
    if (p->width == 0 || p->width > 1u << 24 || p->x_stride < p->width)
        reference_fail(memory, "no column of the largest of %u in rows of %u", p->width,
                       p->x_stride);
    for (uint32_t r = 0; r < n_rows && !memory->failed; r++) {
        uint64_t row = (uint64_t)r * p->x_stride;
        double best = -INFINITY, first = *reference_float(memory, p->x, row);
        double *dst = reference_float(memory, p->dst, r);
        int bad = fabs(first - p->empty) <= p->near;
        for (uint32_t c = 0; c < p->width && !memory->failed; c++) {
            double value = *reference_float(memory, p->x, row + c);
            bad |= !isfinite(value);
            if (value > best) {
                best = value;
                *dst = c;
            }
        }
        if (bad)
            *dst = -1;
    }
}
