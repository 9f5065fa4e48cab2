/* The memory of an attribution, and the hooks that collect differences and gradients while batches
 * run. The scores are computed in attribution_scores.c. */
#include "analysis/attribution.h"

#include <stdlib.h>
#include <string.h>

uint32_t attribution_nodes(const struct attribution *a) {
    return 1 + a->depth * (a->work->model->facts.n_heads + 1);
}

uint32_t attribution_inputs(const struct attribution *a) {
    const struct model_facts *f = &a->work->model->facts;
    return a->depth * (f->n_heads + 2 * f->n_kv_heads + 1) + 1;
}

/* The q, k and v inputs of a layer, without the MLP's. */
static uint32_t inputs_of_layer(const struct model_facts *f) {
    return f->n_heads + 2 * f->n_kv_heads;
}

int attribution_passes_norm(const struct model_facts *f, int normed) {
    return !normed && f->pre_norms;
}

/* Does the bias of a layer's ln1 count? */
static int bias_needed(const struct model_facts *f, int normed) {
    return attribution_passes_norm(f, normed) && f->norm_bias;
}

/* Gradients of the residual stream that the nodes of `depth` layers add to: before the first
 * layer, and in each layer where the heads and where the MLP end, which is one place if the layer
 * is parallel. */
static uint32_t stream_gradients(const struct model_facts *f, uint32_t depth) {
    return 1 + (f->parallel ? 1 : 2) * depth;
}

/* Floats of one sample token in the buffers of a layer: dz, dmlp, heads, steps, xs, mlp, mid,
 * post. */
static void sample_token_floats(const struct model_facts *f, uint32_t n_steps, int normed,
                                uint32_t floats[8]) {
    uint32_t d = op_row_stride(f->d_model), n = inputs_of_layer(f);
    int passes_norm = attribution_passes_norm(f, normed);
    const uint32_t all[8] = {op_row_stride(f->n_heads * f->d_head),
                             d,
                             op_row_stride(n * f->d_head),
                             passes_norm ? n_steps * n : 0,
                             passes_norm ? n_steps * d : 0,
                             d,
                             f->parallel ? 0 : d,
                             d};
    memcpy(floats, all, sizeof all);
}

/* Floats of the rows of width D, and of the expanded heads, of one contraction tile. */
static uint64_t tile_floats(const struct model_facts *f, uint32_t depth) {
    uint32_t heads = op_row_stride(f->n_heads * f->d_head),
             qkv = op_row_stride(inputs_of_layer(f) * f->d_head);
    uint64_t nodes = 1 + (uint64_t)depth * (f->n_heads + 1), inputs = inputs_of_layer(f) + 1,
             groups = stream_gradients(f, depth);
    uint64_t rows = nodes + (inputs > groups ? inputs : groups);
    uint64_t expanded = f->d_head % 16
                            ? (uint64_t)f->n_heads * heads + (uint64_t)inputs_of_layer(f) * qkv
                            : 0;
    return ATTRIBUTE_TILE * (rows * op_row_stride(f->d_model) + expanded);
}

/* Readback memory: the products of one contraction tile, or a few rows of logits if those are
 * more. */
static uint64_t readback_bytes(const struct model_facts *f) {
    uint64_t logits = 2 * ATTRIBUTION_PICKS_ROWS * 4 * (uint64_t)(f->d_vocab + f->d_model),
             nodes = 1 + (uint64_t)f->n_layers * (f->n_heads + 1);
    uint64_t products =
        4 * nodes * (f->d_model + (uint64_t)f->n_layers * (inputs_of_layer(f) + 1) + 1) + 4096;
    uint64_t most = logits > ATTRIBUTION_PICKS_BYTES ? logits : ATTRIBUTION_PICKS_BYTES;
    return (products > most ? products : most) + (1u << 20);
}

