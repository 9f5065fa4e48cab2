/* The test of attention's two products on matrix units before their first use; a part of
 * self_test.c, which says when it runs. */
#include <math.h>
#include <string.h>

#include "ops/self_test.h"

/* Two rows of a batch, of which the second has keys in the cache already. No size is a multiple of
 * a tile, and the last key lies behind a partial sum (256 keys). */
#define HEADS 2
#define KV_HEADS 1
#define D_HEAD 20
#define WINDOW 261
#define TOKENS 24
#define SLOTS 283
#define KEY_STRIDE 272
static const struct {
    uint32_t slot, pos, n;
} rows[] = {{0, 0, 19}, {19, 259, 5}};
static const struct query_tile tile_list[] = {{0, 8}, {8, 8}, {16, 3}, {19, 5}};
#define TILES (sizeof tile_list / sizeof tile_list[0])
/* As in self_test.c: sums of 20 products, and means of values, of at most 1. */
#define TOLERANCE 1e-5f
#define FAST_TOLERANCE 5e-2f

enum { Q, K, V, PATTERN, INPUTS }; /* in this order in the inputs, each as many floats: */
static const uint32_t floats[INPUTS] = {TOKENS * HEADS * D_HEAD, SLOTS * KV_HEADS * D_HEAD,
                                        SLOTS * KV_HEADS * D_HEAD, TOKENS * HEADS * KEY_STRIDE};
#define SCORES (TOKENS * HEADS * KEY_STRIDE)
#define OUTPUTS (SCORES + TOKENS * HEADS * D_HEAD) /* scores and attention outputs */

struct test {
    struct gpu_buffer *lists, *inputs, *outputs[2]; /* outputs: baseline, matrix units */
};

static uint64_t input(const struct test *test, int which) {
    uint64_t at = gpu_buffer_address(test->inputs);
    for (int i = 0; i < which; i++)
        at += 4 * (uint64_t)floats[i];
    return at;
}

/* Each query's pattern over the keys that it sees, which adds up to at most 1; zeros before. */
static void pattern_fill(float *pattern, uint32_t *state) {
    for (uint32_t r = 0, t = 0; r < 2; r++)
        for (uint32_t i = 0; i < rows[r].n; i++, t++)
            for (uint32_t h = 0; h < HEADS; h++)
                for (uint32_t j = 0; j < KEY_STRIDE; j++) {
                    uint32_t pos = rows[r].pos + i;
                    int seen = j <= pos && j + WINDOW > pos;
                    pattern[(t * HEADS + h) * KEY_STRIDE + j] =
                        seen ? fabsf(self_test_random(state)) / (float)(pos + 1) : 0;
                }
}

static int test_make(struct test *test, struct gpu_device *device, struct error *error) {
    uint32_t state = 1, all = 0, tokens_bytes = TOKENS * sizeof(struct token_meta);
    for (int i = 0; i < INPUTS; i++)
        all += floats[i];
    if (gpu_buffer_create(&test->lists, device, tokens_bytes + sizeof tile_list, GPU_UPLOAD,
                          "self-test tokens", error) ||
        gpu_buffer_create(&test->inputs, device, 4 * (uint64_t)all, GPU_UPLOAD,
                          "self-test queries, keys and values", error))
        return -1;
    for (int i = 0; i < 2; i++)
        if (gpu_buffer_create(&test->outputs[i], device, 4 * OUTPUTS, GPU_READBACK,
                              "self-test attention", error))
            return -1;
    float *x = gpu_buffer_map(test->inputs);
    for (uint32_t i = 0; i < all; i++)
        x[i] = self_test_random(&state);
    pattern_fill(x + all - floats[PATTERN], &state);
    struct token_meta *meta = gpu_buffer_map(test->lists);
    for (uint32_t r = 0, t = 0; r < 2; r++)
        for (uint32_t i = 0; i < rows[r].n; i++, t++)
            meta[t] = (struct token_meta){
                .pos = rows[r].pos + i,
                .slot = rows[r].slot + rows[r].pos + i,
                .q_token = t,
                .k_slot = rows[r].slot,
                .v_slot = rows[r].slot,
                .row = r,
            };
    memcpy((char *)gpu_buffer_map(test->lists) + tokens_bytes, tile_list, sizeof tile_list);
    return 0;
}

