/* The forward pass's shared steps (steps.h). */
#include "run/steps.h"

struct qkv_rows qkv_rows_at(const struct run_work *work, uint64_t address) {
    const struct model_facts *f = &work->model->facts;
    uint64_t k = address + 4 * (uint64_t)f->n_heads * f->d_head,
             v = k + 4 * (uint64_t)f->n_kv_heads * f->d_head;
    return (struct qkv_rows){
        .q = {address, work->qkv_stride},
        .k = {k, work->qkv_stride},
        .v = {v, work->qkv_stride},
    };
}

struct norm_step norm_step_of(const struct model *model, enum norm_name name, int l) {
    const struct model_layer *layer = &model->layers[l];
    int layer_norm = model->facts.norm == NORM_KIND_LAYER; /* post-norms are RMS norms */
    switch (name) {
    case LN1:
        return (struct norm_step){SITE_LN1_SCALE, SITE_LN1_NORMALIZED, l,
                                  layer->ln1,     layer->b_ln1,        layer_norm};
    case LN1_POST:
        return (struct norm_step){SITE_LN1_POST_SCALE, SITE_LN1_POST_NORMALIZED, l, layer->ln1_post,
                                  .layer_norm = 0};
    case LN2:
        return (struct norm_step){SITE_LN2_SCALE, SITE_LN2_NORMALIZED, l,
                                  layer->ln2,     layer->b_ln2,        layer_norm};
    case LN2_POST:
        return (struct norm_step){SITE_LN2_POST_SCALE, SITE_LN2_POST_NORMALIZED, l, layer->ln2_post,
                                  .layer_norm = 0};
    default:
        return (struct norm_step){SITE_FINAL_SCALE, SITE_FINAL_NORMALIZED, 0,
                                  model->ln_final,  model->b_ln_final,     layer_norm};
    }
}

struct residual attention_residual(const struct run_work *work) {
    return (struct residual){run_address(work->x), run_address(work_mid(work))};
}

struct residual mlp_residual(const struct run_work *work) {
    return (struct residual){run_address(work_mid(work)), run_address(work->x)};
}

int step_fusable(const struct run_work *work, enum site first, enum site last, int layer) {
    for (int site = (int)first; site <= (int)last; site++)
        if (site_wanted(work, site, layer))
            return 0;
    return !work->tape && !work->hook;
}

int step_decode_lean(const struct run_work *work) {
    return work->chunk.batch->decode && op_decode_lean(&work->model->ops);
}

int step_post_later(const struct run_work *work, int layer) {
    const struct model_facts *f = &work->model->facts;
    const struct model_layer *weights = &work->model->layers[layer];
    uint32_t norm = step_norm_kind(norm_step_of(work->model, LN2, layer));
    uint32_t finish = f->gated ? FINISH_GATE : FINISH_ACT;
    return f->post_norms && !f->parallel && step_decode_lean(work) &&
           op_linear_decode_offered(&work->model->ops, &weights->gate_up, finish) &&
           op_linear_decode_post_offered(norm, finish) && !site_edited(work, SITE_RESULT, layer) &&
           step_fusable(work, SITE_LN1_POST_SCALE, SITE_MLP_PRE_LINEAR, layer) &&
           /* these write to the memory of step_post_mid */
           step_fusable(work, SITE_LN2_POST_SCALE, SITE_LN2_POST_NORMALIZED, layer);
}

uint64_t step_post_mid(const struct run_work *work) { return run_address(work->normalized); }

int step_frozen(const struct run_work *work, int layer) {
    return work->chunk.batch->frozen && work->chunk.batch->frozen[layer];
}

struct site_view site_view_rows(const struct run_work *work, int site, int layer, uint64_t at,
                                uint32_t stride) {
    struct site_view view = {
        .site = site,
        .layer = layer,
        .address = at,
        .n_tokens = work->chunk.n_tokens,
        .token_stride = stride,
    };
    site_shape(site, &work->model->facts, &view.n_heads, &view.width);
    view.head_stride = view.width;
    return view;
}

