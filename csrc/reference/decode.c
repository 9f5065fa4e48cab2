/* Reference implementations of the ops of decoding on GPUs. */
#include <math.h>

#include "reference/reference.h"

/* norm(x)[m, k] = (x - mean) inverse gain (+ bias), of one row */
struct row_norm {
    double mean, inverse;
};

static struct row_norm row_norm_of(struct reference_memory *memory,
                                   const struct op_linear_decode_args *args, uint32_t width,
                                   uint32_t m) {
    struct row_norm norm = {0, 1};
    double squares = 0;
    uint64_t row = (uint64_t)m * args->x_stride;
    if (args->norm == NORM_KIND_NONE)
        return norm;
    for (uint32_t k = 0; k < width && args->norm == NORM_KIND_LAYER; k++)
        norm.mean += *reference_float(memory, args->x, row + k) / width;
    for (uint32_t k = 0; k < width && !memory->failed; k++)
        squares += pow(*reference_float(memory, args->x, row + k) - norm.mean, 2);
    norm.inverse = 1 / sqrt(squares / width + args->eps);
    return norm;
}

/* Result n of row m before the activation. */
static double product(struct reference_memory *memory, const struct op_matrix *matrix,
                      const struct op_linear_decode_args *args, struct row_norm norm, uint32_t m,
                      uint32_t n) {
    uint32_t n_k = args->n_k ? args->n_k : matrix->k;
    double sum = 0;
    if (args->first_k + (uint64_t)n_k > matrix->k) /* a slice may reach into the padding */
        n_k = matrix->k > args->first_k ? matrix->k - args->first_k : 0;
    for (uint32_t k = 0; k < n_k && !memory->failed; k++) {
        double x = *reference_float(memory, args->x, (uint64_t)m * args->x_stride + k);
        if (args->norm != NORM_KIND_NONE)
            x = (x - norm.mean) * norm.inverse * *reference_float(memory, args->gain, k) +
                (args->norm_bias ? *reference_float(memory, args->norm_bias, k) : 0);
        sum += x * reference_weight(memory, matrix, n, args->first_k + k);
    }
    sum *= matrix->scale != 0 ? matrix->scale : 1;
    sum += args->bias ? *reference_float(memory, args->bias, n) : 0;
    if (args->clip != 0)
        sum = fmin(fmax(sum, -args->clip), args->clip);
    return args->softcap != 0 ? args->softcap * tanh(sum / args->softcap) : sum;
}

/* mid = x + norm(sub) post_gain */
static void post_norm(struct reference_memory *memory, const struct op_linear_decode_args *args,
                      uint32_t width) {
    struct op_linear_decode_args sub = *args;
    sub.x = args->sub;
    sub.norm = NORM_KIND_RMS;
    for (uint32_t m = 0; m < args->n_rows && !memory->failed; m++) {
        struct row_norm norm = row_norm_of(memory, &sub, width, m);
        for (uint32_t k = 0; k < width && !memory->failed; k++) {
            uint64_t at = (uint64_t)m * args->x_stride + k;
            *reference_float(memory, args->mid,
                             at) = *reference_float(memory, args->x, at) +
                                   *reference_float(memory, args->sub, at) * norm.inverse *
                                       *reference_float(memory, args->post_gain, k);
        }
    }
}

