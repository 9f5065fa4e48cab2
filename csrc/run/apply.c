/* Single weights applied to the caller's vectors, and weights read back: for steering value
 * vectors, lenses and ablations. */
#include <stdlib.h>
#include <string.h>

#include "run/work.h"

static int apply_rows(struct run_work *work, const struct op_matrix *matrix, const float *x,
                      uint32_t n, float *y, struct error *error) {
    uint32_t x_stride = op_row_stride(matrix->k), y_stride = op_row_stride(matrix->n);
    struct gpu_buffer *input = NULL, *output = NULL;
    int failed = -1;
    if (gpu_buffer_create(&input, work->model->ops.device, 4 * (uint64_t)n * x_stride, GPU_UPLOAD,
                          "apply input", error) ||
        gpu_buffer_create(&output, work->model->ops.device, 4 * (uint64_t)n * y_stride,
                          GPU_READBACK, "apply output", error))
        goto done;
    float *to = gpu_buffer_map(input);
    memset(to, 0, 4 * (size_t)n * x_stride);
    for (uint32_t i = 0; i < n; i++)
        memcpy(to + (size_t)i * x_stride, x + (size_t)i * matrix->k, 4 * (size_t)matrix->k);
    struct op_linear_args args = {
        .x = gpu_buffer_address(input),
        .dst = gpu_buffer_address(output),
        .n_rows = n,
        .x_stride = x_stride,
        .dst_stride = y_stride,
    };
    if (op_linear(&work->model->ops, matrix, &args, error) ||
        gpu_queue_wait(work->model->ops.queue, error))
        goto done;
    const float *from = gpu_buffer_map(output);
    for (uint32_t i = 0; i < n; i++)
        memcpy(y + (size_t)i * matrix->n, from + (size_t)i * y_stride, 4 * (size_t)matrix->n);
    failed = 0;
done:
    if (failed)
        gpu_queue_abandon(work->model->ops.queue);
    gpu_buffer_destroy(input);
    gpu_buffer_destroy(output);
    return failed;
}

int run_apply(struct run_work *work, const char *name, int layer, const float *x, uint32_t n,
              float *y, struct error *error) {
    uint32_t rows, columns;
    const struct op_matrix *matrix = model_matrix_find(work->model, name, layer, &rows, &columns);
    if (!matrix)
        return error_set(error, ERROR_KEY, "no matrix %s in layer %d", name, layer);
    uint32_t at_once = (uint32_t)((UINT64_C(64) << 20) /
                                  (4 * (uint64_t)op_row_stride(rows > columns ? rows : columns)));
    for (uint32_t done = 0, some; done < n; done += some) {
        some = n - done < at_once ? n - done : at_once;
        if (apply_rows(work, matrix, x + (size_t)done * columns, some, y + (size_t)done * rows,
                       error))
            return -1;
    }
    return 0;
}

/* The embedding's kernel reads rows of any matrix. */
static int read_rows(struct run_work *work, const struct op_matrix *matrix, uint32_t first,
                     uint32_t n, float *out, struct error *error) {
    struct token_meta *rows = calloc(n, sizeof *rows);
    uint64_t tokens;
    if (!rows)
        return error_set(error, ERROR_MEMORY, "out of memory for row numbers");
    for (uint32_t i = 0; i < n; i++)
        rows[i].id = first + i;
    int failed = work_upload_reset(work, error) ||
                 work_upload(work, rows, n * sizeof *rows, &tokens, error);
    free(rows);
    if (failed)
        return -1;
    struct op_embed_args args = {
        .tokens = tokens,
        .dst = gpu_buffer_address(work->readback),
        .n_tokens = n,
        .stride = matrix->k,
        .scale = 1,
    };
    if (op_embed(&work->model->ops, matrix, &args, error) ||
        gpu_queue_wait(work->model->ops.queue, error))
        return -1;
    memcpy(out, gpu_buffer_map(work->readback), 4 * (size_t)n * matrix->k);
    return 0;
}

int run_rows_read(struct run_work *work, const char *name, int layer, uint32_t first, uint32_t n,
                  float *out, struct error *error) {
    uint32_t rows, columns;
    const struct op_matrix *matrix = model_matrix_find(work->model, name, layer, &rows, &columns);
    if (!matrix)
        return error_set(error, ERROR_KEY, "no matrix %s in layer %d", name, layer);
    uint32_t room = (uint32_t)(work->readback_bytes / 4 / columns),
             at_once = room < 16384 ? room : 16384;
    for (uint32_t done = 0, some; done < n; done += some) {
        some = n - done < at_once ? n - done : at_once;
        if (read_rows(work, matrix, first + done, some, out + (size_t)done * columns, error)) {
            gpu_queue_abandon(work->model->ops.queue);
            return -1;
        }
    }
    return 0;
}

int run_vector_read(struct run_work *work, const char *name, int layer, float *out,
                    struct error *error) {
    uint32_t n;
    const uint64_t *vector = model_vector_find(work->model, name, layer, &n);
    if (!vector || !*vector)
        return error_set(error, ERROR_KEY, "no vector %s in layer %d", name, layer);
    struct copy_params copy = {
        .x = *vector,
        .dst = gpu_buffer_address(work->readback),
        .n_rows = 1,
        .width = n,
    };
    if (op_copy(&work->model->ops, &copy, error) || gpu_queue_wait(work->model->ops.queue, error)) {
        gpu_queue_abandon(work->model->ops.queue);
        return -1;
    }
    memcpy(out, gpu_buffer_map(work->readback), 4 * (size_t)n);
    return 0;
}
