/* Buffers of a run, uploads, and readback into the caller's arrays. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "run/work.h"

static int buffer_zeroed(struct run_work *work, struct gpu_buffer **out, uint64_t bytes,
                         const char *name, struct error *error) {
    if (gpu_buffer_create(out, work->model->ops.device, bytes, GPU_DEVICE_LOCAL, name, error))
        return -1;
    return gpu_queue_zero(work->model->ops.queue, *out, 0, gpu_buffer_size(*out), error);
}

int run_work_create(struct run_work **out, struct model *model, uint32_t capacity,
                    uint64_t readback, struct error *error) {
    const struct model_facts *f = &model->facts;
    uint32_t heads = f->n_heads * f->d_head, kv = f->n_kv_heads * f->d_head;
    *out = NULL;
    struct run_work *work = calloc(1, sizeof *work);
    if (!work)
        return error_set(error, ERROR_MEMORY, "out of memory for a run");
    work->model = model;
    work->capacity = capacity;
    work->scratch = run_sizes_of(model).scratch;
    work->readback_bytes = readback;
    work->d_stride = op_row_stride(f->d_model);
    work->qkv_stride = op_row_stride(heads + 2 * kv);
    work->z_stride = op_row_stride(heads);
    work->gate_up_stride = op_row_stride(work_gate_up_width(f));
    work->mlp_stride = op_row_stride(f->d_mlp);
    work->chunk.places = malloc(capacity * sizeof *work->chunk.places);
    work->chunk.tile_list = malloc(capacity * sizeof *work->chunk.tile_list);
    work->chunk.last_tokens = malloc(capacity * sizeof *work->chunk.last_tokens);
    if (!work->chunk.places || !work->chunk.tile_list || !work->chunk.last_tokens) {
        error_set(error, ERROR_MEMORY, "out of memory for a run");
        goto fail;
    }
    const struct {
        struct gpu_buffer **buffer;
        uint32_t stride;
        const char *name;
    } sized[] = {{&work->x, work->d_stride, "residual stream"},
                 {&work->norm, work->d_stride, "normed input"},
                 {&work->normalized, work->d_stride, "normalized"},
                 {&work->out, work->d_stride, "sublayer output"},
                 {&work->scale, 1, "norm scale"},
                 {&work->qkv, work->qkv_stride, "q, k, v"},
                 {&work->z, work->z_stride, "z"},
                 {&work->gate_up, work->gate_up_stride, "gate and up"},
                 {&work->post, work->mlp_stride, "mlp post"},
                 {&work->parallel_mid, work->d_stride, "residual stream after attention"}};
    for (size_t i = 0; i < sizeof sized / sizeof sized[0] - !f->parallel; i++)
        if (buffer_zeroed(work, sized[i].buffer, (uint64_t)capacity * sized[i].stride * 4,
                          sized[i].name, error))
            goto fail;
    if (gpu_buffer_create(&work->readback, model->ops.device, readback, GPU_READBACK, "readback",
                          error) ||
        ops_split_expect(&model->ops, run_split_bytes(f, capacity, 0), error))
        goto fail;
    *out = work;
    return 0;
fail:
    run_work_destroy(work);
    return -1;
}

uint64_t run_address(const struct gpu_buffer *buffer) {
    return buffer ? gpu_buffer_address(buffer) : 0;
}

int run_hook_call(struct run_work *work, enum run_hook_point point, int layer, uint64_t address,
                  uint32_t stride, struct error *error) {
    const struct run_hook *hook = work->hook;
    return hook ? hook->call(hook->context, work, point, layer, address, stride, error) : 0;
}

static void uploads_destroy(struct upload_buffer *upload) {
    while (upload) {
        struct upload_buffer *next = upload->next;
        gpu_buffer_destroy(upload->buffer);
        free(upload);
        upload = next;
    }
}

void run_work_destroy(struct run_work *work) {
    if (!work)
        return;
    if (work->model)
        gpu_queue_wait(work->model->ops.queue, NULL);
    struct gpu_buffer *buffers[] = {
        work->x,      work->norm,       work->normalized,    work->out,      work->scale,
        work->qkv,    work->z,          work->gate_up,       work->post,     work->scores,
        work->result, work->expanded,   work->unembed_norms, work->readback, work->parallel_mid,
        work->block,  work->picked_from};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        gpu_buffer_destroy(buffers[i]);
    uploads_destroy(work->uploads);
    free(work->pending);
    free(work->chunk.places);
    free(work->chunk.tile_list);
    free(work->chunk.last_tokens);
    free(work);
}

int work_grow(struct run_work *work, struct gpu_buffer **buffer, uint64_t bytes, const char *name,
              struct error *error) {
    if (*buffer && gpu_buffer_size(*buffer) >= bytes)
        return 0;
    if (*buffer && gpu_queue_wait(work->model->ops.queue, error))
        return -1;
    gpu_buffer_destroy(*buffer);
    *buffer = NULL;
    return buffer_zeroed(work, buffer, bytes, name, error);
}

int work_upload(struct run_work *work, const void *data, uint64_t bytes, uint64_t *address,
                struct error *error) {
    struct upload_buffer *upload = work->uploads;
    if (!upload || upload->used + bytes > gpu_buffer_size(upload->buffer)) {
        upload = calloc(1, sizeof *upload);
        if (!upload)
            return error_set(error, ERROR_MEMORY, "out of memory for uploads");
        if (gpu_buffer_create(&upload->buffer, work->model->ops.device,
                              bytes > WORK_UPLOAD_BYTES ? bytes : WORK_UPLOAD_BYTES, GPU_UPLOAD,
                              "uploads", error)) {
            free(upload);
            return -1;
        }
        upload->next = work->uploads;
        work->uploads = upload;
    }
    memcpy((char *)gpu_buffer_map(upload->buffer) + upload->used, data, bytes);
    *address = gpu_buffer_address(upload->buffer) + upload->used;
    upload->used += (bytes + 63) & ~UINT64_C(63);
    return 0;
}

int work_upload_reset(struct run_work *work, struct error *error) {
    struct upload_buffer *upload = work->uploads;
    if (!upload || (!upload->next && upload->used < gpu_buffer_size(upload->buffer) / 2))
        return 0; /* what may be in use stays; there is space behind it */
    if (gpu_queue_wait(work->model->ops.queue, error))
        return -1;
    uploads_destroy(upload->next);
    upload->next = NULL;
    upload->used = 0;
    return 0;
}