void reference_linear_decode(struct reference_memory *memory, const struct op_matrix *matrix,
                             const struct op_linear_decode_args *given) {
    struct op_linear_decode_args after = *given, *args = &after;
    if (given->sub) {
        post_norm(memory, given, matrix->k);
        after.x = given->mid;
    }
    int gate = args->finish == FINISH_GATE;
    uint32_t n_out = gate ? matrix->n / 2 : matrix->n;
    if (args->finish > FINISH_GATE || args->norm > NORM_KIND_NONE || args->act > ACT_RELU2 ||
        (gate && matrix->n % 2) || (args->norm_bias && args->norm != NORM_KIND_LAYER) ||
        (args->norm != NORM_KIND_NONE && !args->gain) ||
        (args->sub && (!gate || args->norm == NORM_KIND_LAYER || args->n_k)))
        reference_fail(memory, "%u outputs: norm %u, finish %u", matrix->n, args->norm,
                       args->finish);
    for (uint32_t m = 0; m < args->n_rows && !memory->failed; m++) {
        struct row_norm norm = row_norm_of(memory, args, matrix->k, m);
        for (uint32_t n = 0; n < n_out && !memory->failed; n++) {
            double result = product(memory, matrix, args, norm, m, n);
            if (args->finish != FINISH_PLAIN)
                result = reference_activate(args->act, result, NULL);
            if (gate)
                result *= product(memory, matrix, args, norm, m, n + n_out);
            if (args->add)
                result += *reference_float(memory, args->add, (uint64_t)m * args->dst_stride + n);
            *reference_float(memory, args->dst, (uint64_t)m * args->dst_stride + n) = result;
        }
    }
}

/* --- attention of single tokens --------------------------------------------------------------- */

#define HEAD_MAX STEP_D_HEAD_MAX

/* x = norm(x) of one head, whose row of all such heads [width] begins at item `row`. */
static void head_norm(struct reference_memory *memory, const struct attn_step_params *p, double *x,
                      uint64_t row, uint32_t width, uint64_t gain, uint32_t first) {
    double mean = 0, squares = 0;
    uint32_t n = p->flags & STEP_NORM_WIDE ? width : p->d_head,
             from = p->flags & STEP_NORM_WIDE ? 0 : first,
             gain_at = p->flags & STEP_NORM_HEAD ? 0 : first;
    for (uint32_t i = 0; i < n && p->flags & STEP_NORM_LAYER; i++)
        mean += *reference_float(memory, p->qkv, row + from + i) / n;
    for (uint32_t i = 0; i < n; i++)
        squares += pow(*reference_float(memory, p->qkv, row + from + i) - mean, 2);
    for (uint32_t i = 0; i < p->d_head; i++)
        x[i] = (x[i] - mean) / sqrt(squares / n + p->eps) *
                   *reference_float(memory, gain, gain_at + i) +
               (p->flags & STEP_NORM_BIAS ? *reference_float(memory, gain, width + gain_at + i)
                                          : 0);
}

/* A query (key = 0) or the present key of a token, after norm and rotation. */
static void head_make(struct reference_memory *memory, const struct attn_step_params *p,
                      const struct token_meta *token, uint32_t head, int key, double *x) {
    uint64_t row = (uint64_t)token->q_token * p->stride +
                   (key ? (uint64_t)p->n_heads * p->d_head : 0);
    uint32_t width = (key ? p->n_kv_heads : p->n_heads) * p->d_head, half = p->d_rot / 2;
    uint64_t angles = key ? p->angles : p->q_angles;
    for (uint32_t i = 0; i < p->d_head; i++)
        x[i] = *reference_float(memory, p->qkv, row + head * p->d_head + i);
    if (p->flags & (STEP_NORM_HEAD | STEP_NORM_WIDE | STEP_NORM_LAYER))
        head_norm(memory, p, x, row, width, key ? p->k_gain : p->q_gain, head * p->d_head);
    for (uint32_t i = 0; i < half && p->flags & STEP_ROTATE; i++) {
        uint32_t a = p->flags & STEP_INTERLEAVED ? 2 * i : i,
                 b = p->flags & STEP_INTERLEAVED ? a + 1 : half + i;
        uint64_t at = 2 * ((uint64_t)token->angle * half + i);
        double c = *reference_float(memory, angles, at),
               s = *reference_float(memory, angles, at + 1), first = x[a], second = x[b];
        x[a] = first * c - second * s;
        x[b] = second * c + first * s;
    }
}