uint64_t attribution_bytes(const struct model_facts *f, uint64_t scratch,
                           const struct attribution_sizes *s) {
    uint32_t floats[8], depth = f->n_layers - s->first_layer, at_once;
    uint64_t token = 2 * (uint64_t)op_row_stride(f->d_model);
    sample_token_floats(f, s->n_steps, s->normed, floats);
    for (int i = 0; i < 8; i++)
        token += (uint64_t)floats[i] * depth;
    return run_work_bytes(f, scratch, s->capacity, s->longest, readback_bytes(f), 1) +
           run_tape_bytes(f, scratch, s->step_capacity, s->longest, s->first_layer,
                          s->keep_inside) +
           run_cache_bytes(f, s->capacity, s->first_layer) +
           attribution_picks_bytes(f, s->n_sample_tokens, &at_once) +
           4 * (token * s->n_sample_tokens + tile_floats(f, depth) +
                (bias_needed(f, s->normed) ? (uint64_t)depth * floats[2] : 0));
}

uint64_t attribution_split_bytes(const struct model_facts *f, const struct attribution_sizes *s) {
    uint32_t inputs = inputs_of_layer(f) + 1,
             nodes = 1 + (f->n_layers - s->first_layer) * (f->n_heads + 1);
    uint64_t products[] = {
        run_split_bytes(f, s->capacity, 0), run_split_bytes(f, s->step_capacity, 1),
        op_dots_bytes(inputs, nodes, ATTRIBUTE_TILE * op_row_stride(f->d_model))};
    uint64_t most = products[0] > products[1] ? products[0] : products[1];
    return products[2] > most ? products[2] : most;
}

/* A buffer of `floats` for each sample token; none if `floats` is 0. */
static int sums_make(struct attribution *a, struct gpu_buffer **out, uint32_t floats,
                     const char *name, struct error *error) {
    return floats ? work_grow(a->work, out, 4 * (uint64_t)floats * a->n_sample_tokens, name, error)
                  : 0;
}

/* layer->bias = b_qkv + W_qkv b_ln1 */
static int bias_compute(struct attribution *a, uint32_t i, struct error *error) {
    struct run_work *work = a->work;
    const struct model_layer *weights = &work->model->layers[a->first_layer + i];
    RUN(work_grow(work, &a->layers[i].bias, 4 * (uint64_t)work->qkv_stride, "attribution", error));
    struct op_linear_args args = {
        .x = weights->b_ln1,
        .dst = run_address(a->layers[i].bias),
        .bias = weights->b_qkv,
        .n_rows = 1,
        .x_stride = work->d_stride,
        .dst_stride = work->qkv_stride,
    };
    return op_linear(&work->model->ops, &weights->qkv, &args, error);
}

static int layers_make(struct attribution *a, struct error *error) {
    const struct model_facts *f = &a->work->model->facts;
    uint32_t floats[8];
    sample_token_floats(f, a->n_steps, a->normed, floats);
    for (uint32_t i = 0; i < a->depth; i++) {
        struct attribution_layer *layer = &a->layers[i];
        struct gpu_buffer **buffers[8] = {&layer->dz, &layer->dmlp, &layer->heads, &layer->steps,
                                          &layer->xs, &layer->mlp,  &layer->mid,   &layer->post};
        for (int j = 0; j < 8; j++)
            RUN(sums_make(a, buffers[j], floats[j], "attribution", error));
        if (bias_needed(f, a->normed))
            RUN(bias_compute(a, i, error));
    }
    return 0;
}

