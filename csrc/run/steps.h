/* Steps that attention, MLP and logits share, forward and backward. Where one fused kernel can
 * compute several steps, the function that would run them (here, in attention.c or in mlp.c)
 * chooses that kernel if no hook, edit, capture or tape needs the values in between; these are then
 * not written to memory. The separate kernels do the same arithmetic in the same order, so the
 * results are bit-identical. */
#ifndef VKSTEER_STEPS_H
#define VKSTEER_STEPS_H

#include "run/tape.h"

/* [T, stride] rows on the device, T the tokens of the chunk. */
struct rows {
    uint64_t address;
    uint32_t stride;
};

/* Where queries, keys and values of a row [q | k | v] begin. */
struct qkv_rows {
    struct rows q, k, v;
};
struct qkv_rows qkv_rows_at(const struct run_work *work, uint64_t address);

/* A norm of the model: its gain [D] (0: the model has no such norm) and bias [D] (0: none), and the
 * sites of its scale and its normalised value. layer_norm: it subtracts the mean. */
struct norm_step {
    int scale_site, normalized_site, layer;
    uint64_t gain, bias;
    int layer_norm;
};
enum norm_name { LN1, LN1_POST, LN2, LN2_POST, LN_FINAL };
struct norm_step norm_step_of(const struct model *model, enum norm_name name, int layer);

/* No hook or tape runs, and no edit or capture wants a site from first to last, so one fused kernel
 * may compute them all. sites.def has the order of the pass: a new site among them counts too. */
int step_fusable(const struct run_work *work, enum site first, enum site last, int layer);
/* Does this chunk decode with the kernels of GPUs (csrc/ops/decode.c)? */
int step_decode_lean(const struct run_work *work);
/* Does the MLP's first product do attention's post-norm, too, and add its output to the stream? In
 * decoding on GPUs it does where nothing in between is needed; the stream between attention and MLP
 * is then step_post_mid, and not work_mid. */
int step_post_later(const struct run_work *work, int layer);
uint64_t step_post_mid(const struct run_work *work);
/* Are attention patterns, values or MLP outputs of this layer taken from other rows? */
int step_frozen(const struct run_work *work, int layer);

/* Edits and captures of a site whose values are the given rows. */
int step_visit(struct run_work *work, int site, int layer, struct rows rows, struct error *error);
/* The same for rows that follow a norm with this scale [T], which EDIT_ADD_SCALED divides by; of
 * the edits those that `edits` names. */
int step_visit_normed(struct run_work *work, int site, int layer, struct rows rows, uint64_t scale,
                      enum site_edits edits, struct error *error);
/* dst = [add +] norm(x). keep_scale: the norm's scale is left in work->scale. */
int step_norm(struct run_work *work, struct norm_step norm, uint64_t x, uint64_t add, uint64_t dst,
              int keep_scale, struct error *error);
/* dst = x W^T [+ bias] [+ add]; add has the rows of dst. */
int step_product(struct run_work *work, const struct op_matrix *matrix, struct rows x,
                 uint64_t bias, uint64_t add, struct rows dst, struct error *error);
/* Can one kernel do the norm and a product of the residual stream? */
int step_norm_fusable(const struct run_work *work, struct norm_step norm);
/* NORM_KIND_* of a norm before a product; NONE where the model has no such norm */
uint32_t step_norm_kind(struct norm_step norm);
/* dst = [norm](the residual stream in work->x) W^T [+ bias], clamped to +-clip unless it is 0. */
int step_norm_product(struct run_work *work, struct norm_step norm, const struct op_matrix *matrix,
                      uint64_t bias, float clip, struct rows dst, int keep_scale,
                      struct error *error);
/* Where a sublayer's output is added: to = from + output, both residual streams [T, d_stride]. */
struct residual {
    uint64_t from, to;
};
/* Attention: work_mid = x + output; the MLP: x = work_mid + output. */
struct residual attention_residual(const struct run_work *work);
struct residual mlp_residual(const struct run_work *work);
/* Adds [the post-norm of] a sublayer's output, which lies at work->at_out and stays there. rows (0:
 * none): device address of the chunk tokens whose output each token takes. */
int step_add_output(struct run_work *work, int out_site, struct norm_step post,
                    struct residual stream, uint64_t rows, struct error *error);

/* The backward pass: the gradient with respect to the rows becomes that with respect to the values
 * before the site's edits. */
int step_visit_backward(struct run_work *work, int site, int layer, struct rows rows,
                        struct error *error);
/* dst = [add +] gradient with respect to x, dy with respect to the norm's output; without the norm,
 * [add +] dy. */
int step_norm_backward(struct run_work *work, struct norm_step norm, uint64_t x, uint64_t dy,
                       uint64_t add, uint64_t dst, struct error *error);
/* dx = dy W */
int step_product_backward(struct run_work *work, const struct op_matrix *matrix, struct rows dy,
                          struct rows dx, struct error *error);
/* *d: where the gradient with respect to a sublayer's output (before its post-norm) lies. raw: that
 * output, NULL without a post-norm. */
int step_add_output_backward(struct run_work *work, int out_site, struct norm_step post,
                             const struct gpu_buffer *raw, struct rows *d, struct error *error);
/* to = from [+ add], [T, D] each. */
int step_copy(struct run_work *work, uint64_t from, uint64_t to, uint64_t add, struct error *error);

/* The site of a span's scores or patterns [queries, H, key_stride] at `at`. */
struct site_view query_span_view(const struct run_work *work, const struct query_span *span,
                                 int site, int layer, uint64_t at);
/* Arguments of a span's attention, with the scores in work->scores and z in work->z. */
struct decode_params query_span_attention(const struct run_work *work,
                                          const struct run_cache *cache, int layer,
                                          const struct query_span *span);
uint64_t query_span_tiles(const struct run_work *work, const struct query_span *span);
/* Per-head results [tokens, H, d_stride] of n tokens in work->result, as many at once as *most. */
struct site_view head_results_view(const struct run_work *work, int layer, uint32_t first,
                                   uint32_t n);
int head_results_reserve(struct run_work *work, uint32_t *most, struct error *error);

/* attention.c: does a layer rotate queries and keys? */
int rotated(const struct model_facts *facts, int layer);
/* Does a norm of queries and keys come before op_rope, which norms single heads alone? */
int norm_before_rotation(const struct model_facts *facts);
/* The flags of op_rope and op_rope_bwd that a layer's norm per head and rotation need. */
uint32_t rope_flags(const struct model_facts *facts, int layer);
/* attention.c, mlp.c: work_mid = x + attention(x), x = work_mid + mlp(y), x the residual stream. y
 * is work_mid, which is x, or in parallel layers x itself. */
int run_attention(struct run_work *work, struct run_cache *cache, int layer, struct error *error);
int run_mlp(struct run_work *work, int layer, struct error *error);
/* logits.c: logits of the residual stream, as the batch asks for them. */
int run_logits(struct run_work *work, struct error *error);
/* mlp_backward.c, attention_backward.c: tape->dx, the gradient with respect to the residual stream
 * after the layer, becomes that with respect to the one before the MLP, then before attention. In
 * parallel layers the MLP leaves dx alone, because it is attention's, and its sum with the MLP's
 * own waits in tape->dx_pre. */
int run_attention_backward(struct run_work *work, struct run_cache *cache, int layer,
                           struct error *error);
int run_mlp_backward(struct run_work *work, int layer, struct error *error);

#endif
