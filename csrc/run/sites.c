/* The table of sites: sites.def with names, kinds and needs. */
#include <string.h>

#include "run/sites.h"

static const struct {
    const char *name;
    enum site_kind kind;
    enum site_needs needs;
} table[SITE_COUNT] = {
#define SITE(id, name, kind, needs) [SITE_##id] = {name, SITE_KIND_##kind, SITE_NEEDS_##needs},
#include "run/sites.def"
#undef SITE
};

const char *site_name(int site) { return table[site].name; }

int site_is_layered(int site) { return strncmp(table[site].name, "blocks.", 7) == 0; }

enum site_kind site_kind(int site) { return table[site].kind; }

enum site_needs site_needs(int site) { return table[site].needs; }

int site_exists(int site, int layer, const struct model_facts *facts) {
    if (layer < 0 || (uint32_t)layer >= (site_is_layered(site) ? facts->n_layers : 1))
        return 0;
    switch (table[site].needs) {
    case SITE_NEEDS_POSITIONS: return facts->pos_embed;
    case SITE_NEEDS_PRE_NORMS: return facts->pre_norms;
    case SITE_NEEDS_POST_NORMS: return facts->post_norms;
    case SITE_NEEDS_ROTATION: return facts->rope_table[layer] != MODEL_NO_ROPE;
    case SITE_NEEDS_SEQUENTIAL: return !facts->parallel;
    case SITE_NEEDS_GATE: return facts->gated;
    default: return 1;
    }
}

uint32_t site_shape(int site, const struct model_facts *facts, uint32_t *n_heads, uint32_t *width) {
    *n_heads = 1;
    switch (table[site].kind) {
    case SITE_KIND_ONE: *width = 1; break;
    case SITE_KIND_QUERY_HEADS:
        *n_heads = facts->n_heads;
        *width = facts->d_head;
        break;
    case SITE_KIND_KV_HEADS:
        *n_heads = facts->n_kv_heads;
        *width = facts->d_head;
        break;
    case SITE_KIND_KEYS:
        *n_heads = facts->n_heads;
        *width = 0;
        break;
    case SITE_KIND_HEADS_WIDTH:
        *n_heads = facts->n_heads;
        *width = facts->d_model;
        break;
    case SITE_KIND_MLP: *width = facts->d_mlp; break;
    default: *width = facts->d_model;
    }
    return *n_heads * *width;
}
