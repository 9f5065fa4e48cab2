/* Reference implementations of the steps of attention and of their backward. */
#include <math.h>

#include "reference/reference.h"

/* Checks the numbers of heads that a kernel divides by. Nonzero: they are invalid. */
static int heads_check(struct reference_memory *memory, uint32_t n_heads, uint32_t n_kv_heads) {
    if (n_kv_heads == 0 || n_heads % n_kv_heads)
        reference_fail(memory, "%u query heads cannot share %u key heads", n_heads, n_kv_heads);
    return memory->failed;
}

static void head_norm(struct reference_memory *memory, const struct rope_params *p, uint64_t base,
                      uint64_t gain) {
    double sum = 0;
    for (uint32_t i = 0; i < p->d_head; i++)
        sum += *reference_float(memory, p->qkv, base + i) *
               *reference_float(memory, p->qkv, base + i);
    for (uint32_t i = 0; i < p->d_head; i++)
        *reference_float(memory, p->qkv, base + i) *= *reference_float(memory, gain, i) /
                                                      sqrt(sum / p->d_head + p->eps);
}

/* Of a head at `x`, rotates each pair (a, b) of the first d_rot channels by the angle of (row, i):
 * (x[2i], x[2i + 1]) where they are interleaved, else (x[i], x[i + d_rot/2]). direction: 1, or -1
 * for the transpose. */
static void head_rotate(struct reference_memory *memory, uint64_t x, uint64_t base, uint32_t d_rot,
                        int interleaved, uint64_t angles, uint32_t row, double direction) {
    uint32_t half = d_rot / 2;
    for (uint32_t i = 0; i < half; i++) {
        double *a = reference_float(memory, x, base + (interleaved ? 2 * i : i)),
               *b = reference_float(memory, x, base + (interleaved ? 2 * i + 1 : half + i));
        double old_a = *a, old_b = *b,
               c = *reference_float(memory, angles, ((uint64_t)row * half + i) * 2),
               s = *reference_float(memory, angles, ((uint64_t)row * half + i) * 2 + 1) * direction;
        *a = old_a * c - old_b * s;
        *b = old_b * c + old_a * s;
    }
}

static void rotation_check(struct reference_memory *memory, uint32_t d_head, uint32_t d_rot) {
    if (d_head == 0 || d_rot % 2 || d_rot > d_head)
        reference_fail(memory, "%u channels of a head of %u cannot be rotated", d_rot, d_head);
}

void reference_rope(struct reference_memory *memory, const struct rope_params *p,
                    uint32_t n_tokens) {
    uint64_t kv_width = (uint64_t)p->n_kv_heads * p->d_head;
    rotation_check(memory, p->d_head, p->d_rot);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++) {
        struct token_meta token = reference_token(memory, p->tokens, t);
        for (uint32_t h = 0; h < p->n_heads + 2 * p->n_kv_heads && !memory->failed; h++) {
            uint64_t base = (uint64_t)t * p->stride + (uint64_t)h * p->d_head;
            int is_q = h < p->n_heads, is_v = h >= p->n_heads + p->n_kv_heads;
            if (p->flags & ROPE_QK_NORM && !is_v)
                head_norm(memory, p, base, is_q ? p->q_gain : p->k_gain);
            if (p->flags & ROPE_ROTATE && !is_v)
                head_rotate(memory, p->qkv, base, p->d_rot, p->flags & ROPE_INTERLEAVED,
                            is_q ? p->q_angles : p->angles, token.angle, 1);
            if (p->flags & ROPE_STORE && !is_q)
                for (uint32_t i = 0; i < p->d_head; i++)
                    *reference_float(memory, is_v ? p->v_cache : p->k_cache,
                                     token.slot * kv_width +
                                         (uint64_t)(h - p->n_heads - (is_v ? p->n_kv_heads : 0)) *
                                             p->d_head +
                                         i) = *reference_float(memory, p->qkv, base + i);
        }
    }
}

/* Reads a tile and checks it: it is 1 to 8 tokens of one row at consecutive positions, and a row of
 * scores has room for every key of its last token. */
