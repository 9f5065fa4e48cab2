/* The test of an optional kernel family before its first use: it must sum in the order that the
 * engine's reproducible results rest on, or it is not used. */
#include <math.h>
#include <string.h>

#include "ops/self_test.h"

/* Awkward on purpose: no size is a multiple of a tile, and the numbers of rows reach every kernel
 * of a family. */
#define TEST_N 77
#define TEST_K 53
static const uint32_t row_counts[] = {33, 16, 15, 8, 7, 4, 3, 2, 1};
#define TEST_M 51
/* In sums of 53 products of at most 1, two orders differ by about 1e-6, and products in float16
 * alone by 53 roundings of at most 2^-10. */
#define OWN_ORDER_TOLERANCE 1e-5f
#define FAST_TOLERANCE 5e-2f

struct test {
    /* inputs: x, then bias, then the residual; outputs: baseline, candidate */
    struct gpu_buffer *weights, *inputs, *outputs[2];
    uint32_t x_stride, dst_stride;
};

static void test_free(struct test *test) {
    gpu_buffer_destroy(test->weights);
    gpu_buffer_destroy(test->inputs);
    gpu_buffer_destroy(test->outputs[0]);
    gpu_buffer_destroy(test->outputs[1]);
}

static int test_make(struct test *test, struct gpu_device *device, struct error *error) {
    uint32_t state = 1;
    test->x_stride = op_row_stride(TEST_K);
    test->dst_stride = op_row_stride(TEST_N);
    uint64_t x_floats = TEST_M * (uint64_t)test->x_stride,
             dst_floats = TEST_M * (uint64_t)test->dst_stride;
    if (gpu_buffer_create(&test->weights, device, op_matrix_bytes(WEIGHT_F32, TEST_N, TEST_K),
                          GPU_UPLOAD, "self-test weights", error) ||
        gpu_buffer_create(&test->inputs, device, 4 * (x_floats + test->dst_stride + dst_floats),
                          GPU_UPLOAD, "self-test inputs", error))
        return -1;
    for (int i = 0; i < 2; i++)
        if (gpu_buffer_create(&test->outputs[i], device, 4 * dst_floats, GPU_READBACK,
                              "self-test outputs", error))
            return -1;
    float *x = gpu_buffer_map(test->inputs);
    for (uint64_t i = 0; i < x_floats + test->dst_stride + dst_floats; i++)
        x[i] = i >= x_floats || i % test->x_stride < TEST_K ? self_test_random(&state) : 0;
    return 0;
}

/* Random panels. For bfloat16 and float16 each word holds two bit patterns whose exponent is that
 * of values of about 1. */
static void weights_fill(struct test *test, uint32_t type) {
    uint32_t state = 7, *words = gpu_buffer_map(test->weights),
             cells = op_matrix_cells(type, TEST_K), inputs = op_cell_inputs(type);
    uint32_t n_words = (TEST_N + OP_PANEL - 1) / OP_PANEL * OP_PANEL * cells * 4;
    for (uint32_t i = 0; i < n_words; i++) {
        float value = self_test_random(&state);
        uint32_t bits, n = i / 4 % OP_PANEL + i / 4 / OP_PANEL / cells * OP_PANEL;
        uint32_t k = i / 4 / OP_PANEL % cells * inputs + i % 4 * (inputs / 4);
        memcpy(&bits, &value, 4);
        if (type != WEIGHT_F32) {
            uint32_t exponent = type == WEIGHT_BF16 ? 0x3f00u : 0x3800u,
                     mask = type == WEIGHT_BF16 ? 0x80ffu : 0x87ffu;
            bits = ((exponent | (bits & mask)) & 0xffffu) |
                   (k + 1 < TEST_K ? (exponent | (bits >> 8 & mask)) << 16 : 0);
        }
        words[i] = n < TEST_N && k < TEST_K ? bits : 0;
    }
}

enum phase { PREFILL, DECODING, BACKWARD, PHASES };
struct job {
    uint32_t type;
    int slice;
    enum phase phase;
};

/* The backward product of the residual as dy, added to dx = the residual, or for a slice written.
 */
static int product_back(struct ops *ops, const struct test *test, const struct job *job,
                        const struct op_matrix *matrix, uint32_t n_rows, uint64_t dy,
                        struct gpu_buffer *out, struct error *error) {
    struct op_linear_bwd_args args = {
        .dy = dy,
        .dx = gpu_buffer_address(out),
        .n_rows = n_rows,
        .y_stride = test->dst_stride,
        .x_stride = test->dst_stride,
        .add = !job->slice,
    };
    if (job->slice)
        args.first_n = 16, args.n_sum = 48, args.first_k = 16, args.n_k = 32;
    else
        memcpy(gpu_buffer_map(out),
               (const float *)gpu_buffer_map(test->inputs) + TEST_M * test->x_stride +
                   test->dst_stride,
               4 * (size_t)n_rows * test->dst_stride);
    return op_linear_bwd(ops, matrix, &args, error);
}

