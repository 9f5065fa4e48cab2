/* Creates models, completes their loading, and computes rotation tables. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/weight_buffers.h"

/* Rotation tables, those for long texts included. */
static uint32_t model_tables(const struct model_facts *f) {
    return f->n_ropes << (f->rope_switch > 0);
}

int model_create(struct model **out, struct gpu_device *device, const struct model_facts *facts,
                 const double *const *inv_freq, const double *rope_factor, struct error *error) {
    *out = NULL;
    if (model_facts_check(facts, error))
        return -1;
    struct model *model = calloc(1, sizeof *model);
    if (!model)
        return error_set(error, ERROR_MEMORY, "out of memory for a model");
    model->facts = *facts;
    model->layers = calloc(facts->n_layers, sizeof *model->layers);
    if (!model->layers) {
        error_set(error, ERROR_MEMORY, "out of memory for layers");
        goto fail;
    }
    for (uint32_t i = 0; i < model_tables(facts); i++) {
        model->inv_freq[i] = malloc(facts->d_rot / 2 * sizeof(double));
        if (!model->inv_freq[i]) {
            error_set(error, ERROR_MEMORY, "out of memory for rotation frequencies");
            goto fail;
        }
        memcpy(model->inv_freq[i], inv_freq[i], facts->d_rot / 2 * sizeof(double));
        model->rope_factor[i] = rope_factor[i];
    }
    if (ops_create(&model->ops, device, error) ||
        weight_buffers_reserve(model, model_weight_bytes(facts), error))
        goto fail;
    *out = model;
    return 0;
fail:
    model_destroy(model);
    return -1;
}

void model_destroy(struct model *model) {
    if (!model)
        return;
    ops_destroy(&model->ops); /* waits for the device, so that nothing below is in use */
    weight_buffers_destroy(model);
    for (int i = 0; i < MODEL_ROPES_MAX; i++) {
        gpu_buffer_destroy(model->angles[i]);
        free(model->inv_freq[i]);
    }
    free(model->layers);
    free(model);
}

int model_load_finish(struct model *model, struct error *error) {
    static const char *const matrices[] = {"qkv", "o", "gate_up", "down"};
    const struct model_facts *f = &model->facts;
    uint32_t n, k;
    if (model->embed.n_segments == 0 || !model->ln_final)
        return error_set(error, ERROR_MODEL, "the embedding or the final norm was not loaded");
    if (f->tied)
        model->unembed = model->embed;
    if (model->unembed.n_segments == 0)
        return error_set(error, ERROR_MODEL, "the unembedding was not loaded");
    if ((f->pos_embed && model->pos_embed.n_segments == 0) ||
        (f->norm_bias && !model->b_ln_final) || (f->unembed_bias && !model->b_unembed))
        return error_set(error, ERROR_MODEL,
                         "the table of positions or a bias outside the layers was not loaded");
    for (uint32_t l = 0; l < f->n_layers; l++) {
        const struct model_layer *layer = &model->layers[l];
        for (int i = 0; i < 4; i++)
            if (model_matrix_find(model, matrices[i], (int)l, &n, &k)->n_segments == 0)
                return error_set(error, ERROR_MODEL, "layer %u: %s was not loaded", l, matrices[i]);
        if ((f->pre_norms && (!layer->ln1 || !layer->ln2)) ||
            (f->pre_norms && f->norm_bias && (!layer->b_ln1 || !layer->b_ln2)) ||
            (f->post_norms && (!layer->ln1_post || !layer->ln2_post)) ||
            (f->qk_norm && (!layer->q_norm || !layer->k_norm)) ||
            (f->qk_norm_bias && (!layer->b_q_norm || !layer->b_k_norm)) ||
            (f->qkv_bias && !layer->b_qkv) || (f->o_bias && !layer->b_o) ||
            (f->mlp_bias && (!layer->b_gate_up || !layer->b_down)))
            return error_set(error, ERROR_MODEL, "layer %u: a norm or a bias was not loaded", l);
    }
    return weight_buffers_finish(model, error);
}

int model_angles_prepare(struct model *model, uint32_t n, struct error *error) {
    if (n <= model->n_angles)
        return 0;
    /* Grown by 256 positions, so that decoding does not rebuild the table at every token. */
    n = (n + 255) / 256 * 256;
    uint32_t half = model->facts.d_rot / 2;
    for (uint32_t i = 0; i < model_tables(&model->facts); i++) {
        uint64_t bytes = (uint64_t)n * half * 8;
        struct gpu_buffer *upload = NULL, *table = NULL;
        if (gpu_buffer_create(&upload, model->ops.device, bytes, GPU_UPLOAD, "rotation upload",
                              error) ||
            gpu_buffer_create(&table, model->ops.device, bytes, GPU_DEVICE_LOCAL, "rotation table",
                              error))
            goto fail;
        float *out = gpu_buffer_map(upload);
        for (uint32_t pos = 0; pos < n; pos++)
            for (uint32_t j = 0; j < half; j++) {
                double angle = pos * model->inv_freq[i][j];
                *out++ = (float)(cos(angle) * model->rope_factor[i]);
                *out++ = (float)(sin(angle) * model->rope_factor[i]);
            }
        if (gpu_queue_copy(model->ops.queue, upload, 0, table, 0, bytes, error) ||
            gpu_queue_wait(model->ops.queue, error))
            goto fail;
        gpu_buffer_destroy(upload);
        gpu_buffer_destroy(model->angles[i]);
        model->angles[i] = table;
        continue;
fail:
        gpu_buffer_destroy(upload);
        gpu_buffer_destroy(table);
        return -1;
    }
    model->n_angles = n;
    return 0;
}