static struct query_tile tile_read(struct reference_memory *memory, uint64_t tokens, uint64_t tiles,
                                   uint32_t index, uint32_t first_token, uint32_t key_stride) {
    struct query_tile tile = {
        .first = reference_word(memory, tiles, 2 * (uint64_t)index),
        .count = reference_word(memory, tiles, 2 * (uint64_t)index + 1),
    };
    struct token_meta first = reference_token(memory, tokens, tile.first);
    if (tile.count == 0 || tile.count > OP_TILE || tile.first < first_token)
        reference_fail(memory, "tile %u: %u tokens from %u", index, tile.count, tile.first);
    for (uint32_t i = 0; i < tile.count && !memory->failed; i++) {
        struct token_meta token = reference_token(memory, tokens, (uint64_t)tile.first + i);
        if (token.pos != first.pos + i || token.k_slot != first.k_slot ||
            token.v_slot != first.v_slot || token.pos >= key_stride)
            reference_fail(memory,
                           "tile %u: token %u is not of the tile's row, or has more than %u keys",
                           index, i, key_stride);
    }
    return tile;
}

/* Scores of query t and head h with the first `n_keys` keys. */
static void query_scores(struct reference_memory *memory, const struct scores_params *p, uint32_t t,
                         uint32_t h, uint32_t n_keys) {
    struct token_meta token = reference_token(memory, p->tokens, t);
    uint64_t kv_stride = (uint64_t)p->n_kv_heads * p->d_head,
             kv_head = (uint64_t)(h / (p->n_heads / p->n_kv_heads)) * p->d_head;
    uint64_t q = (uint64_t)token.q_token * p->stride + (uint64_t)h * p->d_head;
    for (uint32_t j = 0; j < n_keys && !memory->failed; j++) {
        double score = 0;
        for (uint32_t d = 0; d < p->d_head; d++)
            score += *reference_float(memory, p->qkv, q + d) *
                     *reference_float(memory, p->k_cache,
                                      ((uint64_t)token.k_slot + j) * kv_stride + kv_head + d);
        score *= p->scale;
        if (p->softcap != 0)
            score = p->softcap * tanh(score / p->softcap);
        *reference_float(memory, p->scores,
                         ((uint64_t)(t - p->first_token) * p->n_heads + h) * p->key_stride + j) =
            score;
    }
}

static void query_softmax(struct reference_memory *memory, const struct softmax_params *p,
                          uint32_t t, uint32_t h) {
    uint32_t pos = reference_token(memory, p->tokens, t).pos,
             start = reference_window_start(pos, p->window);
    uint64_t row = ((uint64_t)(t - p->first_token) * p->n_heads + h) * p->key_stride;
    double top = -INFINITY, sum = 0;
    if (pos >= p->key_stride)
        reference_fail(memory, "token %u has more than %u keys", t, p->key_stride);
    for (uint32_t j = start; j <= pos && !memory->failed; j++)
        top = fmax(top, *reference_float(memory, p->scores, row + j));
    for (uint32_t j = start; j <= pos && !memory->failed; j++)
        sum += exp(*reference_float(memory, p->scores, row + j) - top);
    for (uint32_t j = 0; j < p->key_stride && j < pos + OP_TILE && !memory->failed; j++) {
        double *score = reference_float(memory, p->scores, row + j);
        *score = j < start || j > pos ? 0 : exp(*score - top) / sum;
    }
}

static void query_output(struct reference_memory *memory, const struct attn_output_params *p,
                         uint32_t t, uint32_t h) {
    struct token_meta token = reference_token(memory, p->tokens, t);
    uint64_t kv_stride = (uint64_t)p->n_kv_heads * p->d_head,
             kv_head = (uint64_t)(h / (p->n_heads / p->n_kv_heads)) * p->d_head;
    uint64_t row = ((uint64_t)(t - p->first_token) * p->n_heads + h) * p->key_stride;
    for (uint32_t d = 0; d < p->d_head && !memory->failed; d++) {
        double sum = 0;
        for (uint32_t j = reference_window_start(token.pos, p->window); j <= token.pos; j++)
            sum += *reference_float(memory, p->pattern, row + j) *
                   *reference_float(memory, p->v_cache,
                                    ((uint64_t)token.v_slot + j) * kv_stride + kv_head + d);
        *reference_float(memory, p->z,
                         (uint64_t)t * p->z_stride + (uint64_t)h * p->d_head + d) = sum;
    }
}

/* Every query of a tile gets scores of all keys up to the tile's last position; the softmax sets
 * those that the query must not see to zero. */
void reference_attn_scores(struct reference_memory *memory, const struct scores_params *p,
                           uint32_t n_tiles, uint32_t n_keys) {
    (void)n_keys;
    if (heads_check(memory, p->n_heads, p->n_kv_heads))
        return;
    for (uint32_t y = 0; y < n_tiles && !memory->failed; y++) {
        struct query_tile tile = tile_read(memory, p->tokens, p->tiles, y, p->first_token,
                                           p->key_stride);
        for (uint32_t i = 0; i < tile.count && !memory->failed; i++)
            for (uint32_t h = 0; h < p->n_heads && !memory->failed; h++)
                query_scores(memory, p, tile.first + i, h,
                             reference_token(memory, p->tokens, tile.first + tile.count - 1).pos +
                                 1);
    }
}