/* Both products of tiles [first, end) with the kernels of a family, into outputs[which]. */
static int products(struct ops *ops, const struct test *test, uint32_t first, uint32_t end,
                    int family, int which, struct error *error) {
    int before = ops->kernel_family;
    uint64_t tokens = gpu_buffer_address(test->lists),
             out = gpu_buffer_address(test->outputs[which]);
    struct scores_params scores = {
        .qkv = input(test, Q),
        .k_cache = input(test, K),
        .tokens = tokens,
        .tiles = tokens + TOKENS * sizeof(struct token_meta) + first * sizeof(struct query_tile),
        .scores = out,
        .n_heads = HEADS,
        .n_kv_heads = KV_HEADS,
        .d_head = D_HEAD,
        .stride = HEADS * D_HEAD,
        .key_stride = KEY_STRIDE,
        .scale = 0.25f,
        .softcap = 5,
    };
    struct attn_output_params output = {
        .pattern = input(test, PATTERN),
        .v_cache = input(test, V),
        .tokens = tokens,
        .tiles = scores.tiles,
        .z = out + 4 * SCORES,
        .n_heads = HEADS,
        .n_kv_heads = KV_HEADS,
        .d_head = D_HEAD,
        .z_stride = HEADS * D_HEAD,
        .key_stride = KEY_STRIDE,
        .window = WINDOW,
    };
    memset(gpu_buffer_map(test->outputs[which]), 0, 4 * OUTPUTS);
    ops->kernel_family = family;
    int failed = op_attn_scores(ops, &scores, end - first, SLOTS - rows[1].slot, error) ||
                 op_attn_output(ops, &output, end - first, SLOTS - rows[1].slot, error) ||
                 gpu_queue_wait(ops->queue, error);
    ops->kernel_family = before;
    return failed ? -1 : 0;
}

/* Compares outputs[1] with outputs[0] for the tokens of tiles [first, end), and with zeros
 * elsewhere. */
static int compare(const struct test *test, uint32_t first, uint32_t end, float tolerance,
                   struct error *error) {
    const float *want = gpu_buffer_map(test->outputs[0]), *got = gpu_buffer_map(test->outputs[1]),
                zero = 0;
    uint32_t from = tile_list[first].first,
             to = tile_list[end - 1].first + tile_list[end - 1].count;
    for (uint32_t i = 0; i < OUTPUTS; i++) {
        uint32_t t = i < SCORES ? i / (HEADS * KEY_STRIDE) : (i - SCORES) / (HEADS * D_HEAD);
        const float *expected = t >= from && t < to ? &want[i] : &zero;
        if (tolerance > 0 ? !(fabsf(got[i] - *expected) <= tolerance)
                          : memcmp(expected, &got[i], 4) != 0)
            return error_set(error, ERROR_VALUE,
                             "matrix kernels 'matrix', %s of attention, tiles %u to %u: token %u "
                             "has %.9g where %.9g is due",
                             i < SCORES ? "scores" : "outputs", first, end - 1, t, (double)got[i],
                             (double)*expected);
    }
    return 0;
}

int self_test_attention(struct ops *ops, struct error *error) {
    struct test test = {0};
    float tolerance = ops->fast ? FAST_TOLERANCE : TOLERANCE;
    int failed = test_make(&test, ops->device, error) ||
                 products(ops, &test, 0, TILES, LINEAR_BROADCAST, 0, error) ||
                 products(ops, &test, 0, TILES, LINEAR_MATRIX, 1, error) ||
                 compare(&test, 0, TILES, tolerance, error);
    if (!failed)
        memcpy(gpu_buffer_map(test.outputs[0]), gpu_buffer_map(test.outputs[1]), 4 * OUTPUTS);
    /* each tile alone */
    for (uint32_t i = 0; i < TILES && !failed; i++)
        failed = products(ops, &test, i, i + 1, LINEAR_MATRIX, 1, error) ||
                 compare(&test, i, i + 1, 0, error);
    if (failed)
        gpu_queue_abandon(ops->queue);
    gpu_buffer_destroy(test.lists);
    gpu_buffer_destroy(test.inputs);
    gpu_buffer_destroy(test.outputs[0]);
    gpu_buffer_destroy(test.outputs[1]);
    return failed ? -1 : 0;
}
