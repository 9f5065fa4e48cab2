/* Weight buffers, the device memory that weights are cut from, and the staging buffers that fill
 * them. */
#include <stdlib.h>

#include "model/weight_buffers.h"

struct weight_buffer {
    struct gpu_buffer *buffer;
    uint64_t used, size;
    struct weight_buffer *next;
};

/* Weights begin at multiples of 256 bytes. */
static uint64_t align(uint64_t bytes) { return (bytes + 255) & ~UINT64_C(255); }

uint64_t model_weight_bytes(const struct model_facts *f) {
    uint32_t heads = f->n_heads * f->d_head, kv = f->n_kv_heads * f->d_head;
    uint64_t layer =
        align(op_matrix_bytes(f->weight_type, heads + 2 * kv, f->d_model)) +
        align(op_matrix_bytes(f->weight_type, f->d_model, heads)) +
        align(op_matrix_bytes(f->weight_type, f->d_mlp << (f->gated != 0), f->d_model)) +
        align(op_matrix_bytes(f->weight_type, f->d_model, f->d_mlp)) +
        18 * align(4 * (uint64_t)(f->d_model + heads + 2 * kv + 2 * f->d_mlp)) / 4;
    return f->n_layers * layer +
           (f->tied ? 1 : 2) * align(op_matrix_bytes(f->weight_type, f->d_vocab, f->d_model)) +
           (f->pos_embed ? align(op_matrix_bytes(f->weight_type, f->n_ctx, f->d_model)) : 0) +
           (f->unembed_bias ? align(4 * (uint64_t)f->d_vocab) : 0) + (1u << 20);
}

uint64_t staging_bytes(const struct model *model) {
    uint64_t bytes = model->memory / 64, least = UINT64_C(4) << 20, most = UINT64_C(32) << 20;
    return bytes < least ? least : bytes > most ? most : bytes;
}

int weight_buffers_reserve(struct model *model, uint64_t bytes, struct error *error) {
    uint64_t available = gpu_device_available(model->ops.device);
    if (bytes > available)
        return error_set(error, ERROR_DEVICE,
                         "the weights take %.2f GB on the device and %.2f GB are free on %s: use a "
                         "smaller dtype or model",
                         bytes / 1e9, available / 1e9,
                         gpu_device_get_info(model->ops.device)->name);
    for (int i = 0; i < 2; i++)
        if (gpu_buffer_create(&model->staging[i], model->ops.device, staging_bytes(model),
                              GPU_UPLOAD, "staging", error))
            return -1;
    return 0;
}

void weight_buffers_destroy(struct model *model) {
    for (int i = 0; i < 2; i++)
        gpu_buffer_destroy(model->staging[i]);
    while (model->weight_buffers) {
        struct weight_buffer *next = model->weight_buffers->next;
        gpu_buffer_destroy(model->weight_buffers->buffer);
        free(model->weight_buffers);
        model->weight_buffers = next;
    }
}

int weight_buffers_finish(struct model *model, struct error *error) {
    if (gpu_queue_wait(model->ops.queue, error))
        return -1;
    for (int i = 0; i < 2; i++) {
        gpu_buffer_destroy(model->staging[i]);
        model->staging[i] = NULL;
    }
    return 0;
}

int weight_buffer_cut(struct model *model, uint64_t bytes, struct gpu_buffer **buffer,
                      uint64_t *offset, struct error *error) {
    struct weight_buffer *current = model->weight_buffers;
    bytes = align(bytes);
    while (current && bytes > current->size - current->used)
        current = current->next;
    if (!current) {
        /* A matrix of 8 MiB or more gets a buffer of its own size. Smaller weights share buffers of
         * 64 MiB, the last of which is as large as what is left to load; so little is wasted. */
        uint64_t total = model_weight_bytes(&model->facts), size = UINT64_C(64) << 20,
                 left = model->weight_bytes < total ? total - model->weight_bytes : 0;
        size = left < size ? left : size;
        size = bytes > size || bytes >= UINT64_C(8) << 20 ? bytes : size;
        current = calloc(1, sizeof *current);
        if (!current)
            return error_set(error, ERROR_MEMORY, "out of memory for a weight buffer");
        if (gpu_buffer_create(&current->buffer, model->ops.device, size, GPU_DEVICE_LOCAL,
                              "weights", error)) {
            free(current);
            return -1;
        }
        current->size = size;
        current->next = model->weight_buffers;
        model->weight_buffers = current;
    }
    *buffer = current->buffer;
    *offset = current->used;
    current->used += bytes;
    model->weight_bytes += bytes;
    return 0;
}

int weight_buffer_at(const struct model *model, uint64_t address, struct gpu_buffer **buffer,
                     uint64_t *offset, struct error *error) {
    for (const struct weight_buffer *each = model->weight_buffers; each; each = each->next) {
        *buffer = each->buffer;
        *offset = address - gpu_buffer_address(each->buffer);
        if (*offset < each->size)
            return 0;
    }
    return error_set(error, ERROR_MODEL, "no weights lie at an address");
}

int staging_buffer_next(struct model *model, struct gpu_buffer **out, struct error *error) {
    if (!model->staging[0])
        return error_set(error, ERROR_MODEL,
                         "weights can only be loaded before the model is finished");
    *out = model->staging[model->next_staging];
    model->next_staging ^= 1;
    if (model->next_staging == 1) /* copies from both may be running: wait once for the pair */
        return gpu_queue_wait(model->ops.queue, error);
    return 0;
}