int step_visit_normed(struct run_work *work, int site, int layer, struct rows rows, uint64_t scale,
                      enum site_edits edits, struct error *error) {
    struct site_view view = site_view_rows(work, site, layer, rows.address, rows.stride);
    view.scale = scale;
    view.edits = edits;
    return site_visit(work, &view, error);
}

int step_visit(struct run_work *work, int site, int layer, struct rows rows, struct error *error) {
    return step_visit_normed(work, site, layer, rows, 0, EDITS_ALL, error);
}

int step_norm(struct run_work *work, struct norm_step norm, uint64_t x, uint64_t add, uint64_t dst,
              int keep_scale, struct error *error) {
    struct ops *ops = &work->model->ops;
    uint32_t n = work->chunk.n_tokens, kind = norm.layer_norm ? NORM_LAYER : 0;
    kind |= step_decode_lean(work) ? NORM_DECODE : 0;
    uint32_t flags = kind | (norm.bias ? NORM_BIAS : 0) | (add ? NORM_ADD : 0);
    int hooked = site_wanted(work, norm.scale_site, norm.layer) ||
                 site_wanted(work, norm.normalized_site, norm.layer);
    struct norm_params params = {
        .x = x,
        .gain = norm.gain,
        .bias = norm.bias,
        .dst = dst,
        .normalized = run_address(work->normalized),
        .scale = run_address(work->scale),
        .add = add,
        .width = work->model->facts.d_model,
        .stride = work->d_stride,
        .eps = work->model->facts.norm_eps,
        .flags = flags | (keep_scale ? NORM_WRITE_SCALE : 0),
    };
    if (!hooked)
        return op_norm(ops, &params, n, error);
    params.flags = kind | NORM_WRITE_SCALE | NORM_NO_OUT;
    RUN(op_norm(ops, &params, n, error));
    RUN(step_visit(work, norm.scale_site, norm.layer, (struct rows){params.scale, 1}, error));
    params.flags = kind | NORM_READ_SCALE | NORM_WRITE_NORMALIZED | NORM_NO_OUT;
    RUN(op_norm(ops, &params, n, error));
    RUN(step_visit_normed(work, norm.normalized_site, norm.layer,
                          (struct rows){params.normalized, work->d_stride}, params.scale, EDITS_ALL,
                          error));
    params.x = params.normalized;
    params.flags = flags | NORM_READ_NORMALIZED;
    return op_norm(ops, &params, n, error);
}

static int product(struct run_work *work, const struct op_matrix *matrix, struct rows x,
                   uint64_t bias, float clip, uint64_t add, struct rows dst, struct error *error) {
    struct op_linear_args args = {
        .x = x.address,
        .dst = dst.address,
        .bias = bias,
        .clip = clip,
        .add = add,
        .n_rows = work->chunk.n_tokens,
        .x_stride = x.stride,
        .dst_stride = dst.stride,
        .decode = work->chunk.batch->decode,
    };
    return op_linear(&work->model->ops, matrix, &args, error);
}

int step_product(struct run_work *work, const struct op_matrix *matrix, struct rows x,
                 uint64_t bias, uint64_t add, struct rows dst, struct error *error) {
    return product(work, matrix, x, bias, 0, add, dst, error);
}

int step_norm_fusable(const struct run_work *work, struct norm_step norm) {
    return norm.gain &&
           (step_decode_lean(work) ||
            (!norm.layer_norm && op_linear_norms(&work->model->ops, work->chunk.n_tokens)));
}

uint32_t step_norm_kind(struct norm_step norm) {
    return !norm.gain ? NORM_KIND_NONE : norm.layer_norm ? NORM_KIND_LAYER : NORM_KIND_RMS;
}

