/* A tape's memory, and what the forward pass puts on it. */
#include <stdlib.h>

#include "run/tape.h"

/* What a layer keeps; a stride of 0: models of this kind keep nothing there. */
enum { MID, QKV_IN, QKV, GATE_UP, ATTN_RAW, MLP_RAW, INSIDE };

static void inside_strides(const struct model_facts *f, uint32_t strides[INSIDE]) {
    uint32_t d = op_row_stride(f->d_model),
             qkv = op_row_stride((f->n_heads + 2 * f->n_kv_heads) * f->d_head);
    strides[MID] = f->parallel ? 0 : d;
    strides[QKV_IN] = strides[QKV] = qkv;
    strides[GATE_UP] = op_row_stride(work_gate_up_width(f));
    strides[ATTN_RAW] = strides[MLP_RAW] = f->post_norms ? d : 0;
}

static void inside_buffers(struct tape_layer *layer, struct gpu_buffer **buffers[INSIDE]) {
    buffers[MID] = &layer->mid;
    buffers[QKV_IN] = &layer->qkv_in;
    buffers[QKV] = &layer->qkv;
    buffers[GATE_UP] = &layer->gate_up;
    buffers[ATTN_RAW] = &layer->attn_raw;
    buffers[MLP_RAW] = &layer->mlp_raw;
}

uint64_t run_tape_bytes(const struct model_facts *f, uint64_t scratch, uint32_t capacity,
                        uint32_t n_keys, uint32_t first_layer, int keep_inside) {
    uint32_t strides[INSIDE], heads = f->n_heads * f->d_head, kv = f->n_kv_heads * f->d_head,
                              layers = f->n_layers - first_layer;
    uint64_t inside = 0, own = (f->parallel ? 4 : 3) * (uint64_t)op_row_stride(f->d_model) +
                               op_row_stride(heads + 2 * kv) + op_row_stride(heads) +
                               op_row_stride(work_gate_up_width(f)) + op_row_stride(f->d_mlp);
    inside_strides(f, strides);
    for (int i = 0; i < INSIDE; i++)
        inside += strides[i];
    return 4 * (uint64_t)capacity *
               (layers * (uint64_t)op_row_stride(f->d_model) + inside * (keep_inside ? layers : 1) +
                own) +
           (f->attn_softcap != 0 ? 2 : 1) * run_scratch_bytes(f, scratch, capacity, n_keys);
}

static int zeroed(const struct run_work *work, uint32_t capacity, struct gpu_buffer **out,
                  uint32_t stride, const char *name, struct error *error) {
    if (gpu_buffer_create(out, work->model->ops.device, 4 * (uint64_t)capacity * stride,
                          GPU_DEVICE_LOCAL, name, error))
        return -1;
    return gpu_queue_zero(work->model->ops.queue, *out, 0, gpu_buffer_size(*out), error);
}

static int inside_make(const struct run_work *work, uint32_t capacity, struct tape_layer *layer,
                       struct error *error) {
    uint32_t strides[INSIDE];
    struct gpu_buffer **buffers[INSIDE];
    inside_strides(&work->model->facts, strides);
    inside_buffers(layer, buffers);
    for (int i = 0; i < INSIDE; i++)
        if (strides[i] && zeroed(work, capacity, buffers[i], strides[i], "tape", error))
            return -1;
    return 0;
}

int run_tape_create(struct run_tape **out, const struct run_work *work, uint32_t capacity,
                    uint32_t first_layer, int keep_inside, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    const struct op_kernels_needed needed = model_kernels_needed(f);
    *out = NULL;
    /* the backward kernels are compiled at first use, in parallel */
    struct ops *ops = &work->model->ops;
    if (ops_backward_prepare(ops, &needed, error) ||
        ops_split_expect(ops, run_split_bytes(f, capacity, 1), error))
        return -1;
    struct run_tape *tape = calloc(1, sizeof *tape);
    if (tape)
        tape->layers = calloc(f->n_layers, sizeof *tape->layers);
    if (!tape || !tape->layers) {
        error_set(error, ERROR_MEMORY, "out of memory for a tape");
        goto fail;
    }
    tape->capacity = capacity;
    tape->first_layer = first_layer;
    tape->n_layers = f->n_layers;
    tape->keep_inside = keep_inside;
    for (uint32_t l = f->n_layers; l-- > first_layer;) {
        if (zeroed(work, capacity, &tape->layers[l].x, work->d_stride, "tape", error))
            goto fail;
        if (l + 1 < f->n_layers && !keep_inside) {
            struct gpu_buffer *x = tape->layers[l].x;
            tape->layers[l] = tape->layers[l + 1];
            tape->layers[l].x = x;
        } else if (inside_make(work, capacity, &tape->layers[l], error)) {
            goto fail;
        }
    }
    const struct {
        struct gpu_buffer **buffer;
        uint32_t stride;
    } own[] = {{&tape->dx, work->d_stride},      {&tape->dnorm, work->d_stride},
               {&tape->draw, work->d_stride},    {&tape->dqkv, work->qkv_stride},
               {&tape->dz, work->z_stride},      {&tape->dgate_up, work->gate_up_stride},
               {&tape->dpost, work->mlp_stride}, {&tape->parallel_dx_pre, work->d_stride}};
    for (size_t i = 0; i < sizeof own / sizeof own[0] - !f->parallel; i++)
        if (zeroed(work, capacity, own[i].buffer, own[i].stride, "backward pass", error))
            goto fail;
    *out = tape;
    return 0;
fail:
    gpu_queue_abandon(work->model->ops.queue);
    run_tape_destroy(tape);
    return -1;
}

