/* Scores of a contraction tile: the products (difference of a node's output) . (gradient of an
 * input), computed as matrix products. */
#include <stdlib.h>
#include <string.h>

#include "analysis/attribution.h"

struct tile {
    uint32_t first, n; /* sample tokens */
    uint64_t row;      /* bytes of a row of width D */
};

static uint64_t rows_of(const struct gpu_buffer *buffer, const struct tile *tile, uint32_t stride) {
    return run_address(buffer) + 4 * (uint64_t)tile->first * stride;
}

static int copy(struct attribution *a, uint64_t from, uint32_t from_stride, uint64_t to,
                uint32_t to_stride, uint32_t width, uint32_t n, struct error *error) {
    struct copy_params params = {
        .x = from,
        .dst = to,
        .n_rows = n,
        .width = width,
        .x_stride = from_stride,
        .out_stride = to_stride,
    };
    return op_copy(&a->work->model->ops, &params, error);
}

/* For heads whose size is no multiple of 16: a->expanded [n_heads, n, stride], where rows of head h
 * hold the columns of that head and zeros elsewhere. */
static int expand(struct attribution *a, const struct tile *tile, uint64_t from, uint32_t n_heads,
                  uint32_t stride, struct error *error) {
    uint32_t d_head = a->work->model->facts.d_head;
    RUN(gpu_queue_zero(a->work->model->ops.queue, a->expanded, 0, gpu_buffer_size(a->expanded),
                       error));
    for (uint32_t h = 0; h < n_heads; h++) {
        uint64_t column = 4 * (uint64_t)h * d_head;
        RUN(copy(a, from + column, stride,
                 run_address(a->expanded) + 4 * (uint64_t)h * tile->n * stride + column, stride,
                 d_head, tile->n, error));
    }
    return 0;
}

/* to[head, sample token, :] = W_O^h dz, times the post-norm's gain where there is one. */
static int head_differences(struct attribution *a, const struct tile *tile, uint32_t i, uint64_t to,
                            struct error *error) {
    struct run_work *work = a->work;
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[a->first_layer + i];
    uint64_t dz = rows_of(a->layers[i].dz, tile, work->z_stride);
    if (f->d_head % 16 == 0) {
        for (uint32_t h = 0; h < f->n_heads; h++) {
            struct op_linear_args args = {
                .x = dz + 4 * (uint64_t)h * f->d_head,
                .dst = to + h * tile->n * tile->row,
                .n_rows = tile->n,
                .x_stride = work->z_stride,
                .dst_stride = work->d_stride,
                .first_k = h * f->d_head,
                .n_k = f->d_head,
            };
            RUN(op_linear(&work->model->ops, &layer->o, &args, error));
        }
    } else {
        RUN(expand(a, tile, dz, f->n_heads, work->z_stride, error));
        struct op_linear_args args = {
            .x = run_address(a->expanded),
            .dst = to,
            .n_rows = f->n_heads * tile->n,
            .x_stride = work->z_stride,
            .dst_stride = work->d_stride,
        };
        RUN(op_linear(&work->model->ops, &layer->o, &args, error));
    }
    if (!f->post_norms)
        return 0;
    struct norm_params gain = {
        .x = to,
        .gain = layer->ln1_post,
        .dst = to,
        .width = f->d_model,
        .stride = work->d_stride,
        .flags = NORM_READ_NORMALIZED,
    };
    return op_norm(&work->model->ops, &gain, f->n_heads * tile->n, error);
}

/* a->du[node, sample token, :]: the differences of all nodes as rows of width D. */
static int differences(struct attribution *a, const struct tile *tile, const float *steer,
                       struct error *error) {
    struct run_work *work = a->work;
    const struct model_facts *f = &work->model->facts;
    uint64_t vector, to = run_address(a->du);
    RUN(work_upload(work, steer, 4 * (uint64_t)f->d_model, &vector, error));
    RUN(copy(a, vector, 0, to, work->d_stride, f->d_model, tile->n, error));
    to += tile->n * tile->row;
    for (uint32_t i = 0; i < a->depth; i++) {
        RUN(head_differences(a, tile, i, to, error));
        to += (uint64_t)f->n_heads * tile->n * tile->row;
        RUN(copy(a, rows_of(a->layers[i].dmlp, tile, work->d_stride), work->d_stride, to,
                 work->d_stride, f->d_model, tile->n, error));
        to += tile->n * tile->row;
    }
    return 0;
}