int work_readback_take(struct run_work *work, uint32_t *n, uint32_t token_floats, uint64_t *offset,
                       struct error *error) {
    uint64_t capacity = work->readback_bytes / 4,
             room = (capacity - work->readback_used) / token_floats;
    if (room < *n && work->readback_used) {
        if (work_readback_drain(work, error))
            return -1;
        room = capacity / token_floats;
    }
    if (room == 0)
        return error_set(error, ERROR_DEVICE,
                         "one token of a capture takes %.1f MB, more than the readback memory of "
                         "%.0f MB: capture shorter rows",
                         token_floats * 4e-6, work->readback_bytes / 1e6);
    if (room < *n)
        *n = (uint32_t)room;
    *offset = work->readback_used;
    work->readback_used += ((uint64_t)*n * token_floats + 15) & ~UINT64_C(15);
    return 0;
}

int work_readback_push(struct run_work *work, const struct readback *readback,
                       struct error *error) {
    if (work->n_pending == work->pending_capacity) {
        uint32_t capacity = work->pending_capacity ? 2 * work->pending_capacity : 64;
        struct readback *grown = realloc(work->pending, capacity * sizeof *grown);
        if (!grown)
            return error_set(error, ERROR_MEMORY, "out of memory for captures");
        work->pending = grown;
        work->pending_capacity = capacity;
    }
    work->pending[work->n_pending++] = *readback;
    return 0;
}

int work_readback_floats(struct run_work *work, uint32_t n, float *to, uint64_t *address,
                         struct error *error) {
    uint32_t one = 1;
    uint64_t offset;
    if (work_readback_take(work, &one, n, &offset, error))
        return -1;
    struct readback readback = {
        .to = to,
        .offset = offset,
        .n = 1,
        .token_floats = n,
        .width = n,
        .plain = 1,
    };
    *address = run_address(work->readback) + 4 * offset;
    return work_readback_push(work, &readback, error);
}

/* One token's scores or pattern: [H, keys] into [H, columns, keys] with the row's own padding. */
static void keys_place(const struct run_batch *batch, const struct readback *readback,
                       struct token_place place, const float *from) {
    size_t n_columns = batch->n_columns, n_keys = batch->n_keys;
    uint32_t end = batch->start[place.row] + batch->n_tokens[place.row];
    uint32_t start = readback->window && place.pos + 1 > readback->window
                         ? place.pos + 1 - readback->window
                         : 0;
    for (uint32_t h = 0; h < readback->n_heads; h++, from += readback->head_floats) {
        float *to = readback->to +
                    (((size_t)batch->out_row[place.row] * readback->n_heads + h) * n_columns +
                     (size_t)(batch->column[place.row] + (int32_t)place.pos)) *
                        n_keys +
                    batch->key_column[place.row];
        for (uint32_t j = 0; j < end; j++)
            to[j] = j < start || j > place.pos ? readback->masked : from[j];
    }
}

static void readback_place(const struct run_work *work, const struct readback *readback) {
    const struct chunk *chunk = &work->chunk;
    const struct run_batch *batch = chunk->batch;
    const float *from = (const float *)gpu_buffer_map(work->readback) + readback->offset;
    if (readback->plain) {
        memcpy(readback->to, from, (size_t)readback->n * readback->token_floats * sizeof *from);
        return;
    }
    for (uint32_t t = 0; t < readback->n; t++, from += readback->token_floats) {
        struct token_place place =
            chunk->places[readback->by_row ? chunk->last_tokens[readback->first + t]
                                           : readback->first + t];
        int32_t row = batch->out_row[place.row];
        if (row < 0)
            continue;
        if (readback->over_keys) {
            keys_place(batch, readback, place, from);
            continue;
        }
        size_t width = (size_t)readback->n_heads * readback->width;
        size_t at = readback->by_row ? (size_t)row
                                     : (size_t)row * batch->n_columns +
                                           (size_t)(batch->column[place.row] + (int32_t)place.pos);
        memcpy(readback->to + at * width, from, width * sizeof *from);
    }
}

int work_readback_drain(struct run_work *work, struct error *error) {
    int failed = gpu_queue_wait(work->model->ops.queue, error);
    for (uint32_t i = 0; i < work->n_pending && !failed; i++)
        readback_place(work, &work->pending[i]);
    work->n_pending = 0;
    work->readback_used = 0;
    return failed;
}
