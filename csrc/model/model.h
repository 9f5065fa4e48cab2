/* A model on a device: facts (architecture as data) and weights. Knows no file
 * format and runs nothing. */
#ifndef VKSTEER_MODEL_H
#define VKSTEER_MODEL_H

#include "ops/ops.h"

#define MODEL_LAYERS_MAX 512
#define MODEL_ROPES_MAX 2

struct model_facts {
    uint32_t n_layers, d_model, n_heads, n_kv_heads, d_head, d_mlp, d_vocab, n_ctx;
    float norm_eps;
    float norm_offset; /* added to every stored gain: 1 where the file holds w of (1 + w) */
    uint32_t act;      /* ACT_* */
    float embed_scale, attn_scale, attn_softcap, final_softcap; /* soft caps: 0 = none */
    int post_norms, qk_norm, qkv_bias, o_bias, mlp_bias, tied;
    uint32_t weight_type;              /* WEIGHT_*: how matrices lie on the device */
    uint32_t window[MODEL_LAYERS_MAX]; /* 0: full */
    uint32_t rope_table[MODEL_LAYERS_MAX];
    uint32_t n_ropes;
};

struct model_layer {
    struct op_matrix qkv;                   /* [(H + 2G) dh, D]: rows q, k, v */
    struct op_matrix o;                     /* [D, H dh] */
    struct op_matrix gate_up;               /* [2F, D]: gate, then up */
    struct op_matrix down;                  /* [D, F] */
    uint64_t ln1, ln2, ln1_post, ln2_post;  /* [D], offset already added */
    uint64_t q_norm, k_norm;                /* [dh] */
    uint64_t b_qkv, b_o, b_gate_up, b_down; /* biases, 0 if absent */
};

struct model_block; /* device memory that weights are cut from */

struct model {
    struct model_facts facts;
    struct ops ops;
    struct op_matrix embed, unembed; /* [V, D]; a tied unembedding is a copy of the handle */
    uint64_t ln_final;
    struct model_layer *layers;
    double *inv_freq[MODEL_ROPES_MAX]; /* [dh / 2] */
    double rope_factor[MODEL_ROPES_MAX];
    struct gpu_buffer *angles[MODEL_ROPES_MAX]; /* [n_angles, dh / 2, (cos, sin)] float32 */
    uint32_t n_angles;
    struct model_block *blocks;
    struct gpu_buffer *staging[2];
    int next_staging;
    uint64_t weight_bytes;
};

/* Checks every fact; takes ownership of nothing in `facts`, copies inv_freq. The
 * device stays the caller's. */
int model_create(struct model **out, struct gpu_device *device, const struct model_facts *facts,
                 const double *const *inv_freq, const double *rope_factor, struct error *error);
void model_destroy(struct model *model);

/* Bytes of device memory that all weights will take, from the facts alone. */
uint64_t model_weight_bytes(const struct model_facts *facts);

/* Rows of a matrix as they lie in a file: `rows` x `columns`, row-major, element type WEIGHT_*.
 * Borrowed during the call. */
struct weight_source {
    const void *data;
    uint32_t type, rows, columns;
};
/* name: "embed", "unembed", "qkv", "o", "gate_up", "down"; the sources are stacked along rows and
 * must give exactly its shape. */
int model_matrix_load(struct model *model, const char *name, int layer,
                      const struct weight_source *sources, int n_sources, struct error *error);
/* name: "ln_final", "ln1", ..., "q_norm", "b_qkv", ...: a vector, sources stacked;
 * gains get the offset. */
int model_vector_load(struct model *model, const char *name, int layer,
                      const struct weight_source *sources, int n_sources, struct error *error);
/* Everything there? Frees the staging memory. */
int model_load_finish(struct model *model, struct error *error);
struct op_matrix *model_matrix_find(struct model *model, const char *name, int layer, uint32_t *n,
                                    uint32_t *k);
uint64_t *model_vector_find(struct model *model, const char *name, int layer, uint32_t *n);

/* Rotation tables for positions below `n`. */
int model_angles_prepare(struct model *model, uint32_t n, struct error *error);

#endif
