/* Reference implementations of the ops on a matrix: the product, its backward, the embedding. */
#include <math.h>

#include "reference/reference.h"

static double half_value(uint32_t h) {
    int exponent = (int)(h >> 10 & 31), mantissa = (int)(h & 1023);
    double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                      : ldexp(mantissa, -24);
    return h & 0x8000 ? -magnitude : magnitude;
}

static double float_value(uint32_t bits) {
    union {
        uint32_t bits;
        float value;
    } pun = {.bits = bits};
    return pun.value;
}

/* W[n, k], or 0 outside the matrix. It lies in panels of 32 rows, in which each cell of 16 bytes
 * holds the next 4 (float32) or 8 (bfloat16, float16) inputs of one row. */
double reference_weight(struct reference_memory *memory, const struct op_matrix *matrix, uint32_t n,
                        uint32_t k) {
    uint32_t c = 0;
    if (n >= matrix->n || k >= matrix->k)
        return 0;
    while (c + 1 < matrix->n_segments && n >= matrix->segments[c + 1].first)
        c++;
    uint32_t row = n - matrix->segments[c].first;
    uint32_t inputs = matrix->type == WEIGHT_F32 ? 4 : 8;
    uint64_t cell = ((uint64_t)(row / OP_PANEL) * matrix->k_cells + k / inputs) * OP_PANEL +
                    row % OP_PANEL;
    if (matrix->type == WEIGHT_F32)
        return float_value(reference_word(memory, matrix->segments[c].address, 4 * cell + k % 4));
    uint32_t word = reference_word(memory, matrix->segments[c].address, 4 * cell + k % 8 / 2);
    uint32_t half = k % 2 ? word >> 16 : word & 0xffff;
    return matrix->type == WEIGHT_BF16 ? float_value(half << 16) : half_value(half);
}

/* dst[m, n] = cap(clamp(scale sum_k x[m, k] W[n, first_k + k] + bias[n])) + add[m, n] */
void reference_linear(struct reference_memory *memory, const struct op_matrix *matrix,
                      const struct op_linear_args *args) {
    uint32_t n_k = args->n_k ? args->n_k : matrix->k;
    /* a slice may reach into the padding, whose weights are zero */
    if (args->first_k + (uint64_t)n_k > matrix->k)
        n_k = matrix->k > args->first_k ? matrix->k - args->first_k : 0;
    for (uint32_t m = 0; m < args->n_rows && !memory->failed; m++) {
        double inverse = 1, squares = 0;
        for (uint32_t k = 0; args->gain && k < matrix->k; k++) {
            double x = *reference_float(memory, args->x, (uint64_t)m * args->x_stride + k);
            squares += x * x;
        }
        if (args->gain)
            inverse = 1 / sqrt(squares / matrix->k + args->eps);
        for (uint32_t n = 0; n < matrix->n && !memory->failed; n++) {
            double sum = 0;
            for (uint32_t k = 0; k < n_k; k++)
                sum += *reference_float(memory, args->x, (uint64_t)m * args->x_stride + k) *
                       inverse * (args->gain ? *reference_float(memory, args->gain, k) : 1) *
                       reference_weight(memory, matrix, n, args->first_k + k);
            sum *= matrix->scale != 0 ? matrix->scale : 1;
            if (args->bias)
                sum += *reference_float(memory, args->bias, n);
            if (args->clip != 0)
                sum = fmin(fmax(sum, -args->clip), args->clip);
            if (args->softcap != 0)
                sum = args->softcap * tanh(sum / args->softcap);
            if (args->add)
                sum += *reference_float(memory, args->add, (uint64_t)m * args->dst_stride + n);
            *reference_float(memory, args->dst, (uint64_t)m * args->dst_stride + n) = sum;
        }
    }
}

/* Finishes outputs (n, n + half) of norm(x) W^T + bias: act(first) * second, or the rotated halves
 * of a head, written to dst (q) and to the cache (k, v). */
static void finish_pair(struct reference_memory *memory, const struct op_linear_pairs_args *args,
                        uint32_t m, uint32_t pair, double first, double second) {
    if (args->kind == PAIRS_GATE) {
        *reference_float(memory, args->dst, (uint64_t)m * args->dst_stride + pair) =
            reference_activate(args->act, first, NULL) * second;
        return;
    }
    uint32_t half = args->d_head / 2, head = pair / half, i = pair % half;
    struct token_meta token = reference_token(memory, args->tokens, m);
    if (head < args->n_heads + args->n_kv_heads) {
        uint64_t angle = 2 * ((uint64_t)token.angle * half + i);
        double c = *reference_float(memory, args->angles, angle),
               s = *reference_float(memory, args->angles, angle + 1), a = first;
        first = a * c - second * s;
        second = second * c + a * s;
    }
    int is_q = head < args->n_heads, is_v = head >= args->n_heads + args->n_kv_heads;
    uint64_t at = is_q ? (uint64_t)m * args->dst_stride + head * args->d_head
                       : ((uint64_t)token.slot * args->n_kv_heads + head - args->n_heads -
                          (is_v ? args->n_kv_heads : 0)) *
                             args->d_head;
    uint64_t to = is_q ? args->dst : is_v ? args->v_cache : args->k_cache;
    *reference_float(memory, to, at + i) = first;
    *reference_float(memory, to, at + half + i) = second;
}