/* Writes the product of the first `n_rows` rows to `out`, whose other rows become zero. */
static int product(struct ops *ops, const struct test *test, const struct job *job, uint32_t n_rows,
                   int family, struct gpu_buffer *out, struct error *error) {
    int before = ops->kernel_family, failed;
    uint64_t inputs = gpu_buffer_address(test->inputs),
             bias = inputs + 4 * (uint64_t)TEST_M * test->x_stride;
    struct op_matrix matrix = {
        .type = job->type,
        .n = TEST_N,
        .k = TEST_K,
        .k_cells = op_matrix_cells(job->type, TEST_K),
        .n_segments = 1,
        .segments = {{gpu_buffer_address(test->weights), 0, TEST_N}},
    };
    struct op_linear_args args = {
        .x = inputs,
        .dst = gpu_buffer_address(out),
        .bias = bias,
        .add = bias + 4 * (uint64_t)test->dst_stride,
        .n_rows = n_rows,
        .x_stride = test->x_stride,
        .dst_stride = test->dst_stride,
        .softcap = job->slice ? 0 : 5,
        .first_k = job->slice ? 16 : 0,
        .n_k = job->slice ? 32 : 0,
        .decode = job->phase == DECODING,
    };
    memset(gpu_buffer_map(out), 0, 4 * (size_t)TEST_M * test->dst_stride);
    ops->kernel_family = family;
    failed = job->phase == BACKWARD
                 ? product_back(ops, test, job, &matrix, n_rows, args.add, out, error)
                 : op_linear(ops, &matrix, &args, error);
    failed = failed || gpu_queue_wait(ops->queue, error);
    ops->kernel_family = before;
    return failed ? -1 : 0;
}

/* Compares outputs[1] with the first `n_rows` rows of outputs[0]; tolerance 0: bit-identical. */
static int compare(const struct test *test, const struct job *job, uint32_t n_rows, int family,
                   float tolerance, struct error *error) {
    static const char *const types[] = {"float32", "bfloat16", "float16"}, *const phases[] = {
                                                                               "prefill",
                                                                               "decoding",
                                                                               "backward"};
    const float *want = gpu_buffer_map(test->outputs[0]), *got = gpu_buffer_map(test->outputs[1]),
                zero = 0;
    for (uint32_t i = 0; i < TEST_M * test->dst_stride; i++) {
        const float *expected = i < n_rows * test->dst_stride ? &want[i] : &zero;
        if (tolerance > 0 ? !(fabsf(got[i] - *expected) <= tolerance)
                          : memcmp(expected, &got[i], 4) != 0)
            return error_set(error, ERROR_VALUE,
                             "matrix kernels '%s', %s weights, %s, %u rows: row %u, column %u is "
                             "%.9g where %.9g is due",
                             op_kernel_family_name(family), types[job->type], phases[job->phase],
                             n_rows, i / test->dst_stride, i % test->dst_stride, (double)got[i],
                             (double)*expected);
    }
    return 0;
}

/* Compares all rows with the baseline; then every smaller number of rows must give bit-identical
 * rows. */
static int job_run(struct ops *ops, const struct test *test, const struct job *job, int family,
                   struct error *error) {
    /* k is split, or the device adds in its own order: the results are only close to the baseline
     */
    float tolerance = family == LINEAR_MATRIX && job->phase != DECODING && ops->fast
                          ? FAST_TOLERANCE
                      : family == LINEAR_MATRIX ||
                              (family == LINEAR_TILED && job->phase == DECODING)
                          ? OWN_ORDER_TOLERANCE
                          : 0;
    if (product(ops, test, job, TEST_M, LINEAR_BROADCAST, test->outputs[0], error) ||
        product(ops, test, job, TEST_M, family, test->outputs[1], error) ||
        compare(test, job, TEST_M, family, tolerance, error))
        return -1;
    memcpy(gpu_buffer_map(test->outputs[0]), gpu_buffer_map(test->outputs[1]),
           4 * (size_t)TEST_M * test->dst_stride);
    for (size_t i = 0; i < sizeof row_counts / sizeof row_counts[0]; i++)
        if (product(ops, test, job, row_counts[i], family, test->outputs[1], error) ||
            compare(test, job, row_counts[i], family, 0, error))
            return -1;
    return 0;
}

int op_linear_self_test(struct ops *ops, int family, int only_type, struct error *error) {
    struct test test = {0};
    uint32_t large_from = ops->large_from;
    if (!op_kernel_family_offered(ops, family))
        return error_set(error, ERROR_VALUE,
                         "matrix kernels '%s' (%d) are not offered by this device",
                         op_kernel_family_name(family), family);
    int failed = test_make(&test, ops->device, error);
    for (uint32_t type = WEIGHT_F32; type <= WEIGHT_F16 && !failed; type++) {
        if (only_type >= 0 && type != (uint32_t)only_type)
            continue;
        weights_fill(&test, type);
        /* on matrix units with the small tiles, then with the large ones */
        for (int large = 0; large <= (family == LINEAR_MATRIX) && !failed; large++) {
            ops->large_from = large ? 0 : UINT32_MAX;
            for (int i = 0; i < 2 * PHASES && !failed; i++)
                failed = job_run(ops, &test,
                                 &(struct job){.type = type, .slice = i & 1, .phase = i >> 1},
                                 family, error);
        }
    }
    ops->large_from = large_from;
    if (failed)
        gpu_queue_abandon(ops->queue);
    test_free(&test);
    if (!failed && family == LINEAR_MATRIX)
        failed = self_test_attention(ops, error);
    return failed ? -1 : 0;
}