/* a->g[input, sample token, :]: gradients of a layer's q, k and v inputs, then of its MLP's. */
static int input_gradients(struct attribution *a, const struct tile *tile, uint32_t i,
                           struct error *error) {
    struct run_work *work = a->work;
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *layer = &work->model->layers[a->first_layer + i];
    const struct attribution_layer *sums = &a->layers[i];
    uint32_t n = f->n_heads + 2 * f->n_kv_heads;
    uint64_t heads = rows_of(sums->heads, tile, work->qkv_stride), g = run_address(a->g);
    if (f->d_head % 16 == 0) {
        for (uint32_t v = 0; v < n; v++) {
            struct op_linear_bwd_args args = {
                .dy = heads + 4 * (uint64_t)v * f->d_head,
                .dx = g + v * tile->n * tile->row,
                .n_rows = tile->n,
                .y_stride = work->qkv_stride,
                .x_stride = work->d_stride,
                .first_n = v * f->d_head,
                .n_sum = f->d_head,
            };
            RUN(op_linear_bwd(&work->model->ops, &layer->qkv, &args, error));
        }
    } else {
        RUN(expand(a, tile, heads, n, work->qkv_stride, error));
        struct op_linear_bwd_args args = {
            .dy = run_address(a->expanded),
            .dx = g,
            .n_rows = n * tile->n,
            .y_stride = work->qkv_stride,
            .x_stride = work->d_stride,
        };
        RUN(op_linear_bwd(&work->model->ops, &layer->qkv, &args, error));
    }
    if (attribution_passes_norm(f, a->normed)) {
        struct head_gradients_params params = {
            .g = g,
            .gain = layer->ln1,
            .steps = rows_of(sums->steps, tile, a->n_steps * n),
            .xs = rows_of(sums->xs, tile, a->n_steps * work->d_stride),
            .n_inputs = n,
            .n_sample_tokens = tile->n,
            .n_steps = a->n_steps,
            .width = f->d_model,
            .d_stride = work->d_stride,
            .flags = f->norm == NORM_KIND_LAYER ? HEAD_GRADIENTS_LAYER : 0,
        };
        RUN(op_head_gradients(&work->model->ops, &params, error));
    }
    return copy(a, rows_of(sums->mlp, tile, work->d_stride), work->d_stride,
                g + n * tile->n * tile->row, work->d_stride, f->d_model, tile->n, error);
}

/* products[input, node], at the next drain: sums over the tile of the gradients of n_inputs inputs
 * at `g` times the differences of the first n_nodes nodes. */
static int dots(struct attribution *a, const struct tile *tile, uint64_t g, uint32_t n_inputs,
                uint32_t n_nodes, float *products, struct error *error) {
    struct dots_params params = {
        .a = g,
        .b = run_address(a->du),
        .n_a = n_inputs,
        .n_b = n_nodes,
        .n_k = tile->n * a->work->d_stride,
    };
    RUN(work_readback_floats(a->work, n_inputs * n_nodes, products, &params.dst, error));
    return op_dots(&a->work->model->ops, &params, error);
}

/* The gradient, in a->g, of the residual stream that node u adds to: steer's, then layer by layer
 * the heads' and the MLP's, which are one in parallel layers. */
static uint32_t gradient_of_node(const struct model_facts *f, uint32_t u) {
    if (u == 0)
        return 0;
    uint32_t i = (u - 1) / (f->n_heads + 1), mlp = (u - 1) % (f->n_heads + 1) == f->n_heads;
    return f->parallel ? 1 + i : 1 + 2 * i + mlp;
}

/* dims[node, :], at the next drain: differences of nodes times the gradient of the residual stream
 * that they are added to. */
static int node_dims(struct attribution *a, const struct tile *tile, float *dims,
                     struct error *error) {
    struct run_work *work = a->work;
    const struct model_facts *f = &work->model->facts;
    uint32_t n = attribution_nodes(a), *groups = malloc(n * sizeof *groups), d = work->d_stride;
    uint64_t g = run_address(a->g), uploaded;
    if (!groups)
        return error_set(error, ERROR_MEMORY, "out of memory for node scores");
    for (uint32_t u = 0; u < n; u++)
        groups[u] = gradient_of_node(f, u);
    int failed = work_upload(work, groups, n * sizeof *groups, &uploaded, error);
    free(groups);
    if (failed)
        return -1;
    RUN(copy(a, rows_of(a->pre, tile, d), d, g, d, f->d_model, tile->n, error));
    for (uint32_t i = 0; i < a->depth; i++) {
        if (a->layers[i].mid) {
            g += tile->n * tile->row;
            RUN(copy(a, rows_of(a->layers[i].mid, tile, d), d, g, d, f->d_model, tile->n, error));
        }
        g += tile->n * tile->row;
        RUN(copy(a, rows_of(a->layers[i].post, tile, d), d, g, d, f->d_model, tile->n, error));
    }
    struct node_dims_params params = {
        .du = run_address(a->du),
        .g = run_address(a->g),
        .groups = uploaded,
        .n_sample_tokens = tile->n,
        .width = f->d_model,
        .d_stride = d,
    };
    RUN(work_readback_floats(work, n * f->d_model, dims, &params.dims, error));
    return op_node_dims(&work->model->ops, &params, n, error);
}