void reference_attn_softmax(struct reference_memory *memory, const struct softmax_params *p,
                            uint32_t n_tokens, uint32_t n_keys) {
    (void)n_keys;
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t h = 0; h < p->n_heads && !memory->failed; h++)
            query_softmax(memory, p, p->first_token + t, h);
}

void reference_attn_output(struct reference_memory *memory, const struct attn_output_params *p,
                           uint32_t n_tiles, uint32_t n_keys) {
    (void)n_keys;
    if (heads_check(memory, p->n_heads, p->n_kv_heads))
        return;
    for (uint32_t y = 0; y < n_tiles && !memory->failed; y++) {
        struct query_tile tile = tile_read(memory, p->tokens, p->tiles, y, p->first_token,
                                           p->key_stride);
        for (uint32_t i = 0; i < tile.count && !memory->failed; i++)
            for (uint32_t h = 0; h < p->n_heads && !memory->failed; h++)
                query_output(memory, p, tile.first + i, h);
    }
}

void reference_attn_decode(struct reference_memory *memory, const struct decode_params *p,
                           uint32_t n_tokens, uint32_t n_keys) {
    (void)n_keys;
    if (heads_check(memory, p->n_heads, p->n_kv_heads))
        return;
    struct scores_params scores = {
        .qkv = p->qkv,
        .k_cache = p->k_cache,
        .tokens = p->tokens,
        .scores = p->scores,
        .first_token = p->first_token,
        .n_heads = p->n_heads,
        .n_kv_heads = p->n_kv_heads,
        .d_head = p->d_head,
        .stride = p->stride,
        .key_stride = p->key_stride,
        .scale = p->scale,
        .softcap = p->softcap,
    };
    struct softmax_params softmax = {
        .scores = p->scores,
        .tokens = p->tokens,
        .first_token = p->first_token,
        .n_heads = p->n_heads,
        .key_stride = p->key_stride,
        .window = p->window,
    };
    struct attn_output_params output = {
        .pattern = p->scores,
        .v_cache = p->v_cache,
        .tokens = p->tokens,
        .z = p->z,
        .first_token = p->first_token,
        .n_heads = p->n_heads,
        .n_kv_heads = p->n_kv_heads,
        .d_head = p->d_head,
        .z_stride = p->z_stride,
        .key_stride = p->key_stride,
        .window = p->window,
    };
    for (uint32_t t = p->first_token; t < p->first_token + n_tokens && !memory->failed; t++)
        for (uint32_t h = 0; h < p->n_heads && !memory->failed; h++) {
            if (reference_token(memory, p->tokens, t).pos >= p->key_stride)
                reference_fail(memory, "token %u has more than %u keys", t, p->key_stride);
            else
                query_scores(memory, &scores, t, h, reference_token(memory, p->tokens, t).pos + 1);
            query_softmax(memory, &softmax, t, h);
            query_output(memory, &output, t, h);
        }
}

static void head_norm_back(struct reference_memory *memory, const struct rope_bwd_params *p,
                           uint64_t base, uint64_t gain) {
    struct norm_slope slope = {0};
    double squares = 0;
    for (uint32_t i = 0; i < p->d_head; i++)
        squares += *reference_float(memory, p->qkv, base + i) *
                   *reference_float(memory, p->qkv, base + i);
    slope.scale = sqrt(squares / p->d_head + p->eps);
    for (uint32_t i = 0; i < p->d_head; i++)
        slope.along += *reference_float(memory, p->dqkv, base + i) *
                       *reference_float(memory, gain, i) *
                       *reference_float(memory, p->qkv, base + i) / slope.scale;
    for (uint32_t i = 0; i < p->d_head; i++) {
        double *d = reference_float(memory, p->dqkv, base + i);
        *d = reference_norm_slope_at(&slope, *d * *reference_float(memory, gain, i),
                                     *reference_float(memory, p->qkv, base + i), p->d_head);
    }
}