/* The present key and value of a key/value head into the cache. */
static void present_store(struct reference_memory *memory, const struct attn_step_params *p,
                          const struct token_meta *token, uint32_t g) {
    double key[HEAD_MAX];
    uint64_t to = ((uint64_t)token->slot * p->n_kv_heads + g) * p->d_head,
             v = (uint64_t)token->q_token * p->stride +
                 (uint64_t)(p->n_heads + p->n_kv_heads + g) * p->d_head;
    head_make(memory, p, token, g, 1, key);
    for (uint32_t i = 0; i < p->d_head && !memory->failed; i++) {
        *reference_float(memory, p->k_cache, to + i) = key[i];
        *reference_float(memory, p->v_cache, to + i) = *reference_float(memory, p->qkv, v + i);
    }
}

/* The pattern of one query in its row of scores. */
static void pattern_make(struct reference_memory *memory, const struct attn_step_params *p,
                         const struct token_meta *token, uint32_t h, uint64_t row) {
    double q[HEAD_MAX], top = -INFINITY, sum = 0;
    uint32_t start = reference_window_start(token->pos, p->window);
    head_make(memory, p, token, h, 0, q);
    for (uint32_t j = start; j <= token->pos && !memory->failed; j++) {
        double score = 0;
        for (uint32_t i = 0; i < p->d_head; i++)
            score += q[i] * *reference_float(memory, p->k_cache,
                                             (((uint64_t)token->k_slot + j) * p->n_kv_heads +
                                              h / (p->n_heads / p->n_kv_heads)) *
                                                     p->d_head +
                                                 i);
        score *= p->scale;
        if (p->softcap != 0)
            score = p->softcap * tanh(score / p->softcap);
        *reference_float(memory, p->scores, row + j) = score;
        top = fmax(top, score);
    }
    for (uint32_t j = start; j <= token->pos && !memory->failed; j++)
        sum += exp(*reference_float(memory, p->scores, row + j) - top);
    for (uint32_t j = 0; j < p->key_stride && j < token->pos + OP_TILE && !memory->failed; j++) {
        double *score = reference_float(memory, p->scores, row + j);
        *score = j < start || j > token->pos ? 0 : exp(*score - top) / sum;
    }
}

void reference_attn_step(struct reference_memory *memory, const struct attn_step_params *p,
                         uint32_t n_tokens, uint32_t n_keys) {
    (void)n_keys;
    if (p->n_kv_heads == 0 || p->n_heads % p->n_kv_heads || p->d_head == 0 || p->d_head % 4 ||
        p->d_head > HEAD_MAX || p->d_rot > p->d_head || p->d_rot % 2)
        reference_fail(memory, "attention of single tokens with %u / %u heads of %u", p->n_heads,
                       p->n_kv_heads, p->d_head);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++) {
        struct token_meta token = reference_token(memory, p->tokens, t);
        if (token.pos >= p->key_stride)
            reference_fail(memory, "token %u has more than %u keys", t, p->key_stride);
        for (uint32_t g = 0; g < p->n_kv_heads && p->flags & STEP_STORE; g++)
            present_store(memory, p, &token, g);
        for (uint32_t h = 0; h < p->n_heads && !memory->failed; h++) {
            uint64_t row = ((uint64_t)t * p->n_heads + h) * p->key_stride,
                     v = (uint64_t)(h / (p->n_heads / p->n_kv_heads)) * p->d_head;
            if (!(p->flags & STEP_PATTERN))
                pattern_make(memory, p, &token, h, row);
            for (uint32_t i = 0; i < p->d_head && !memory->failed; i++) {
                double sum = 0;
                for (uint32_t j = reference_window_start(token.pos, p->window); j <= token.pos; j++)
                    sum += *reference_float(memory, p->scores, row + j) *
                           *reference_float(
                               memory, p->v_cache,
                               ((uint64_t)token.v_slot + j) * p->n_kv_heads * p->d_head + v + i);
                *reference_float(memory, p->z,
                                 (uint64_t)t * p->z_stride + (uint64_t)h * p->d_head + i) = sum;
            }
        }
    }
}
