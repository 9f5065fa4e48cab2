/* Steering value vectors: three dispatches for each layer, without a wait between layers. */
#include <stdlib.h>
#include <string.h>

#include "analysis/ov.h"
#include "run/work.h"

/* Records one layer's vectors, which go to readback memory at `dst` [H, d_stride]. x: the direction
 * [d_stride], centred for LayerNorm. work->norm and work->qkv are overwritten. */
static int layer_vectors(struct run_work *work, uint32_t l, uint64_t x, int post, uint64_t dst,
                         struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[l];
    struct ops *ops = &work->model->ops;
    /* the first row of W_V, and of the panel that holds it */
    uint32_t first = (f->n_heads + f->n_kv_heads) * f->d_head, from = first / OP_PANEL * OP_PANEL;
    struct op_matrix values;
    struct norm_params gain = {
        .x = x,
        .gain = layer->ln1,
        .dst = gpu_buffer_address(work->norm),
        .width = f->d_model,
        .stride = work->d_stride,
        .flags = NORM_READ_NORMALIZED,
    };
    struct op_linear_args product = {
        .x = f->pre_norms ? gain.dst : x,
        .dst = gpu_buffer_address(work->qkv),
        .n_rows = 1,
        .x_stride = work->d_stride,
        .dst_stride = work->qkv_stride,
        .decode = 1,
    };
    struct op_head_out_args heads = {
        .x = product.dst + 4 * (uint64_t)(first - from),
        .dst = dst,
        .gain = post && f->post_norms ? layer->ln1_post : 0,
        .n_heads = f->n_heads,
        .n_kv_heads = f->n_kv_heads,
        .d_head = f->d_head,
        .dst_stride = work->d_stride,
    };
    if ((f->pre_norms && op_norm(ops, &gain, 1, error)) ||
        op_matrix_rows(&layer->qkv, from, layer->qkv.n - from, &values, error) ||
        op_linear(ops, &values, &product, error))
        return -1;
    return op_head_out(ops, &layer->o, &heads, error);
}

/* Vectors of layers [l, l + n), which fit readback memory together; waits for the device. */
static int layers_vectors(struct run_work *work, uint32_t l, uint32_t n, uint64_t x, int post,
                          float *out, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint64_t layer_floats = (uint64_t)f->n_heads * work->d_stride;
    for (uint32_t i = 0; i < n; i++)
        if (layer_vectors(work, l + i, x, post,
                          gpu_buffer_address(work->readback) + 4 * i * layer_floats, error))
            return -1;
    if (gpu_queue_wait(work->model->ops.queue, error))
        return -1;
    const float *from = gpu_buffer_map(work->readback);
    for (uint64_t row = 0; row < (uint64_t)n * f->n_heads; row++)
        memcpy(out + row * f->d_model, from + row * work->d_stride, f->d_model * sizeof *out);
    return 0;
}

/* The direction in upload memory, [d_stride] with zero pad columns. LayerNorm subtracts the mean of
 * what it reads, so of a direction, too. */
static int direction_upload(struct run_work *work, const float *direction, uint64_t *x,
                            struct error *error) {
    const struct model_facts *f = &work->model->facts;
    int centred = f->norm == NORM_KIND_LAYER && f->pre_norms;
    double mean = 0;
    float *row = calloc(work->d_stride, sizeof *row);
    if (!row)
        return error_set(error, ERROR_MEMORY, "out of memory for a direction");
    for (uint32_t i = 0; centred && i < f->d_model; i++)
        mean += direction[i];
    mean /= f->d_model;
    for (uint32_t i = 0; i < f->d_model; i++)
        row[i] = centred ? (float)(direction[i] - mean) : direction[i];
    int failed = work_upload(work, row, work->d_stride * sizeof *row, x, error);
    free(row);
    return failed;
}

int ov_value_vectors(struct run_work *work, const float *direction, uint32_t first_layer, int post,
                     float *out, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint64_t layer_floats = (uint64_t)f->n_heads * work->d_stride,
             at_once = work->readback_bytes / 4 / layer_floats, x;
    if (first_layer >= f->n_layers || at_once == 0)
        return error_set(error, ERROR_VALUE, "value vectors from layer %u of %u, %llu floats each",
                         first_layer, f->n_layers, (unsigned long long)layer_floats);
    if (work_upload_reset(work, error) || direction_upload(work, direction, &x, error))
        return -1;
    for (uint32_t l = first_layer, n; l < f->n_layers; l += n) {
        n = f->n_layers - l < at_once ? f->n_layers - l : (uint32_t)at_once;
        if (layers_vectors(work, l, n, x, post,
                           out + (uint64_t)(l - first_layer) * f->n_heads * f->d_model, error)) {
            gpu_queue_abandon(work->model->ops.queue);
            return -1;
        }
    }
    return 0;
}
