/* Key/value caches: what lies in a slot, copies of slots, and what is added to or read from them.
 */
#include <stdlib.h>
#include <string.h>

#include "run/work.h"

uint64_t run_cache_bytes(const struct model_facts *f, uint32_t n_slots, uint32_t first_layer) {
    return 2 * (uint64_t)(f->n_layers - first_layer) * n_slots * f->n_kv_heads * f->d_head * 4;
}

int run_cache_create(struct run_cache **out, struct model *model, uint32_t n_slots,
                     uint32_t first_layer, struct error *error) {
    const struct model_facts *f = &model->facts;
    *out = NULL;
    if (first_layer >= f->n_layers)
        return error_set(error, ERROR_VALUE, "a cache from layer %u of %u", first_layer,
                         f->n_layers);
    uint64_t needed = run_cache_bytes(f, n_slots, first_layer),
             available = gpu_device_available(model->ops.device);
    if (needed > available)
        return error_set(error, ERROR_DEVICE,
                         "keys and values of %u tokens take %.2f GB and %.2f GB are free on the "
                         "device: at most %llu tokens fit "
                         "(rows x length); use a smaller batch or shorter prompts",
                         n_slots, needed / 1e9, available / 1e9,
                         (unsigned long long)(available / run_cache_bytes(f, 1, first_layer)));
    struct run_cache *cache = calloc(1, sizeof *cache);
    if (!cache)
        return error_set(error, ERROR_MEMORY, "out of memory for a cache");
    cache->device = model->ops.device;
    cache->n_layers = f->n_layers;
    cache->n_slots = n_slots;
    cache->first_layer = first_layer;
    cache->k = calloc(f->n_layers, sizeof *cache->k);
    cache->v = calloc(f->n_layers, sizeof *cache->v);
    cache->state = calloc(n_slots, sizeof *cache->state);
    if (!cache->k || !cache->v || !cache->state) {
        error_set(error, ERROR_MEMORY, "out of memory for a cache");
        goto fail;
    }
    uint64_t each = needed / (f->n_layers - first_layer) / 2;
    for (uint32_t l = first_layer; l < f->n_layers; l++)
        if (gpu_buffer_create(&cache->k[l], cache->device, each, GPU_DEVICE_LOCAL, "keys", error) ||
            gpu_buffer_create(&cache->v[l], cache->device, each, GPU_DEVICE_LOCAL, "values", error))
            goto fail;
    *out = cache;
    return 0;
fail:
    run_cache_destroy(cache);
    return -1;
}

int run_cache_copy(struct run_work *work, struct run_cache *cache, uint32_t from,
                   const uint32_t *to, uint32_t n_to, uint32_t n, uint32_t first_layer,
                   struct error *error) {
    uint64_t slot = 4 * (uint64_t)work->model->facts.n_kv_heads * work->model->facts.d_head;
    for (uint32_t i = 0; i <= n_to; i++) {
        uint32_t first = i < n_to ? to[i] : from;
        if (first > cache->n_slots || n > cache->n_slots - first)
            return error_set(error, ERROR_VALUE, "slots %u to %llu of a cache of %u", first,
                             first + (unsigned long long)n, cache->n_slots);
    }
    for (uint32_t i = 0; i < n_to; i++)
        for (uint32_t l = first_layer > cache->first_layer ? first_layer : cache->first_layer;
             l < cache->n_layers; l++)
            if (gpu_queue_copy(work->model->ops.queue, cache->k[l], from * slot, cache->k[l],
                               to[i] * slot, n * slot, error) ||
                gpu_queue_copy(work->model->ops.queue, cache->v[l], from * slot, cache->v[l],
                               to[i] * slot, n * slot, error)) {
                gpu_queue_abandon(work->model->ops.queue);
                return -1;
            }
    for (uint32_t i = 0; i < n_to; i++)
        for (uint32_t s = 0; s < n; s++) {
            uint8_t kept = first_layer > cache->first_layer ? cache->state[to[i] + s] : 0;
            cache->state[to[i] + s] = cache->state[from + s] | (kept & RUN_CACHE_EDITED);
        }
    return 0;
}

void run_cache_destroy(struct run_cache *cache) {
    if (!cache)
        return;
    for (uint32_t l = 0; l < cache->n_layers; l++) {
        if (cache->k)
            gpu_buffer_destroy(cache->k[l]);
        if (cache->v)
            gpu_buffer_destroy(cache->v[l]);
    }
    free(cache->k);
    free(cache->v);
    free(cache->state);
    free(cache);
}

void run_cache_written(struct run_cache *cache, uint32_t first, uint32_t n, int long_rotated,
                       int all_layers) {
    for (uint32_t s = first; s < first + n; s++)
        cache->state[s] = (long_rotated ? RUN_CACHE_LONG : 0) |
                          (all_layers ? 0 : cache->state[s] & RUN_CACHE_EDITED);
}

static int slots_check(const struct run_cache *cache, const uint32_t *slots, uint32_t n,
                       struct error *error) {
    if (cache->first_layer)
        return error_set(error, ERROR_VALUE, "this cache begins at layer %u: it has no whole slots",
                         cache->first_layer);
    for (uint32_t i = 0; i < n; i++)
        if (slots[i] >= cache->n_slots)
            return error_set(error, ERROR_VALUE, "slot %u of a cache of %u", slots[i],
                             cache->n_slots);
    return 0;
}

