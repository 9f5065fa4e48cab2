/* Making a model: facts checked, names resolved to weights, rotation tables. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/model.h"
#include "model/blocks.h"

static int facts_check(const struct model_facts *f, struct error *error) {
    const struct { const char *name; uint64_t value, low, high; } sizes[] = {
        {"n_layers", f->n_layers, 1, MODEL_LAYERS_MAX}, {"d_model", f->d_model, 1, 65536}, {"n_heads", f->n_heads, 1, 1024},
        {"n_kv_heads", f->n_kv_heads, 1, 1024}, {"d_head", f->d_head, 2, 1024}, {"d_mlp", f->d_mlp, 1, 1u << 20},
        {"d_vocab", f->d_vocab, 2, 1u << 22}, {"n_ctx", f->n_ctx, 1, 1u << 24}, {"weight_type", f->weight_type, 0, 2}, {"act", f->act, 0, 2},
        {"n_ropes", f->n_ropes, 1, MODEL_ROPES_MAX}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].value < sizes[i].low || sizes[i].value > sizes[i].high)
            return error_set(error, ERROR_MODEL, "%s = %llu is outside %llu to %llu", sizes[i].name, (unsigned long long)sizes[i].value,
                             (unsigned long long)sizes[i].low, (unsigned long long)sizes[i].high);
    if (f->n_heads % f->n_kv_heads)
        return error_set(error, ERROR_MODEL, "%u query heads do not divide among %u key/value heads", f->n_heads, f->n_kv_heads);
    if (f->d_head % 2)
        return error_set(error, ERROR_MODEL, "d_head = %u is odd: rotation needs pairs", f->d_head);
    if ((uint64_t)f->n_heads * f->d_head > 1u << 20)
        return error_set(error, ERROR_MODEL, "%u heads of size %u are too wide", f->n_heads, f->d_head);
    for (uint32_t l = 0; l < f->n_layers; l++)
        if (f->rope_table[l] >= f->n_ropes)
            return error_set(error, ERROR_MODEL, "layer %u uses rotation table %u of %u", l, f->rope_table[l], f->n_ropes);
    const float numbers[] = {f->norm_eps, f->norm_offset, f->embed_scale, f->attn_scale, f->attn_softcap, f->final_softcap};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (!isfinite(numbers[i]))
            return error_set(error, ERROR_MODEL, "a number of the configuration is not finite");
    return 0;
}

int model_create(struct model **out, struct gpu_device *device, const struct model_facts *facts, const double *const *inv_freq,
                 const double *rope_factor, struct error *error) {
    *out = NULL;
    if (facts_check(facts, error))
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
    for (uint32_t i = 0; i < facts->n_ropes; i++) {
        model->inv_freq[i] = malloc(facts->d_head / 2 * sizeof(double));
        if (!model->inv_freq[i]) {
            error_set(error, ERROR_MEMORY, "out of memory for rotation frequencies");
            goto fail;
        }
        memcpy(model->inv_freq[i], inv_freq[i], facts->d_head / 2 * sizeof(double));
        model->rope_factor[i] = rope_factor[i];
    }
    if (ops_create(&model->ops, device, error) || model_blocks_reserve(model, model_weight_bytes(facts), error))
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
    ops_destroy(&model->ops); /* waits for the device: nothing below is in use any more */
    model_blocks_destroy(model);
    for (int i = 0; i < MODEL_ROPES_MAX; i++) {
        gpu_buffer_destroy(model->angles[i]);
        free(model->inv_freq[i]);
    }
    free(model->layers);
    free(model);
}

struct op_matrix *model_matrix_find(struct model *model, const char *name, int layer, uint32_t *n, uint32_t *k) {
    const struct model_facts *f = &model->facts;
    uint32_t heads = f->n_heads * f->d_head, kv = f->n_kv_heads * f->d_head;
    if (strcmp(name, "embed") == 0 || strcmp(name, "unembed") == 0) {
        *n = f->d_vocab;
        *k = f->d_model;
        return name[0] == 'e' ? &model->embed : &model->unembed;
    }
    if (layer < 0 || (uint32_t)layer >= f->n_layers)
        return NULL;
    struct model_layer *l = &model->layers[layer];
    const struct { const char *name; struct op_matrix *matrix; uint32_t n, k; } table[] = {
        {"qkv", &l->qkv, heads + 2 * kv, f->d_model}, {"o", &l->o, f->d_model, heads}, {"gate_up", &l->gate_up, 2 * f->d_mlp, f->d_model},
        {"down", &l->down, f->d_model, f->d_mlp}};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcmp(table[i].name, name) == 0) {
            *n = table[i].n;
            *k = table[i].k;
            return table[i].matrix;
        }
    return NULL;
}