int attribution_create(struct attribution **out, struct model *model,
                       const struct attribution_sizes *sizes, struct error *error) {
    const struct model_facts *f = &model->facts;
    *out = NULL;
    uint64_t needed = attribution_bytes(f, run_sizes_of(model).scratch, sizes),
             available = gpu_device_available(model->ops.device);
    if (needed > available)
        return error_set(error, ERROR_DEVICE,
                         "attribution of %u tokens at once takes %.2f GB and %.2f GB are free on "
                         "the device: lower max_memory",
                         sizes->n_sample_tokens, needed / 1e9, available / 1e9);
    struct attribution *a = calloc(1, sizeof *a);
    if (a)
        a->layers = calloc(f->n_layers - sizes->first_layer, sizeof *a->layers);
    if (!a || !a->layers) {
        error_set(error, ERROR_MEMORY, "out of memory for an attribution");
        goto fail;
    }
    a->first_layer = sizes->first_layer;
    a->depth = f->n_layers - sizes->first_layer;
    a->n_sample_tokens = sizes->n_sample_tokens;
    a->n_steps = sizes->n_steps;
    a->normed = sizes->normed;
    if (ops_split_expect(&model->ops, attribution_split_bytes(f, sizes), error) ||
        run_work_create(&a->work, model, sizes->capacity, readback_bytes(f), error) ||
        run_tape_create(&a->tape, a->work, sizes->step_capacity, sizes->first_layer,
                        sizes->keep_inside, error))
        goto fail;
    uint64_t row = 4 * (uint64_t)a->work->d_stride * ATTRIBUTE_TILE;
    uint32_t groups = stream_gradients(f, a->depth), inputs = inputs_of_layer(f) + 1;
    uint32_t wide = f->n_heads * a->work->z_stride > inputs_of_layer(f) * a->work->qkv_stride
                        ? f->n_heads * a->work->z_stride
                        : inputs_of_layer(f) * a->work->qkv_stride;
    if (layers_make(a, error) || sums_make(a, &a->pre, a->work->d_stride, "attribution", error) ||
        sums_make(a, &a->logits, a->work->d_stride, "attribution", error) ||
        work_grow(a->work, &a->du, attribution_nodes(a) * row, "node differences", error) ||
        work_grow(a->work, &a->g, (groups > inputs ? groups : inputs) * row, "input gradients",
                  error) ||
        (f->d_head % 16 && work_grow(a->work, &a->expanded, 4 * (uint64_t)wide * ATTRIBUTE_TILE,
                                     "expanded heads", error)))
        goto fail;
    *out = a;
    return 0;
fail:
    if (a && a->work)
        gpu_queue_abandon(model->ops.queue);
    attribution_destroy(a);
    return -1;
}

void attribution_destroy(struct attribution *a) {
    if (!a)
        return;
    if (a->work && a->work->model)
        gpu_queue_wait(a->work->model->ops.queue, NULL);
    for (uint32_t i = 0; a->layers && i < a->depth; i++) {
        struct attribution_layer *layer = &a->layers[i];
        struct gpu_buffer *buffers[] = {layer->dz,    layer->dmlp, layer->heads,
                                        layer->steps, layer->xs,   layer->mlp,
                                        layer->mid,   layer->post, layer->bias};
        for (size_t j = 0; j < sizeof buffers / sizeof buffers[0]; j++)
            gpu_buffer_destroy(buffers[j]);
    }
    struct gpu_buffer *own[] = {a->pre, a->logits, a->du, a->g, a->expanded, a->lists, a->picks};
    for (size_t j = 0; j < sizeof own / sizeof own[0]; j++)
        gpu_buffer_destroy(own[j]);
    run_tape_destroy(a->tape);
    run_work_destroy(a->work);
    free(a->layers);
    free(a);
}

int attribution_reset(struct attribution *a, struct error *error) {
    struct gpu_queue *queue = a->work->model->ops.queue;
    struct gpu_buffer *sums[] = {a->pre, a->logits};
    for (int j = 0; j < 2; j++)
        RUN(gpu_queue_zero(queue, sums[j], 0, gpu_buffer_size(sums[j]), error));
    for (uint32_t i = 0; i < a->depth;
         i++) { /* the hooks overwrite dz, dmlp, steps and xs, and add to the rest */
        struct gpu_buffer *layer[] = {a->layers[i].heads, a->layers[i].mlp, a->layers[i].mid,
                                      a->layers[i].post};
        for (int j = 0; j < 4; j++)
            if (layer[j])
                RUN(gpu_queue_zero(queue, layer[j], 0, gpu_buffer_size(layer[j]), error));
    }
    return 0;
}

/* Where the rows of the batch's sample tokens begin in `buffer`. */
static uint64_t sums_at(const struct attribution *a, const struct gpu_buffer *buffer,
                        uint32_t stride) {
    return run_address(buffer) + 4 * (uint64_t)a->batch_first * stride;
}