/* dst = norm(x) W^T [+ bias], clamped, by one kernel of decoding on GPUs */
static int lean_norm_product(struct run_work *work, struct norm_step norm,
                             const struct op_matrix *matrix, uint64_t bias, float clip,
                             struct rows x, struct rows dst, struct error *error) {
    struct op_linear_decode_args args = {
        .x = x.address,
        .dst = dst.address,
        .bias = bias,
        .gain = norm.gain,
        .norm_bias = norm.bias,
        .n_rows = work->chunk.n_tokens,
        .x_stride = x.stride,
        .dst_stride = dst.stride,
        .norm = step_norm_kind(norm),
        .finish = FINISH_PLAIN,
        .clip = clip,
        .eps = work->model->facts.norm_eps,
    };
    return op_linear_decode(&work->model->ops, matrix, &args, error);
}

int step_norm_product(struct run_work *work, struct norm_step norm, const struct op_matrix *matrix,
                      uint64_t bias, float clip, struct rows dst, int keep_scale,
                      struct error *error) {
    struct rows x = {run_address(work->x), work->d_stride},
                normed = {run_address(work->norm), work->d_stride};
    int hooked = site_wanted(work, norm.scale_site, norm.layer) ||
                 site_wanted(work, norm.normalized_site, norm.layer);
    if (!norm.gain)
        return product(work, matrix, x, bias, clip, 0, dst, error);
    if (keep_scale || hooked || !step_norm_fusable(work, norm)) {
        RUN(step_norm(work, norm, x.address, 0, normed.address, keep_scale, error));
        return product(work, matrix, normed, bias, clip, 0, dst, error);
    }
    if (step_decode_lean(work))
        return lean_norm_product(work, norm, matrix, bias, clip, x, dst, error);
    struct op_linear_args args = {
        .x = x.address,
        .dst = dst.address,
        .bias = bias,
        .clip = clip,
        .gain = norm.gain,
        .eps = work->model->facts.norm_eps,
        .n_rows = work->chunk.n_tokens,
        .x_stride = x.stride,
        .dst_stride = dst.stride,
        .decode = work->chunk.batch->decode != 0,
    };
    return op_linear(&work->model->ops, matrix, &args, error);
}

int step_copy(struct run_work *work, uint64_t from, uint64_t to, uint64_t add,
              struct error *error) {
    struct copy_params copy = {
        .x = from,
        .dst = to,
        .add = add,
        .n_rows = work->chunk.n_tokens,
        .width = work->model->facts.d_model,
        .x_stride = work->d_stride,
        .out_stride = work->d_stride,
        .flags = add ? COPY_ADD : 0,
    };
    return op_copy(&work->model->ops, &copy, error);
}

/* dst = out of the chunk tokens `rows` [+ add] */
static int copy_picked(struct run_work *work, uint64_t out, uint64_t rows, uint64_t add,
                       uint64_t dst, struct error *error) {
    struct copy_params pick = {
        .x = out,
        .dst = dst,
        .rows = rows,
        .add = add,
        .n_rows = work->chunk.n_tokens,
        .width = work->model->facts.d_model,
        .x_stride = work->d_stride,
        .out_stride = work->d_stride,
        .flags = COPY_ROWS | (add ? COPY_ADD : 0),
    };
    return op_copy(&work->model->ops, &pick, error);
}

int step_add_output(struct run_work *work, int out_site, struct norm_step post,
                    struct residual stream, uint64_t rows, struct error *error) {
    uint64_t normed = run_address(work->norm), out = work->at_out;
    int l = post.layer, hooked = site_wanted(work, out_site, l) || work->hook;
    if (post.gain && !hooked && !rows)
        return step_norm(work, post, out, stream.from, stream.to, 0, error);
    if (post.gain) {
        RUN(step_norm(work, post, out, 0, normed, 0, error));
        out = normed;
    }
    if (rows && !hooked)
        return copy_picked(work, out, rows, stream.from, stream.to, error);
    if (rows) {
        uint64_t picked = post.gain ? run_address(work->out) : normed;
        RUN(copy_picked(work, out, rows, 0, picked, error));
        out = picked;
    }
    RUN(step_visit(work, out_site, l, (struct rows){out, work->d_stride}, error));
    if (out_site == SITE_MLP_OUT)
        RUN(run_hook_call(work, HOOK_MLP_OUT, l, out, work->d_stride, error));
    return step_copy(work, out, stream.to, stream.from, error);
}
