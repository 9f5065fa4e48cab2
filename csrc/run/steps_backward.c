/* The backward pass's shared steps (steps.h): each gives the gradient with respect to what its
 * forward step took. */
#include "run/steps.h"

int step_visit_backward(struct run_work *work, int site, int layer, struct rows rows,
                        struct error *error) {
    struct site_view view = site_view_rows(work, site, layer, rows.address, rows.stride);
    return site_visit_backward(work, &view, error);
}

int step_product_backward(struct run_work *work, const struct op_matrix *matrix, struct rows dy,
                          struct rows dx, struct error *error) {
    struct op_linear_bwd_args args = {
        .dy = dy.address,
        .dx = dx.address,
        .n_rows = work->chunk.n_tokens,
        .y_stride = dy.stride,
        .x_stride = dx.stride,
    };
    return op_linear_bwd(&work->model->ops, matrix, &args, error);
}

int step_norm_backward(struct run_work *work, struct norm_step norm, uint64_t x, uint64_t dy,
                       uint64_t add, uint64_t dst, struct error *error) {
    struct ops *ops = &work->model->ops;
    uint32_t n = work->chunk.n_tokens;
    int l = norm.layer;
    if (!norm.gain)
        return step_copy(work, dy, dst, add, error);
    struct norm_bwd_params params = {
        .x = x,
        .gain = norm.gain,
        .dy = dy,
        .dx = dst,
        .add = add,
        .dnormalized = run_address(work->normalized),
        .dscale = run_address(work->scale),
        .width = work->model->facts.d_model,
        .stride = work->d_stride,
        .flags = (add ? NORM_BWD_ADD : 0) | (norm.layer_norm ? NORM_BWD_LAYER : 0),
        .eps = work->model->facts.norm_eps,
    };
    if (site_wanted(work, norm.scale_site, l) || site_wanted(work, norm.normalized_site, l)) {
        struct norm_bwd_params sites = params;
        struct rows dnormalized = {params.dnormalized, work->d_stride}, dscale = {params.dscale, 1};
        uint32_t kind = params.flags & NORM_BWD_LAYER;
        sites.flags = kind | NORM_BWD_WRITE_NORMALIZED | NORM_BWD_NO_OUT;
        RUN(op_norm_bwd(ops, &sites, n, error));
        RUN(step_visit_backward(work, norm.normalized_site, l, dnormalized, error));
        sites.dy = dnormalized.address;
        sites.flags = kind | NORM_BWD_NORMALIZED | NORM_BWD_WRITE_SCALE | NORM_BWD_NO_OUT;
        RUN(op_norm_bwd(ops, &sites, n, error));
        RUN(step_visit_backward(work, norm.scale_site, l, dscale, error));
        params.dy = dnormalized.address;
        params.flags |= NORM_BWD_NORMALIZED;
    }
    return op_norm_bwd(ops, &params, n, error);
}

int step_add_output_backward(struct run_work *work, int out_site, struct norm_step post,
                             const struct gpu_buffer *raw, struct rows *d, struct error *error) {
    uint64_t dx = run_address(work->tape->dx), draw = run_address(work->tape->draw);
    *d = (struct rows){dx, work->d_stride};
    /* the gradient of the residual stream itself passes the edit by, so the edit acts on a copy */
    if (site_edited(work, out_site, post.layer)) {
        RUN(step_copy(work, dx, draw, 0, error));
        d->address = draw;
    }
    RUN(step_visit_backward(work, out_site, post.layer, *d, error));
    if (!post.gain)
        return 0;
    RUN(step_norm_backward(work, post, run_address(raw), d->address, 0, draw, error));
    d->address = draw;
    return 0;
}