/* Forward hook: the differences of z and of the MLP's output between the two runs. */
static int hook_forward(struct attribution *a, struct run_work *work, enum run_hook_point what,
                        int l, uint64_t address, uint32_t stride, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    struct attribution_layer *layer = &a->layers[l - (int)a->first_layer];
    struct difference_params params = {
        .x = address,
        .pairs = a->sources,
        .stride = stride,
        .eps = f->norm_eps,
    };
    if (what == HOOK_MLP_OUT) {
        params.dst = sums_at(a, layer->dmlp, stride);
        params.width = f->d_model;
    } else if (what == (f->post_norms ? HOOK_ATTN_RAW : HOOK_Z)) {
        params.x = run_address(work->z);
        params.stride = work->z_stride;
        params.width = f->n_heads * f->d_head;
        params.dst = sums_at(a, layer->dz, work->z_stride);
        if (f->post_norms) {
            params.raw = address;
            params.raw_width = f->d_model;
            params.raw_stride = stride;
        }
    } else {
        return 0;
    }
    return op_difference(&work->model->ops, &params, a->batch_n, error);
}

/* Backward hook at q, k and v: their gradients, averaged over the integration steps. */
static int hook_heads(struct attribution *a, struct run_work *work, int l, uint64_t address,
                      struct error *error) {
    const struct model_facts *f = &work->model->facts;
    struct attribution_layer *layer = &a->layers[l - (int)a->first_layer];
    uint32_t n = inputs_of_layer(f);
    int passes_norm = attribution_passes_norm(f, a->normed);
    uint64_t bias = layer->bias ? run_address(layer->bias) : work->model->layers[l].b_qkv;
    struct head_inputs_params params = {
        .dqkv = address,
        .qkv = run_address(a->tape->layers[l].qkv_in),
        .bias = bias,
        .x = run_address(a->tape->layers[l].x),
        .sources = a->sources,
        .heads = sums_at(a, layer->heads, work->qkv_stride),
        .n_inputs = n,
        .d_head = f->d_head,
        .stride = work->qkv_stride,
        .width = f->d_model,
        .d_stride = work->d_stride,
        .n_sources = a->n_sources,
        .first_step = a->first_step,
        .n_steps = a->n_steps,
        .flags = (passes_norm ? 0 : HEAD_INPUTS_NORMED) |
                 (f->norm == NORM_KIND_LAYER ? HEAD_INPUTS_LAYER : 0),
        .has_bias = bias != 0,
        .eps = f->norm_eps,
        .weight = 1.0f / a->n_steps,
    };
    if (passes_norm) {
        params.steps = sums_at(a, layer->steps, a->n_steps * n);
        params.xs = sums_at(a, layer->xs, a->n_steps * work->d_stride);
    }
    return op_head_inputs(&work->model->ops, &params, a->batch_n, error);
}

/* Backward hook: gradients of inputs and of the residual stream, averaged over the integration
 * steps. */
static int hook_backward(struct attribution *a, struct run_work *work, enum run_hook_point what,
                         int l, uint64_t address, uint32_t stride, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    struct attribution_layer *layer = &a->layers[l - (int)a->first_layer];
    const struct gpu_buffer *to = NULL;
    /* the norm that the unembedding's input comes from includes the factor on the logits */
    float factor = what == HOOK_D_FINAL_NORMED ? f->logit_scale : 1;
    switch (what) {
    case HOOK_D_QKV: return hook_heads(a, work, l, address, error);
    case HOOK_D_RESID_POST: to = layer->post; break;
    case HOOK_D_RESID_MID: to = layer->mid; break;
    case HOOK_D_RESID_PRE: to = l == (int)a->first_layer ? a->pre : NULL; break;
    case HOOK_D_MLP_NORMED: to = a->normed ? layer->mlp : NULL; break;
    case HOOK_D_MLP_INPUT: to = a->normed ? NULL : layer->mlp; break;
    case HOOK_D_FINAL_NORMED: to = a->normed ? a->logits : NULL; break;
    case HOOK_D_FINAL_INPUT: to = a->normed ? NULL : a->logits; break;
    default: break;
    }
    if (!to)
        return 0;
    struct accumulate_params params = {
        .src = address,
        .sources = a->sources,
        .dst = sums_at(a, to, stride),
        .width = f->d_model,
        .stride = stride,
        .n_sources = a->n_sources,
        .weight = factor / a->n_steps,
    };
    return op_accumulate(&work->model->ops, &params, a->batch_n, error);
}

static int hook_call(void *context, struct run_work *work, enum run_hook_point what, int layer,
                     uint64_t address, uint32_t stride, struct error *error) {
    struct attribution *a = context;
    int backward = what >= HOOK_D_RESID_POST;
    if (a->collecting == 1 && !backward)
        return what == HOOK_FINAL || layer < (int)a->first_layer
                   ? 0
                   : hook_forward(a, work, what, layer, address, stride, error);
    if (a->collecting == 2 && backward)
        return hook_backward(a, work, what, layer, address, stride, error);
    return 0;
}