uint64_t *model_vector_find(struct model *model, const char *name, int layer, uint32_t *n) {
    const struct model_facts *f = &model->facts;
    uint32_t heads = f->n_heads * f->d_head, kv = f->n_kv_heads * f->d_head;
    *n = f->d_model;
    if (strcmp(name, "ln_final") == 0)
        return &model->ln_final;
    if (layer < 0 || (uint32_t)layer >= f->n_layers)
        return NULL;
    struct model_layer *l = &model->layers[layer];
    const struct { const char *name; uint64_t *vector; uint32_t n; } table[] = {
        {"ln1", &l->ln1, f->d_model}, {"ln2", &l->ln2, f->d_model}, {"ln1_post", &l->ln1_post, f->d_model}, {"ln2_post", &l->ln2_post, f->d_model},
        {"q_norm", &l->q_norm, f->d_head}, {"k_norm", &l->k_norm, f->d_head}, {"b_qkv", &l->b_qkv, heads + 2 * kv}, {"b_o", &l->b_o, f->d_model},
        {"b_gate_up", &l->b_gate_up, 2 * f->d_mlp}, {"b_down", &l->b_down, f->d_model}};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcmp(table[i].name, name) == 0) {
            *n = table[i].n;
            return table[i].vector;
        }
    return NULL;
}

int model_load_finish(struct model *model, struct error *error) {
    static const char *const matrices[] = {"qkv", "o", "gate_up", "down"};
    const struct model_facts *f = &model->facts;
    uint32_t n, k;
    if (model->embed.n_chunks == 0 || !model->ln_final)
        return error_set(error, ERROR_MODEL, "the embedding or the final norm was not loaded");
    if (f->tied)
        model->unembed = model->embed;
    if (model->unembed.n_chunks == 0)
        return error_set(error, ERROR_MODEL, "the unembedding was not loaded");
    for (uint32_t l = 0; l < f->n_layers; l++) {
        const struct model_layer *layer = &model->layers[l];
        for (int i = 0; i < 4; i++)
            if (model_matrix_find(model, matrices[i], (int)l, &n, &k)->n_chunks == 0)
                return error_set(error, ERROR_MODEL, "layer %u: %s was not loaded", l, matrices[i]);
        if (!layer->ln1 || !layer->ln2 || (f->post_norms && (!layer->ln1_post || !layer->ln2_post)) ||
            (f->qk_norm && (!layer->q_norm || !layer->k_norm)) || (f->qkv_bias && !layer->b_qkv) || (f->o_bias && !layer->b_o) ||
            (f->mlp_bias && (!layer->b_gate_up || !layer->b_down)))
            return error_set(error, ERROR_MODEL, "layer %u: a norm or a bias was not loaded", l);
    }
    return model_blocks_finish(model, error);
}

int model_angles_prepare(struct model *model, uint32_t n, struct error *error) {
    if (n <= model->n_angles)
        return 0;
    n = (n + 255) / 256 * 256; /* grown in steps, so that decoding does not rebuild it at every token */
    uint32_t half = model->facts.d_head / 2;
    for (uint32_t i = 0; i < model->facts.n_ropes; i++) {
        uint64_t bytes = (uint64_t)n * half * 8;
        struct gpu_buffer *upload = NULL, *table = NULL;
        if (gpu_buffer_create(&upload, model->ops.device, bytes, GPU_UPLOAD, "rotation upload", error) ||
            gpu_buffer_create(&table, model->ops.device, bytes, GPU_DEVICE_LOCAL, "rotation table", error))
            goto fail;
        float *out = gpu_buffer_map(upload);
        for (uint32_t pos = 0; pos < n; pos++)
            for (uint32_t j = 0; j < half; j++) {
                double angle = pos * model->inv_freq[i][j];
                *out++ = (float)(cos(angle) * model->rope_factor[i]);
                *out++ = (float)(sin(angle) * model->rope_factor[i]);
            }
        if (gpu_stream_copy(model->ops.stream, upload, 0, table, 0, bytes, error) || gpu_stream_wait(model->ops.stream, error))
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
