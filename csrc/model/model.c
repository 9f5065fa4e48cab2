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
    model->memory = gpu_device_available(device);
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
    gpu_buffer_destroy(model->ranges);
    for (int i = 0; i < MODEL_ROPES_MAX / 2; i++) {
        gpu_buffer_destroy(model->angles[i]);
        gpu_buffer_destroy(model->q_angles[i]);
    }
    for (int i = 0; i < MODEL_ROPES_MAX; i++)
        free(model->inv_freq[i]);
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

#define RANGE_BYTES 16 /* from one range to the next */

int model_ranges_measure(struct model *model, struct error *error) {
    uint32_t n = 4 * model->facts.n_layers, n_k;
    static const char *const matrices[] = {"qkv", "o", "gate_up", "down"};
    if (model->ranges || model->facts.weight_type == WEIGHT_F16)
        return 0;
    if (gpu_buffer_create(&model->ranges, model->ops.device, RANGE_BYTES * (n + UINT64_C(1)),
                          GPU_DEVICE_LOCAL, "ranges of weights", error))
        return -1;
    for (uint32_t i = 0; i <= n; i++) {
        struct op_matrix *matrix = i < n ? model_matrix_find(model, matrices[i % 4], (int)(i / 4),
                                                             &n_k, &n_k)
                                         : &model->unembed;
        if (ops_matrix_range(&model->ops, matrix, model->ranges, RANGE_BYTES * (uint64_t)i, error))
            return -1;
        matrix->range = gpu_buffer_address(model->ranges) + RANGE_BYTES * (uint64_t)i;
    }
    return gpu_queue_wait(model->ops.queue, error);
}

/* Fills [n_angles, d_rot / 2, (cos, sin)] of table i. of_queries: with the factor of queries. */
static float *angles_fill(const struct model *model, uint32_t i, uint32_t n_angles, int of_queries,
                          float *out) {
    const struct model_facts *f = &model->facts;
    for (uint32_t pos = 0; pos < n_angles; pos++) {
        double factor = model->rope_factor[i];
        if (of_queries)
            factor *= 1 + f->query_beta * log(1 + floor((double)pos / f->query_length));
        for (uint32_t j = 0; j < f->d_rot / 2; j++) {
            double angle = pos * model->inv_freq[i][j];
            *out++ = (float)(cos(angle) * factor);
            *out++ = (float)(sin(angle) * factor);
        }
    }
    return out;
}

/* Replaces *table by table i for n_angles positions, with the one for long texts behind it. */
static int angles_make(struct model *model, uint32_t i, uint32_t n_angles, int of_queries,
                       struct gpu_buffer **table, struct error *error) {
    const struct model_facts *f = &model->facts;
    int has_long = f->rope_switch > 0;
    uint64_t bytes = (uint64_t)n_angles * f->d_rot * 4 << has_long;
    struct gpu_buffer *upload = NULL, *made = NULL;
    if (gpu_buffer_create(&upload, model->ops.device, bytes, GPU_UPLOAD, "rotation upload",
                          error) ||
        gpu_buffer_create(&made, model->ops.device, bytes, GPU_DEVICE_LOCAL, "rotation table",
                          error))
        goto fail;
    float *out = angles_fill(model, i, n_angles, of_queries, gpu_buffer_map(upload));
    if (has_long)
        angles_fill(model, f->n_ropes + i, n_angles, of_queries, out);
    if (gpu_queue_copy(model->ops.queue, upload, 0, made, 0, bytes, error) ||
        gpu_queue_wait(model->ops.queue, error))
        goto fail;
    gpu_buffer_destroy(upload);
    gpu_buffer_destroy(*table);
    *table = made;
    return 0;
fail:
    gpu_buffer_destroy(upload);
    gpu_buffer_destroy(made);
    return -1;
}

int model_angles_prepare(struct model *model, uint32_t n, struct error *error) {
    const struct model_facts *f = &model->facts;
    if (n <= model->n_angles)
        return 0;
    /* Grown by 256 positions, so that decoding does not rebuild the table at every token. */
    n = (n + 255) / 256 * 256;
    for (uint32_t i = 0; i < f->n_ropes; i++)
        if (angles_make(model, i, n, 0, &model->angles[i], error) ||
            (f->query_beta != 0 && angles_make(model, i, n, 1, &model->q_angles[i], error)))
            return -1;
    model->n_angles = n;
    return 0;
}

uint64_t model_angles(const struct model *model, uint32_t layer, int of_queries) {
    uint32_t i = model->facts.rope_table[layer];
    if (i == MODEL_NO_ROPE)
        return 0;
    return gpu_buffer_address(of_queries && model->q_angles[i] ? model->q_angles[i]
                                                               : model->angles[i]);
}

uint32_t model_angle_row(const struct model *model, uint32_t pos, uint32_t length) {
    uint32_t most = model->facts.rope_switch;
    return pos + (most && length > most ? model->n_angles : 0);
}