/* Host arrays of one tile: for every layer the products of its inputs with the nodes that precede
 * its MLP's input, the products of the logits' input, and the dimension scores. */
struct products {
    float *layers, *logits, *dims;
};

/* Those that inputs of layer i may read: nodes below layer i and, unless it is parallel, its heads.
 */
static uint32_t nodes_below(const struct attribution *a, uint32_t i) {
    const struct model_facts *f = &a->work->model->facts;
    return 1 + i * (f->n_heads + 1) + (f->parallel ? 0 : f->n_heads);
}

/* Computes the products of a tile; waits for the device. */
static int tile_run(struct attribution *a, const struct tile *tile, const float *steer,
                    struct products *products, struct error *error) {
    const struct model_facts *f = &a->work->model->facts;
    uint32_t inputs = f->n_heads + 2 * f->n_kv_heads + 1;
    float *to = products->layers;
    RUN(differences(a, tile, steer, error));
    for (uint32_t i = 0; i < a->depth; i++) {
        RUN(input_gradients(a, tile, i, error));
        RUN(dots(a, tile, run_address(a->g), inputs, nodes_below(a, i), to, error));
        to += (size_t)inputs * nodes_below(a, i);
    }
    RUN(dots(a, tile, rows_of(a->logits, tile, a->work->d_stride), 1, attribution_nodes(a),
             products->logits, error));
    RUN(node_dims(a, tile, products->dims, error));
    return work_readback_drain(a->work, error);
}

/* Adds the products of a tile to the scores. */
static void add(const struct attribution *a, const struct products *products, double *edges,
                double *nodes, double *dims, uint32_t dims_rows) {
    const struct model_facts *f = &a->work->model->facts;
    uint32_t inputs = f->n_heads + 2 * f->n_kv_heads + 1, n_nodes = attribution_nodes(a),
             n_inputs = attribution_inputs(a), d = f->d_model;
    const float *from = products->layers;
    for (uint32_t i = 0; i < a->depth; i++)
        for (uint32_t v = 0; v < inputs; v++, from += nodes_below(a, i))
            for (uint32_t u = 0; u < nodes_below(a, i); u++)
                edges[(size_t)u * n_inputs + i * inputs + v] += from[u];
    for (uint32_t u = 0; u < n_nodes; u++) {
        const float *row = products->dims + (size_t)u * d;
        double sum = 0;
        edges[(size_t)u * n_inputs + n_inputs - 1] += products->logits[u];
        for (uint32_t k = 0; k < d; k++) {
            sum += row[k];
            if (u < dims_rows)
                dims[(size_t)u * d + k] += row[k];
        }
        nodes[u] += sum;
    }
}

int attribution_contract(struct attribution *a, uint32_t first, uint32_t n, const float *steer,
                         double *edges, double *nodes, double *dims, uint32_t dims_rows,
                         struct error *error) {
    const struct model_facts *f = &a->work->model->facts;
    struct tile tile = {.first = first, .n = n, .row = 4 * (uint64_t)a->work->d_stride};
    uint32_t inputs = f->n_heads + 2 * f->n_kv_heads + 1, n_nodes = attribution_nodes(a);
    size_t layers = 0;
    if (n == 0 || n > ATTRIBUTE_TILE || first > a->n_sample_tokens ||
        n > a->n_sample_tokens - first)
        return error_set(error, ERROR_VALUE, "a contraction tile of sample tokens %u to %u of %u",
                         first, first + n, a->n_sample_tokens);
    for (uint32_t i = 0; i < a->depth; i++)
        layers += (size_t)inputs * nodes_below(a, i);
    float *memory = malloc((layers + n_nodes + (size_t)n_nodes * f->d_model) * sizeof *memory);
    if (!memory)
        return error_set(error, ERROR_MEMORY, "out of memory for scores");
    struct products products = {
        .layers = memory,
        .logits = memory + layers,
        .dims = memory + layers + n_nodes,
    };
    a->work->n_pending = 0;
    a->work->readback_used = 0;
    int failed = work_upload_reset(a->work, error) || tile_run(a, &tile, steer, &products, error);
    if (failed)
        gpu_queue_abandon(a->work->model->ops.queue);
    else
        add(a, &products, edges, nodes, dims, dims_rows);
    free(memory);
    return failed ? -1 : 0;
}
