/* Checks facts; finds weights by name, and the kernels that a model needs. */
#include <math.h>
#include <string.h>

#include "model/weight_buffers.h"

static int rotation_check(const struct model_facts *f, struct error *error) {
    if (f->d_head % 2 || f->d_rot % 2)
        return error_set(error, ERROR_MODEL,
                         "d_head = %u or d_rot = %u is odd: rotation needs pairs", f->d_head,
                         f->d_rot);
    for (uint32_t l = 0; l < f->n_layers; l++)
        if (f->rope_table[l] >= f->n_ropes && f->rope_table[l] != MODEL_NO_ROPE)
            return error_set(error, ERROR_MODEL, "layer %u uses rotation table %u of %u", l,
                             f->rope_table[l], f->n_ropes);
    if (f->query_beta != 0 && f->query_length == 0)
        return error_set(error, ERROR_MODEL, "query_length is 0");
    if (f->query_beta != 0 && f->d_rot != f->d_head)
        return error_set(error, ERROR_MODEL,
                         "queries with a factor of their own must be rotated whole, not %u of %u",
                         f->d_rot, f->d_head);
    for (uint32_t l = 0; l < f->n_layers && f->query_beta != 0; l++)
        if (f->rope_table[l] == MODEL_NO_ROPE)
            return error_set(error, ERROR_MODEL,
                             "layer %u rotates nothing, so its queries cannot have a factor of "
                             "their own",
                             l);
    return 0;
}

int model_facts_check(const struct model_facts *f, struct error *error) {
    const struct {
        const char *name;
        uint64_t value, low, high;
    } sizes[] = {{"n_layers", f->n_layers, 1, MODEL_LAYERS_MAX},
                 {"d_model", f->d_model, 1, 65536},
                 {"n_heads", f->n_heads, 1, 1024},
                 {"n_kv_heads", f->n_kv_heads, 1, 1024},
                 {"d_head", f->d_head, 2, 1024},
                 {"d_mlp", f->d_mlp, 1, 1u << 20},
                 {"d_vocab", f->d_vocab, 2, 1u << 22},
                 {"n_ctx", f->n_ctx, 1, 1u << 24},
                 {"weight_type", f->weight_type, 0, 2},
                 {"act", f->act, 0, 4},
                 {"norm", f->norm, 0, NORM_KIND_LAYER},
                 {"qk_norm", f->qk_norm, 0, QK_NORM_LAYER},
                 {"d_rot", f->d_rot, 0, f->d_head},
                 {"n_ropes", f->n_ropes, f->d_rot > 0, MODEL_ROPES_MAX / 2}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].value < sizes[i].low || sizes[i].value > sizes[i].high)
            return error_set(error, ERROR_MODEL, "%s = %llu is outside %llu to %llu", sizes[i].name,
                             (unsigned long long)sizes[i].value, (unsigned long long)sizes[i].low,
                             (unsigned long long)sizes[i].high);
    if (f->n_heads % f->n_kv_heads)
        return error_set(error, ERROR_MODEL,
                         "%u query heads do not divide among %u key/value heads", f->n_heads,
                         f->n_kv_heads);
    if (rotation_check(f, error))
        return -1;
    if ((uint64_t)f->n_heads * f->d_head > 1u << 20)
        return error_set(error, ERROR_MODEL, "%u heads of size %u are too wide", f->n_heads,
                         f->d_head);
    if (f->residual_scale == 0)
        return error_set(error, ERROR_MODEL, "residual_scale is 0: layers would add nothing");
    if (f->unembed_bias && f->logit_scale != 1)
        return error_set(error, ERROR_MODEL, "a bias of logits that have a factor");
    if ((f->post_norms && (f->norm != NORM_KIND_RMS || f->parallel)) ||
        (!f->pre_norms && (f->parallel || !f->post_norms)) ||
        (f->norm_bias && f->norm != NORM_KIND_LAYER) ||
        (f->qk_norm_bias && f->qk_norm != QK_NORM_LAYER))
        return error_set(error, ERROR_MODEL, "norms that no model has together");
    const float numbers[] = {f->norm_eps,     f->norm_offset,   f->embed_scale,    f->attn_scale,
                             f->attn_softcap, f->final_softcap, f->residual_scale, f->logit_scale,
                             f->clip_qkv,     f->query_beta};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (!isfinite(numbers[i]))
            return error_set(error, ERROR_MODEL, "a number of the configuration is not finite");
    return 0;
}

struct op_kernels_needed model_kernels_needed(const struct model_facts *f) {
    return (struct op_kernels_needed){
        .type = f->weight_type,
        .group = f->n_heads / f->n_kv_heads,
        .layer_norm = f->norm == NORM_KIND_LAYER,
        .gated = f->gated,
        .positions = f->pos_embed,
        .pre_norms = f->pre_norms,
        .post_norms = f->post_norms,
    };
}

struct op_matrix *model_matrix_find(struct model *model, const char *name, int layer, uint32_t *n,
                                    uint32_t *k) {
    const struct model_facts *f = &model->facts;
    uint32_t heads = f->n_heads * f->d_head, kv = f->n_kv_heads * f->d_head;
    if (strcmp(name, "embed") == 0 || strcmp(name, "unembed") == 0) {
        *n = f->d_vocab;
        *k = f->d_model;
        return name[0] == 'e' ? &model->embed : &model->unembed;
    }
    if (strcmp(name, "pos_embed") == 0) {
        *n = f->n_ctx;
        *k = f->d_model;
        return &model->pos_embed;
    }
    if (layer < 0 || (uint32_t)layer >= f->n_layers)
        return NULL;
    struct model_layer *l = &model->layers[layer];
    const struct {
        const char *name;
        struct op_matrix *matrix;
        uint32_t n, k;
    } table[] = {{"qkv", &l->qkv, heads + 2 * kv, f->d_model},
                 {"o", &l->o, f->d_model, heads},
                 {"gate_up", &l->gate_up, f->d_mlp << (f->gated != 0), f->d_model},
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
    int one = f->qk_norm == QK_NORM_HEAD;
    *n = f->d_model;
    if (strcmp(name, "ln_final") == 0)
        return &model->ln_final;
    if (strcmp(name, "b_ln_final") == 0)
        return &model->b_ln_final;
    if (strcmp(name, "b_unembed") == 0) {
        *n = f->d_vocab;
        return &model->b_unembed;
    }
    if (layer < 0 || (uint32_t)layer >= f->n_layers)
        return NULL;
    struct model_layer *l = &model->layers[layer];
    const struct {
        const char *name;
        uint64_t *vector;
        uint32_t n;
    } table[] = {{"ln1", &l->ln1, f->d_model},
                 {"ln2", &l->ln2, f->d_model},
                 {"ln1_post", &l->ln1_post, f->d_model},
                 {"ln2_post", &l->ln2_post, f->d_model},
                 {"q_norm", &l->q_norm, one ? f->d_head : heads},
                 {"k_norm", &l->k_norm, one ? f->d_head : kv},
                 {"b_ln1", &l->b_ln1, f->d_model},
                 {"b_ln2", &l->b_ln2, f->d_model},
                 {"b_q_norm", &l->b_q_norm, heads},
                 {"b_k_norm", &l->b_k_norm, kv},
                 {"b_qkv", &l->b_qkv, heads + 2 * kv},
                 {"b_o", &l->b_o, f->d_model},
                 {"b_gate_up", &l->b_gate_up, f->d_mlp << (f->gated != 0)},
                 {"b_down", &l->b_down, f->d_model}};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcmp(table[i].name, name) == 0) {
            *n = table[i].n;
            return table[i].vector;
        }
    return NULL;
}
