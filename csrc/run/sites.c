/* The table of sites: sites.def with names and kinds. */
#include <string.h>

#include "run/sites.h"

static const struct {
    const char *name;
    enum site_kind kind;
} table[SITE_COUNT] = {
#define SITE(id, name, kind) [SITE_##id] = {name, SITE_KIND_##kind},
#include "run/sites.def"
#undef SITE
};

const char *site_name(int site) { return table[site].name; }

int site_is_layered(int site) { return strncmp(table[site].name, "blocks.", 7) == 0; }

enum site_kind site_kind(int site) { return table[site].kind; }

int site_exists(int site, const struct model_facts *facts) {
    return facts->post_norms ||
           (table[site].kind != SITE_KIND_POST_ONE && table[site].kind != SITE_KIND_POST_WIDTH);
}

uint32_t site_shape(int site, const struct model_facts *facts, uint32_t *n_heads, uint32_t *width) {
    *n_heads = 1;
    switch (table[site].kind) {
    case SITE_KIND_ONE:
    case SITE_KIND_POST_ONE: *width = 1; break;
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