void reference_linear_pairs(struct reference_memory *memory, const struct op_matrix *matrix,
                            const struct op_linear_pairs_args *args) {
    uint32_t half = args->kind == PAIRS_GATE ? matrix->n / 2 : args->d_head / 2,
             heads = args->n_heads + 2 * args->n_kv_heads;
    if (half == 0 || matrix->n % (2 * half) || args->kind > PAIRS_ROTATE ||
        (args->kind == PAIRS_GATE && args->act > ACT_RELU2) || matrix->scale != 0 ||
        (args->kind == PAIRS_ROTATE &&
         (args->d_head % 2 || (uint64_t)heads * args->d_head != matrix->n)))
        reference_fail(memory, "%u outputs do not pair: kind %u, %u heads of %u", matrix->n,
                       args->kind, heads, args->d_head);
    for (uint32_t m = 0; m < args->n_rows && !memory->failed; m++) {
        double squares = 0;
        for (uint32_t k = 0; k < matrix->k; k++) {
            double x = *reference_float(memory, args->x, (uint64_t)m * args->x_stride + k);
            squares += x * x;
        }
        double inverse = 1 / sqrt(squares / matrix->k + args->eps);
        for (uint32_t pair = 0; pair < matrix->n / 2 && !memory->failed; pair++) {
            double sums[2];
            for (uint32_t set = 0; set < 2; set++) {
                uint32_t n = pair / half * 2 * half + pair % half + set * half;
                sums[set] = args->bias ? *reference_float(memory, args->bias, n) : 0;
                for (uint32_t k = 0; k < matrix->k; k++)
                    sums[set] += *reference_float(memory, args->x,
                                                  (uint64_t)m * args->x_stride + k) *
                                 inverse * *reference_float(memory, args->gain, k) *
                                 reference_weight(memory, matrix, n, k);
            }
            finish_pair(memory, args, m, pair, sums[0], sums[1]);
        }
    }
}

/* dx[m, k] = scale sum_n dy[m, n] W[first_n + n, first_k + k] (+ dx[m, k]), with the padding
 * columns of both. */
void reference_linear_bwd(struct reference_memory *memory, const struct op_matrix *matrix,
                          const struct op_linear_bwd_args *args) {
    uint32_t n_k = args->n_k ? args->n_k : (matrix->k + 15) / 16 * 16,
             n_sum = args->n_sum ? args->n_sum : matrix->n;
    if (args->add && matrix->scale != 0)
        reference_fail(memory, "a scaled product cannot be added to a sum");
    for (uint32_t m = 0; m < args->n_rows && !memory->failed; m++)
        for (uint32_t k = 0; k < n_k && !memory->failed; k++) {
            double *dx = reference_float(memory, args->dx, (uint64_t)m * args->x_stride + k),
                   sum = args->add ? *dx : 0;
            for (uint32_t n = 0; n < (n_sum + 15) / 16 * 16; n++)
                sum += *reference_float(memory, args->dy, (uint64_t)m * args->y_stride + n) *
                       (n < n_sum
                            ? reference_weight(memory, matrix, args->first_n + n, args->first_k + k)
                            : 0);
            *dx = matrix->scale != 0 ? sum * matrix->scale : sum;
        }
}

/* The row of the embedding that token t takes. */
static uint32_t embed_row(struct reference_memory *memory, const struct op_embed_args *args,
                          uint32_t t) {
    struct token_meta token = reference_token(memory, args->tokens, t);
    if (!args->picked)
        return args->positions ? token.pos : token.id;
    double id = *reference_float(memory, args->picked, t - t % args->share);
    return id > 0 ? (uint32_t)id : 0;
}

/* dst[t, :] = scale * E[id(t), :], or [add[t, :] +] scale * E[pos(t), :] */
void reference_embed(struct reference_memory *memory, const struct op_matrix *embedding,
                     const struct op_embed_args *args) {
    if (args->add && !args->positions)
        reference_fail(memory, "only rows of positions are added to others");
    if (args->picked && (args->positions || args->share == 0))
        reference_fail(memory, "picked ids are of tokens, each of at least one");
    for (uint32_t t = 0; t < args->n_tokens && !memory->failed; t++) {
        uint32_t row = embed_row(memory, args, t);
        uint64_t to = (uint64_t)t * args->stride;
        if (row >= embedding->n)
            continue; /* no such row: dst stays as it was */
        for (uint32_t k = 0; k < embedding->k && !memory->failed; k++)
            *reference_float(memory, args->dst, to + k) =
                args->scale * reference_weight(memory, embedding, row, k) +
                (args->add ? *reference_float(memory, args->add, to + k) : 0);
    }
}