void run_tape_destroy(struct run_tape *tape) {
    if (!tape)
        return;
    for (uint32_t l = 0; tape->layers && l < tape->n_layers; l++) {
        struct tape_layer *layer = &tape->layers[l];
        gpu_buffer_destroy(layer->x);
        if (!tape->keep_inside && l + 1 < tape->n_layers)
            continue; /* these buffers are the last layer's */
        struct gpu_buffer **inside[INSIDE];
        inside_buffers(layer, inside);
        for (int i = 0; i < INSIDE; i++)
            gpu_buffer_destroy(*inside[i]);
    }
    struct gpu_buffer *own[] = {tape->dx,
                                tape->dnorm,
                                tape->draw,
                                tape->dqkv,
                                tape->dz,
                                tape->dgate_up,
                                tape->dpost,
                                tape->dscores,
                                tape->capped,
                                tape->metric,
                                tape->logits,
                                tape->reference,
                                tape->parallel_dx_pre,
                                tape->dots};
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
        gpu_buffer_destroy(own[i]);
    for (uint32_t i = 0; i < tape->n_kept; i++)
        gpu_buffer_destroy(tape->kept[i].value);
    free(tape->kept);
    free(tape->layers);
    free(tape);
}

static int keep(struct run_work *work, uint64_t from, struct gpu_buffer *to, uint32_t width,
                uint32_t stride, struct error *error) {
    struct copy_params copy = {
        .x = from,
        .dst = gpu_buffer_address(to),
        .n_rows = work->chunk.n_tokens,
        .width = width,
        .x_stride = stride,
        .out_stride = stride,
    };
    return op_copy(&work->model->ops, &copy, error);
}

static const struct tape_layer *taped(const struct run_work *work, int layer) {
    return work->tape && layer >= (int)work->tape->first_layer ? &work->tape->layers[layer] : NULL;
}

int tape_layer_begin(struct run_work *work, int l, struct error *error) {
    const struct tape_layer *layer = taped(work, l);
    work->at_qkv = run_address(layer ? layer->qkv : work->qkv);
    work->at_gate_up = run_address(layer ? layer->gate_up : work->gate_up);
    work->at_out = run_address(layer && layer->attn_raw ? layer->attn_raw : work->out);
    return layer ? keep(work, run_address(work->x), layer->x, work->model->facts.d_model,
                        work->d_stride, error)
                 : 0;
}

int tape_layer_middle(struct run_work *work, int l, struct error *error) {
    const struct tape_layer *layer = taped(work, l);
    if (!layer)
        return 0;
    if (layer->mlp_raw)
        work->at_out = run_address(layer->mlp_raw);
    return layer->mid ? keep(work, run_address(work->x), layer->mid, work->model->facts.d_model,
                             work->d_stride, error)
                      : 0;
}

int tape_keep_qkv(struct run_work *work, int l, struct error *error) {
    const struct tape_layer *layer = taped(work, l);
    const struct model_facts *f = &work->model->facts;
    return layer ? keep(work, work->at_qkv, layer->qkv_in,
                        (f->n_heads + 2 * f->n_kv_heads) * f->d_head, work->qkv_stride, error)
                 : 0;
}

const struct run_scaling *tape_scaling(const struct run_work *work, int site, int layer) {
    const struct run_backward *backward = work->tape ? work->tape->backward : NULL;
    for (uint32_t i = 0; backward && i < backward->n_scalings; i++)
        if (backward->scalings[i].site == site && backward->scalings[i].layer == layer)
            return &backward->scalings[i];
    return NULL;
}

static struct tape_kept *kept_find(const struct run_tape *tape, int site, int layer,
                                   uint32_t group) {
    for (uint32_t i = 0; i < tape->n_kept; i++) {
        struct tape_kept *kept = &tape->kept[i];
        if (kept->site == site && kept->layer == layer && kept->group == group)
            return kept;
    }
    return NULL;
}

uint64_t tape_kept_value(const struct run_tape *tape, int site, int layer, uint32_t group) {
    const struct tape_kept *kept = kept_find(tape, site, layer, group);
    return kept ? run_address(kept->value) : 0;
}

int tape_keep_value(struct run_work *work, const struct site_view *view, uint32_t group,
                    struct error *error) {
    struct run_tape *tape = work->tape;
    struct tape_kept *kept = kept_find(tape, view->site, view->layer, group);
    if (!kept) {
        struct tape_kept *more = realloc(tape->kept, (tape->n_kept + 1) * sizeof *more);
        if (!more)
            return error_set(error, ERROR_MEMORY, "out of memory for a tape");
        tape->kept = more;
        kept = &more[tape->n_kept];
        *kept = (struct tape_kept){view->site, view->layer, group, NULL};
        int failed = zeroed(work, tape->capacity, &kept->value, work->d_stride, "kept values",
                            error);
        tape->n_kept += kept->value != NULL; /* a failure may come after it is made */
        if (failed)
            return -1;
    }
    return keep(work, view->address, kept->value, view->width, view->token_stride, error);
}