/* Checks the range of sample tokens and the packed tokens that they name. */
static int sample_tokens_check(const struct attribution *a, const struct run_batch *batch,
                               uint32_t first, uint32_t n, const uint32_t *sources, uint32_t each,
                               int none_allowed, struct error *error) {
    uint64_t total = 0;
    for (uint32_t r = 0; r < batch->n_rows; r++)
        total += batch->n_tokens[r];
    if (n == 0 || first > a->n_sample_tokens || n > a->n_sample_tokens - first ||
        batch->first_layer != a->first_layer)
        return error_set(error, ERROR_VALUE, "sample tokens %u to %u of %u, a batch from layer %u",
                         first, first + n, a->n_sample_tokens, batch->first_layer);
    for (uint64_t i = 0; i < (uint64_t)n * each; i++)
        if (sources[i] >= total && !(none_allowed && sources[i] == NO_SOURCE))
            return error_set(error, ERROR_VALUE, "sample token %llu: token %u of %llu",
                             (unsigned long long)(first + i / each), sources[i],
                             (unsigned long long)total);
    return 0;
}

/* Uploads the packed tokens of the batch's sample tokens. They have a buffer of their own, because
 * run_one_chunk begins with work_upload_reset, which ends the life of ordinary uploads. */
static int sources_set(struct attribution *a, uint32_t first, uint32_t n, const uint32_t *sources,
                       uint32_t each, struct error *error) {
    uint64_t bytes = 4 * (uint64_t)n * each;
    if (!a->lists || gpu_buffer_size(a->lists) < bytes) {
        gpu_buffer_destroy(a->lists);
        a->lists = NULL;
        RUN(gpu_buffer_create(&a->lists, a->work->model->ops.device, bytes, GPU_UPLOAD,
                              "tokens of samples", error));
    }
    memcpy(gpu_buffer_map(a->lists), sources, bytes);
    a->sources = run_address(a->lists);
    a->batch_first = first;
    a->batch_n = n;
    a->n_sources = each;
    return 0;
}

int attribution_forward(struct attribution *a, struct run_cache *cache,
                        const struct run_batch *batch, uint32_t first, uint32_t n,
                        const uint32_t *pairs, const struct attribution_picks *picks,
                        struct error *error) {
    const struct run_hook hook = {.context = a, .call = hook_call};
    RUN(sample_tokens_check(a, batch, first, n, pairs, 2, 0, error));
    /* the device may still read the list of the batch before */
    RUN(gpu_queue_wait(a->work->model->ops.queue, error));
    RUN(sources_set(a, first, n, pairs, 2, error));
    a->collecting = 1;
    a->work->hook = &hook;
    int failed = run_one_chunk(a->work, cache, batch, error) ||
                 attribution_picks_read(a, picks, error);
    run_one_chunk_end(a->work, failed);
    a->work->hook = NULL;
    return failed ? -1 : 0;
}

int attribution_step(struct attribution *a, struct run_cache *cache, const struct run_batch *batch,
                     const struct run_metric *metric, uint32_t first, uint32_t n,
                     const uint32_t *sources, uint32_t n_sources, uint32_t first_step,
                     struct error *error) {
    const struct run_hook hook = {.context = a, .call = hook_call};
    const struct run_backward backward = {.metric = metric, .stop_layer = a->first_layer};
    RUN(sample_tokens_check(a, batch, first, n, sources, n_sources, 1, error));
    if (n_sources == 0 || first_step > a->n_steps || n_sources > a->n_steps - first_step)
        return error_set(error, ERROR_VALUE, "steps %u to %u of %u", first_step,
                         first_step + n_sources, a->n_steps);
    RUN(gpu_queue_wait(a->work->model->ops.queue, error));
    RUN(sources_set(a, first, n, sources, n_sources, error));
    a->first_step = first_step;
    a->collecting = 2;
    a->work->hook = &hook;
    int failed = run_differentiate(a->work, a->tape, cache, batch, &backward, error);
    a->work->hook = NULL;
    return failed;
}