void reference_rope_bwd(struct reference_memory *memory, const struct rope_bwd_params *p,
                        uint32_t n_tokens) {
    rotation_check(memory, p->d_head, p->d_rot);
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++)
        for (uint32_t h = 0; h < p->n_heads + p->n_kv_heads && !memory->failed; h++) {
            uint64_t base = (uint64_t)t * p->stride + (uint64_t)h * p->d_head;
            if (p->flags & ROPE_ROTATE)
                head_rotate(memory, p->dqkv, base, p->d_rot, p->flags & ROPE_INTERLEAVED,
                            h < p->n_heads ? p->q_angles : p->angles,
                            reference_token(memory, p->tokens, t).angle, -1);
            if (p->flags & ROPE_QK_NORM)
                head_norm_back(memory, p, base, h < p->n_heads ? p->q_gain : p->k_gain);
        }
}

void reference_attn_softmax_bwd(struct reference_memory *memory, const struct softmax_bwd_params *p,
                                uint32_t n_tokens, uint32_t n_keys) {
    (void)n_keys;
    for (uint32_t t = 0; t < n_tokens && !memory->failed; t++) {
        uint32_t pos = reference_token(memory, p->tokens, (uint64_t)p->first_token + t).pos,
                 start = reference_window_start(pos, p->window);
        if (pos >= p->key_stride)
            reference_fail(memory, "token %u has more than %u keys", t, p->key_stride);
        for (uint32_t h = 0; h < p->n_heads && !memory->failed; h++) {
            uint64_t row = ((uint64_t)t * p->n_heads + h) * p->key_stride;
            double mean = 0;
            for (uint32_t j = start; j <= pos; j++)
                mean += *reference_float(memory, p->pattern, row + j) *
                        *reference_float(memory, p->dpattern, row + j);
            for (uint32_t j = 0; j < p->key_stride && j < pos + OP_TILE; j++) {
                double *d = reference_float(memory, p->dpattern, row + j);
                if (j < start || j > pos) {
                    *d = 0;
                    continue;
                }
                *d = *reference_float(memory, p->pattern, row + j) * (*d - mean) * p->scale;
                if (p->softcap != 0)
                    *d *= 1 - pow(*reference_float(memory, p->scores, row + j) / p->softcap, 2);
            }
        }
    }
}

/* Column `d` of one key in head group g, summed over the queries of its row that see the key. */
static double key_sum(struct reference_memory *memory, const struct attn_output_bwd_params *p,
                      uint32_t key, uint32_t g, uint32_t d) {
    struct token_meta meta = reference_token(memory, p->tokens, key);
    uint32_t group = p->n_heads / p->n_kv_heads,
             last = meta.row_end < p->last_token ? meta.row_end : p->last_token;
    double sum = 0;
    for (uint32_t t = key > p->first_token ? key : p->first_token; t < last && !memory->failed;
         t++) {
        if (p->window && t - key >= p->window)
            break;
        for (uint32_t h = g * group; h < (g + 1) * group; h++)
            sum +=
                *reference_float(memory, p->a,
                                 ((uint64_t)(t - p->first_token) * p->n_heads + h) * p->key_stride +
                                     meta.pos) *
                *reference_float(memory, p->y,
                                 (uint64_t)t * p->y_stride + (uint64_t)h * p->d_head + d);
    }
    return sum;
}

void reference_attn_output_bwd(struct reference_memory *memory,
                               const struct attn_output_bwd_params *p, uint32_t n_tiles,
                               uint32_t n_keys) {
    (void)n_keys;
    if (heads_check(memory, p->n_heads, p->n_kv_heads))
        return;
    for (uint32_t y = 0; y < n_tiles && !memory->failed; y++) {
        struct query_tile tile = tile_read(memory, p->tokens, p->tiles, y, 0, p->key_stride);
        struct token_meta first = reference_token(memory, p->tokens, tile.first);
        if (first.row_end < tile.first + tile.count)
            reference_fail(memory, "tile %u: its row ends at %u", y, first.row_end);
        for (uint32_t t = tile.first; t < first.row_end && !memory->failed; t++) {
            struct token_meta token = reference_token(memory, p->tokens, t);
            if (token.row != first.row || token.pos != first.pos + (t - tile.first) ||
                token.pos >= p->key_stride)
                reference_fail(memory,
                               "tile %u: query %u is not of its row, or has more than %u keys", y,
                               t, p->key_stride);
        }
        for (uint32_t i = 0; i < tile.count && !memory->failed; i++)
            for (uint32_t g = 0; g < p->n_kv_heads && !memory->failed; g++)
                for (uint32_t d = 0; d < p->d_head && !memory->failed; d++) {
                    double *sum = reference_float(memory, p->sums,
                                                  ((uint64_t)tile.first + i) * p->out_stride +
                                                      (uint64_t)g * p->d_head + d);
                    *sum = (p->add ? *sum : 0) + key_sum(memory, p, tile.first + i, g, d);
                }
    }
}
