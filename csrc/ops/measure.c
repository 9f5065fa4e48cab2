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

/* Seconds of a product of m rows by n x k: forward, or backward from n to k. */
static int product_measure(struct ops *ops, uint32_t type, uint32_t m, uint32_t n, uint32_t k,
                           int decode, int backward, double *least, struct error *error) {
    struct gpu_buffer *w = NULL, *x = NULL, *y = NULL;
    double seconds[REPEATS];
    int failed = -1;
    if (buffer(ops, &w, op_matrix_bytes(type, n, k), error) ||
        buffer(ops, &x, 4 * (uint64_t)m * op_row_stride(k), error) ||
        buffer(ops, &y, 4 * (uint64_t)m * op_row_stride(n), error))
        goto done;
    struct op_matrix matrix = {
        .type = type,
        .n = n,
        .k = k,
        .k_cells = op_matrix_cells(type, k),
        .n_segments = 1,
        .segments = {{gpu_buffer_address(w), 0, n}},
    };
    struct op_linear_args args = {
        .x = gpu_buffer_address(x),
        .dst = gpu_buffer_address(y),
        .n_rows = m,
        .x_stride = op_row_stride(k),
        .dst_stride = op_row_stride(n),
        .decode = decode,
    };
    struct op_linear_bwd_args back = {
        .dy = args.dst,
        .dx = args.x,
        .n_rows = m,
        .y_stride = args.dst_stride,
        .x_stride = args.x_stride,
    };
    for (int i = -1; i < REPEATS; i++) { /* the first one compiles the kernel */
        if (gpu_queue_wait(ops->queue, error))
            goto done;
        double start = now();
        if ((backward ? op_linear_bwd(ops, &matrix, &back, error)
                      : op_linear(ops, &matrix, &args, error)) ||
            gpu_queue_wait(ops->queue, error))
            goto done;
        if (i >= 0)
            seconds[i] = now() - start;
    }
    *least = best(seconds);
    failed = 0;
done:
    if (failed)
        gpu_queue_abandon(ops->queue);
    gpu_buffer_destroy(w);
    gpu_buffer_destroy(x);
    gpu_buffer_destroy(y);
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
    double seconds[REPEATS];
    int failed = -1;
    if (buffer(ops, &from, bytes, error) || buffer(ops, &to, 64, error))
        goto done;
    int texels = ops->kernel_family == LINEAR_TEXELS;
    uint32_t n_cells = (uint32_t)(bytes / 16), each = 64 * 1024 / 16; /* 64 KiB for each subgroup */
    struct read_params params = {
        .x = gpu_buffer_address(from),
        .dst = gpu_buffer_address(to),
        .n_cells = n_cells,
        .cells_each = each,
    };
    uint32_t subgroups = (n_cells + each - 1) / each, per_group = ops->workgroup / ops->subgroup;
    for (int i = -1; i < REPEATS; i++) {
        if (gpu_queue_wait(ops->queue, error))
            goto done;
        double start = now();
        if (texels && gpu_queue_texels(ops->queue, params.x, bytes, error))
            goto done;
        if (gpu_queue_dispatch(ops->queue, kernel_read(texels), &params, sizeof params,
                               (subgroups + per_group - 1) / per_group, 1, 1, 1e6, error) ||
            gpu_queue_wait(ops->queue, error))
            goto done;
        if (i >= 0)
            seconds[i] = now() - start;
    }
    *bytes_per_second = (double)bytes / best(seconds);
    failed = 0;
done:
    if (failed)
        gpu_queue_abandon(ops->queue);
    gpu_buffer_destroy(from);
    gpu_buffer_destroy(to);
    return failed;
}
