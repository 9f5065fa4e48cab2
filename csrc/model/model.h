/* A model on a device: its facts, which describe the architecture as data, and its weights. Reading
 * files and running the model are done elsewhere. */
#ifndef VKSTEER_MODEL_H
#define VKSTEER_MODEL_H

#include "ops/ops.h"

#define MODEL_LAYERS_MAX 512
#define MODEL_ROPES_MAX 4        /* two tables, and two for long texts */
#define MODEL_NO_ROPE UINT32_MAX /* rope_table of a layer that rotates nothing */

struct model_facts {
    uint32_t n_layers, d_model, n_heads, n_kv_heads, d_head, d_mlp, d_vocab, n_ctx;
    float norm_eps;
    float norm_offset; /* added to every stored gain: 1 where the file holds w of (1 + w) */
    uint32_t act;      /* ACT_* */
    float embed_scale, attn_scale, attn_softcap, final_softcap; /* soft caps: 0 = none */
    uint32_t norm;    /* NORM_KIND_* of all norms but those of heads and post-norms */
    uint32_t qk_norm; /* QK_NORM_* */
    int norm_bias;    /* biases beside the gains of ln1, ln2 and ln_final */
    int pre_norms;    /* norms on the inputs of attention and MLP */
    int post_norms;   /* norms on their outputs */
    int parallel;     /* attention and MLP both read the layer's input */
    int gated;        /* MLP: act(gate) * up, else act(up) */
    int pos_embed;    /* learned positions are added to the embeddings */
    int qk_norm_bias, qkv_bias, o_bias, mlp_bias, unembed_bias, tied;
    float residual_scale; /* factor on what attention and MLP add to the residual stream */
    float logit_scale;    /* factor on the logits, before the soft cap */
    float clip_qkv;       /* q, k and v are clamped to +-clip_qkv; 0: not */
    /* rotated queries are multiplied by 1 + beta log(1 + floor(pos / length)); beta 0: not */
    float query_beta;
    uint32_t query_length;
    uint32_t d_rot;                    /* the first d_rot channels of a head are rotated */
    int rope_interleaved;              /* channels (2i, 2i + 1) are a pair */
    uint32_t rope_switch;              /* 0; or longer texts use tables n_ropes + i */
    uint32_t weight_type;              /* WEIGHT_*: element type of the matrices on the device */
    uint32_t window[MODEL_LAYERS_MAX]; /* 0: full */
    uint32_t rope_table[MODEL_LAYERS_MAX]; /* below n_ropes, or MODEL_NO_ROPE */
    uint32_t n_ropes;                      /* tables, without those for long texts */
};

struct model_layer {
    struct op_matrix qkv;                   /* [(H + 2G) dh, D]: rows q, k, v */
    struct op_matrix o;                     /* [D, H dh] */
    struct op_matrix gate_up;               /* [2F, D]: gate, then up; [F, D] without a gate */
    struct op_matrix down;                  /* [D, F] */
    uint64_t ln1, ln2, ln1_post, ln2_post;  /* [D], offset already added */
    uint64_t b_ln1, b_ln2;                  /* [D]; 0 if absent */
    uint64_t q_norm, k_norm;                /* offset already added; 0 if absent */
    uint64_t b_q_norm, b_k_norm;            /* [H * dh], [G * dh]; 0 if absent */
    uint64_t b_qkv, b_o, b_gate_up, b_down; /* biases, 0 if absent */
};

struct weight_buffer; /* a large device buffer that weights are cut from, weight_buffers.c */

struct model {
    struct model_facts facts;
    struct ops ops;
    struct op_matrix embed, unembed; /* [V, D]; a tied unembedding shares the embedding's memory */
    struct op_matrix pos_embed;      /* [n_ctx, D] */
    uint64_t ln_final, b_ln_final;   /* [D], times logit_scale */
    uint64_t b_unembed;              /* [V]; 0 if absent */
    struct model_layer *layers;
    double *inv_freq[MODEL_ROPES_MAX]; /* [d_rot / 2] */
    double rope_factor[MODEL_ROPES_MAX];
    /* [n_angles, d_rot / 2, (cos, sin)] float32 of the n_ropes tables; with a rope_switch, as many
     * rows of the table for long texts follow */
    struct gpu_buffer *angles[MODEL_ROPES_MAX / 2];
    struct gpu_buffer *q_angles[MODEL_ROPES_MAX / 2]; /* of queries; NULL without a query_beta */
    uint32_t n_angles;                                /* positions */
    struct weight_buffer *weight_buffers;             /* list, the current one first */
    struct gpu_buffer *ranges;                        /* of the matrices; NULL: not measured */
    struct gpu_buffer *staging[2];                    /* NULL once loading is finished */
    int next_staging;
    uint64_t weight_bytes; /* cut from the weight buffers so far */
    uint64_t memory;       /* device bytes that were free before the model was made */
};

