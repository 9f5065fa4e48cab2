/* The table of sites: names, shapes, numbers. */
#ifndef VKSTEER_SITES_H
#define VKSTEER_SITES_H

#include "model/model.h"

enum site {
#define SITE(id, name, kind, needs) SITE_##id,
#include "run/sites.def"
#undef SITE
    SITE_COUNT
};

enum site_kind {
    SITE_KIND_WIDTH,       /* [B, S, D] */
    SITE_KIND_ONE,         /* [B, S, 1] */
    SITE_KIND_QUERY_HEADS, /* [B, S, H, dh] */
    SITE_KIND_KV_HEADS,    /* [B, S, G, dh] */
    SITE_KIND_KEYS,        /* [B, H, S, keys] */
    SITE_KIND_HEADS_WIDTH, /* [B, S, H, D] */
    SITE_KIND_MLP          /* [B, S, F] */
};

/* What a model must have for a site to exist. */
enum site_needs {
    SITE_NEEDS_NOTHING,
    SITE_NEEDS_POSITIONS, /* learned positions */
    SITE_NEEDS_PRE_NORMS,
    SITE_NEEDS_POST_NORMS,
    SITE_NEEDS_ROTATION,   /* in this layer */
    SITE_NEEDS_SEQUENTIAL, /* layers whose MLP reads what attention has written */
    SITE_NEEDS_GATE        /* an MLP with a gate */
};

const char *site_name(int site); /* with "{l}" in sites of a layer */
int site_is_layered(int site);
enum site_kind site_kind(int site);
enum site_needs site_needs(int site);
/* layer: 0 for a site of no layer. */
int site_exists(int site, int layer, const struct model_facts *facts);
/* Floats that one token has at this site (heads x width); 0 for sites over keys. *n_heads and
 * *width: its two axes. */
uint32_t site_shape(int site, const struct model_facts *facts, uint32_t *n_heads, uint32_t *width);

#endif