/* Marks the slots as edited. A slot that is edited already, or named twice, leaves all as it was.
 */
static int slots_mark(struct run_cache *cache, const uint32_t *slots, uint32_t n,
                      struct error *error) {
    for (uint32_t i = 0; i < n; i++) {
        if (cache->state[slots[i]] & RUN_CACHE_EDITED) {
            for (uint32_t k = 0; k < i; k++)
                cache->state[slots[k]] &= (uint8_t)~RUN_CACHE_EDITED;
            return error_set(error, ERROR_VALUE,
                             "slot %u has been edited already: an edit of the cache is applied "
                             "once, and copies carry it",
                             slots[i]);
        }
        cache->state[slots[i]] |= RUN_CACHE_EDITED;
    }
    return 0;
}

/* Is any of n floats other than zero? */
static int any_set(const float *x, uint64_t n) {
    for (uint64_t i = 0; i < n; i++)
        if (x[i] != 0)
            return 1;
    return 0;
}

/* x[slots[i], :] += addition `which[i]` of this layer's keys or values, where that is not zero */
static int add_rows(struct run_work *work, const struct gpu_buffer *x,
                    const struct run_cache_additions *add, uint32_t part,
                    struct edit_entry *entries, uint64_t operand, uint64_t heads,
                    struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint32_t width = f->n_kv_heads * f->d_head, n = 0;
    uint64_t entries_address;
    for (uint32_t i = 0; i < add->n; i++) {
        uint64_t first = ((uint64_t)add->which[i] * 2 * f->n_layers + part) * width;
        if (any_set(add->values + first, width))
            entries[n++] = (struct edit_entry){
                .token = add->slots[i],
                .operand = (uint32_t)first,
                .coefficient = 1,
            };
    }
    if (n == 0)
        return 0;
    if (work_upload(work, entries, n * sizeof *entries, &entries_address, error))
        return -1;
    struct edit_params params = {
        .x = run_address(x),
        .entries = entries_address,
        .operand = operand,
        .heads = heads,
        .token_stride = width,
        .width = width,
        .step = 1,
        .kind = EDIT_ADD,
    };
    return op_edit(&work->model->ops, &params, n, 1, error);
}

static int add_layers(struct run_work *work, struct run_cache *cache,
                      const struct run_cache_additions *add, struct edit_entry *entries,
                      struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint64_t all = (uint64_t)add->n_values * 2 * f->n_layers * f->n_kv_heads * f->d_head;
    uint64_t operand, heads;
    const uint32_t zero = 0;
    if (work_upload_reset(work, error) ||
        work_upload(work, add->values, 4 * all, &operand, error) ||
        work_upload(work, &zero, sizeof zero, &heads, error))
        return -1;
    for (uint32_t l = 0; l < f->n_layers; l++)
        if (add_rows(work, cache->k[l], add, l, entries, operand, heads, error) ||
            add_rows(work, cache->v[l], add, f->n_layers + l, entries, operand, heads, error))
            return -1;
    return 0;
}

int run_cache_add(struct run_work *work, struct run_cache *cache,
                  const struct run_cache_additions *add, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint64_t each = 2 * (uint64_t)f->n_layers * f->n_kv_heads * f->d_head;
    if (each * add->n_values > UINT32_MAX)
        return error_set(error, ERROR_VALUE,
                         "additions to the cache are too large together: more than 16 GB");
    for (uint32_t i = 0; i < add->n; i++)
        if (add->which[i] >= add->n_values)
            return error_set(error, ERROR_VALUE, "addition %u of %u", add->which[i], add->n_values);
    if (slots_check(cache, add->slots, add->n, error))
        return -1;
    struct edit_entry *entries = malloc((add->n + 1) * sizeof *entries);
    if (!entries)
        return error_set(error, ERROR_MEMORY, "out of memory for edits of the cache");
    int failed = slots_mark(cache, add->slots, add->n, error);
    if (!failed && add_layers(work, cache, add, entries, error)) {
        gpu_queue_abandon(work->model->ops.queue);
        failed = -1;
    }
    free(entries);
    return failed;
}

int run_cache_read(struct run_work *work, const struct run_cache *cache, const uint32_t *slots,
                   uint32_t n, float *to, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint32_t width = f->n_kv_heads * f->d_head;
    uint64_t rows;
    int failed = slots_check(cache, slots, n, error) || work_upload_reset(work, error) ||
                 work_upload(work, slots, n * sizeof *slots, &rows, error);
    work->n_pending = 0;
    work->readback_used = 0;
    for (uint32_t part = 0; !failed && part < 2 * f->n_layers; part++) {
        struct copy_params copy = {
            .x = run_address(part < f->n_layers ? cache->k[part] : cache->v[part - f->n_layers]),
            .rows = rows,
            .n_rows = n,
            .width = width,
            .x_stride = width,
            .out_stride = width,
            .flags = COPY_ROWS,
        };
        failed = work_readback_floats(work, n * width, to + (size_t)part * n * width, &copy.dst,
                                      error) ||
                 op_copy(&work->model->ops, &copy, error);
    }
    if (!failed)
        failed = work_readback_drain(work, error);
    if (failed)
        gpu_queue_abandon(work->model->ops.queue);
    return failed ? -1 : 0;
}
