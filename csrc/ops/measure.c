/* Short measurements: which matrix kernel suits a device, and what the device can do at all. */
#include <time.h>

#include "ops/ops.h"

#define REPEATS 9

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The shortest time: other work on the machine can only make a repetition slower, and the choice of
 * kernels must not depend on it. */
static double best(const double *seconds) {
    double least = seconds[0];
    for (int i = 1; i < REPEATS; i++)
        least = seconds[i] < least ? seconds[i] : least;
    return least;
}

static int buffer(struct ops *ops, struct gpu_buffer **out, uint64_t bytes, struct error *error) {
    return gpu_buffer_create(out, ops->device, bytes, GPU_DEVICE_LOCAL, "measurement", error) ||
                   gpu_queue_zero(ops->queue, *out, 0, gpu_buffer_size(*out), error)
               ? -1
               : 0;
}

/* The shortest seconds of `work`, which records dispatches from its context. */
static int timed(struct ops *ops, int (*work)(struct ops *, void *, struct error *), void *context,
                 double *least, struct error *error) {
    double seconds[REPEATS];
    for (int i = -1; i < REPEATS; i++) { /* the first one compiles the kernel */
        if (gpu_queue_wait(ops->queue, error))
            return -1;
        double start = now();
        if (work(ops, context, error) || gpu_queue_wait(ops->queue, error))
            return -1;
        if (i >= 0)
            seconds[i] = now() - start;
    }
    *least = best(seconds);
    return 0;
}

struct product {
    struct op_matrix matrix;
    struct op_linear_args forward;
    struct op_linear_bwd_args back;
    int backward; /* which of the two is measured */
};

static int product_once(struct ops *ops, void *context, struct error *error) {
    const struct product *product = context;
    return product->backward ? op_linear_bwd(ops, &product->matrix, &product->back, error)
                             : op_linear(ops, &product->matrix, &product->forward, error);
}

struct read {
    struct read_params params;
    uint64_t bytes;
    uint32_t workgroups;
    int texels;
};

static int read_once(struct ops *ops, void *context, struct error *error) {
    const struct read *read = context;
    if (read->texels && gpu_queue_texels(ops->queue, read->params.x, read->bytes, error))
        return -1;
    return gpu_queue_dispatch(ops->queue, kernel_read(read->texels), &read->params,
                              sizeof read->params, read->workgroups, 1, 1, 1e6, error);
}

/* Seconds of a product of m rows by n x k: forward, or backward from n to k. */
static int product_measure(struct ops *ops, uint32_t type, uint32_t m, uint32_t n, uint32_t k,
                           int decode, int backward, double *least, struct error *error) {
    struct gpu_buffer *w = NULL, *x = NULL, *y = NULL, *range = NULL;
    int failed = -1;
    if (buffer(ops, &w, op_matrix_bytes(type, n, k), error) || buffer(ops, &range, 4, error) ||
        buffer(ops, &x, 4 * (uint64_t)m * op_row_stride(k), error) ||
        buffer(ops, &y, 4 * (uint64_t)m * op_row_stride(n), error))
        goto done;
    struct product product = {
        .matrix =
            {
                .type = type,
                .n = n,
                .k = k,
                .k_cells = op_matrix_cells(type, k),
                .n_segments = 1,
                .segments = {{gpu_buffer_address(w), 0, n}},
            },
        .forward =
            {
                .x = gpu_buffer_address(x),
                .dst = gpu_buffer_address(y),
                .n_rows = m,
                .x_stride = op_row_stride(k),
                .dst_stride = op_row_stride(n),
                .decode = decode,
            },
        .back =
            {
                .dy = gpu_buffer_address(y),
                .dx = gpu_buffer_address(x),
                .n_rows = m,
                .y_stride = op_row_stride(n),
                .x_stride = op_row_stride(k),
            },
        .backward = backward,
    };
    if (ops->kernel_family == LINEAR_MATRIX) { /* as a model's matrices have it: not measured */
        if (ops_matrix_range(ops, &product.matrix, range, 0, error))
            goto done;
        product.matrix.range = gpu_buffer_address(range);
    }
    failed = timed(ops, product_once, &product, least, error);
done:
    if (failed)
        gpu_queue_abandon(ops->queue);
    gpu_buffer_destroy(w);
    gpu_buffer_destroy(x);
    gpu_buffer_destroy(y);
    gpu_buffer_destroy(range);
    return failed;
}

int op_linear_measure(struct ops *ops, uint32_t type, uint32_t m, uint32_t n, uint32_t k,
                      int decode, double *flops, double *bytes, struct error *error) {
    double seconds;
    if (product_measure(ops, type, m, n, k, decode, 0, &seconds, error))
        return -1;
    *flops = 2.0 * m * n * k / seconds;
    *bytes = (double)op_matrix_bytes(type, n, k) / seconds;
    return 0;
}

int op_linear_bwd_measure(struct ops *ops, uint32_t type, uint32_t m, uint32_t n, uint32_t k,
                          double *flops, struct error *error) {
    double seconds;
    if (product_measure(ops, type, m, n, k, 0, 1, &seconds, error))
        return -1;
    *flops = 2.0 * m * n * k / seconds;
    return 0;
}

int op_read_measure(struct ops *ops, uint64_t bytes, double *bytes_per_second,
                    struct error *error) {
    struct gpu_buffer *from = NULL, *to = NULL;
    double least;
    int failed = -1;
    if (buffer(ops, &from, bytes, error) || buffer(ops, &to, 64, error))
        goto done;
    uint32_t n_cells = (uint32_t)(bytes / 16), each = 64 * 1024 / 16; /* 64 KiB for each subgroup */
    uint32_t subgroups = (n_cells + each - 1) / each, per_group = ops->workgroup / ops->subgroup;
    struct read read = {
        .params =
            {
                .x = gpu_buffer_address(from),
                .dst = gpu_buffer_address(to),
                .n_cells = n_cells,
                .cells_each = each,
            },
        .bytes = bytes,
        .workgroups = (subgroups + per_group - 1) / per_group,
        .texels = ops->kernel_family == LINEAR_TEXELS,
    };
    failed = timed(ops, read_once, &read, &least, error);
    if (!failed)
        *bytes_per_second = (double)bytes / least;
done:
    if (failed)
        gpu_queue_abandon(ops->queue);
    gpu_buffer_destroy(from);
    gpu_buffer_destroy(to);
    return failed;
}