/* Checks the facts and reserves memory; the weights are loaded afterwards. inv_freq [tables][d_rot
 * / 2] and rope_factor [tables] are copied (tables: n_ropes, twice as many with a rope_switch). The
 * device stays the caller's and must outlive the model. ERROR_MODEL if a fact is out of range,
 * ERROR_DEVICE if the weights do not fit the device.
 */
int model_create(struct model **out, struct gpu_device *device, const struct model_facts *facts,
                 const double *const *inv_freq, const double *rope_factor, struct error *error);
/* Waits for the device and frees the model; NULL is allowed. */
void model_destroy(struct model *model);

/* Which kernels a model with these facts dispatches. */
struct op_kernels_needed model_kernels_needed(const struct model_facts *facts);
/* Device bytes of all weights, computed from the facts alone. */
uint64_t model_weight_bytes(const struct model_facts *facts);

/* A matrix in host memory, row-major [rows, columns], element type WEIGHT_*, without alignment. It
 * is borrowed during the call that it is given to. */
struct weight_source {
    const void *data;
    uint32_t type, rows, columns;
};
/* Packs all rows of a matrix into panels of elements `type` at `out`, op_matrix_bytes of them. */
void weight_panels_pack(const struct weight_source *source, uint32_t type, void *out);
/* Loads a matrix, which may be done once: "embed", "pos_embed" or "unembed" (`layer` is ignored),
 * "qkv", "o", "gate_up" or "down". The sources are stacked along their rows, and their shape
 * together must be the matrix's. ERROR_MODEL for an unknown name, another shape or a second call.
 */
int model_matrix_load(struct model *model, const char *name, int layer,
                      const struct weight_source *sources, int n_sources, struct error *error);
/* Loads a vector: "ln_final", "b_ln_final" or "b_unembed" (`layer` is ignored), "ln1", "ln2",
 * "ln1_post", "ln2_post", "q_norm", "k_norm", or a bias: "b_ln1", "b_ln2", "b_q_norm", "b_k_norm",
 * "b_qkv", "b_o", "b_gate_up" or "b_down". The sources, of one column each, are stacked;
 * norm_offset is added to gains. ERROR_MODEL for an unknown name or another length. */
int model_vector_load(struct model *model, const char *name, int layer,
                      const struct weight_source *sources, int n_sources, struct error *error);
/* Completes loading: ERROR_MODEL if a weight of the architecture is missing, else waits for the
 * copies and frees the staging memory. */
int model_load_finish(struct model *model, struct error *error);
/* Measures the ranges of all matrices, which products on matrix units need; again does nothing. The
 * model is loaded. */
int model_ranges_measure(struct model *model, struct error *error);
/* A matrix by name and layer, loaded or not, with its shape [*n, *k]; borrowed. NULL if there is no
 * such matrix. */
struct op_matrix *model_matrix_find(struct model *model, const char *name, int layer, uint32_t *n,
                                    uint32_t *k);
/* Where the device address of a vector of *n floats is kept (the address is 0 while it is not
 * loaded); borrowed. NULL if there is no such vector. */
uint64_t *model_vector_find(struct model *model, const char *name, int layer, uint32_t *n);

/* Computes the rotation tables for positions below `n`, unless they reach so far already. Waits for
 * the device when they grow. */
int model_angles_prepare(struct model *model, uint32_t n, struct error *error);
/* Device address of a layer's rotation table, or of the one for its queries; 0: the layer rotates
 * nothing. */
uint64_t model_angles(const struct model *model, uint32_t layer, int of_queries);
/* The tables' row for a position of a text of `length` tokens. */
uint32_t model_angle_row(const struct model *model, uint32_t pos, uint32_t length);

#endif
