/* x = work_mid + mlp(y): the forward pass of one layer's MLP. y is work_mid, which is x, or in
 * parallel layers x itself: either way it lies in work->x. */
#include "run/steps.h"

/* post = act(ln2(y) W_gate^T) * (ln2(y) W_up^T) in one kernel */
static int gated_fused(struct run_work *work, int l, struct error *error) {
    const struct model_layer *layer = &work->model->layers[l];
    struct op_linear_pairs_args args = {
        .x = run_address(work->x),
        .gain = layer->ln2,
        .dst = run_address(work->post),
        .bias = layer->b_gate_up,
        .n_rows = work->chunk.n_tokens,
        .x_stride = work->d_stride,
        .dst_stride = work->mlp_stride,
        .kind = PAIRS_GATE,
        .act = work->model->facts.act,
        .eps = work->model->facts.norm_eps,
    };
    return op_linear_pairs(&work->model->ops, &layer->gate_up, &args, error);
}

/* post = act(ln2(y) W_gate^T) * (ln2(y) W_up^T), or act(ln2(y) W_up^T), in decoding on GPUs. y is
 * first made from attention's output where step_post_later says so */
static int lean_activation(struct run_work *work, int l, struct error *error) {
    const struct model_layer *layer = &work->model->layers[l];
    struct norm_step ln2 = norm_step_of(work->model, LN2, l);
    struct op_linear_decode_args args = {
        .x = run_address(work->x),
        .dst = run_address(work->post),
        .bias = layer->b_gate_up,
        .gain = ln2.gain,
        .norm_bias = ln2.bias,
        .n_rows = work->chunk.n_tokens,
        .x_stride = work->d_stride,
        .dst_stride = work->mlp_stride,
        .norm = step_norm_kind(ln2),
        .finish = work->model->facts.gated ? FINISH_GATE : FINISH_ACT,
        .act = work->model->facts.act,
        .eps = work->model->facts.norm_eps,
    };
    if (step_post_later(work, l)) {
        args.sub = work->at_out;
        args.post_gain = layer->ln1_post;
        args.mid = step_post_mid(work);
    }
    return op_linear_decode(&work->model->ops, &layer->gate_up, &args, error);
}

static int activate(struct run_work *work, uint64_t gate_up, struct error *error) {
    struct act_params act = {
        .gate_up = gate_up,
        .dst = run_address(work->post),
        .width = work->model->facts.d_mlp,
        .in_stride = work->gate_up_stride,
        .out_stride = work->mlp_stride,
        .act = work->model->facts.act,
        .plain = !work->model->facts.gated,
    };
    return op_act(&work->model->ops, &act, work->chunk.n_tokens, error);
}

/* gate, up = ln2(y) W_gate_up^T + b; post = act(gate) * up. Without a gate post = act(up), and up
 * lies where the gate would. */
static int activation(struct run_work *work, int l, struct error *error) {
    const struct model_layer *layer = &work->model->layers[l];
    struct norm_step ln2 = norm_step_of(work->model, LN2, l);
    struct rows gate = {work->at_gate_up, work->gate_up_stride}, up = gate;
    up.address += 4 * (uint64_t)work->model->facts.d_mlp;
    int gate_there = work->model->facts.gated;
    int unseen = step_fusable(work, SITE_LN2_SCALE, SITE_MLP_PRE_LINEAR, l);
    if (unseen && step_decode_lean(work) &&
        op_linear_decode_offered(&work->model->ops, &layer->gate_up,
                                 gate_there ? FINISH_GATE : FINISH_ACT))
        return lean_activation(work, l, error);
    if (gate_there && unseen && step_norm_fusable(work, ln2) &&
        op_linear_pairs_offered(&work->model->ops, &layer->gate_up, work->chunk.n_tokens))
        return gated_fused(work, l, error);
    RUN(step_norm_product(work, ln2, &layer->gate_up, layer->b_gate_up, 0, gate, 0, error));
    RUN(step_visit(work, SITE_MLP_PRE, l, gate, error));
    if (gate_there)
        RUN(step_visit(work, SITE_MLP_PRE_LINEAR, l, up, error));
    return activate(work, gate.address, error);
}

/* x = work_mid + [ln2_post](post W_down^T + b) */
static int output(struct run_work *work, int l, struct error *error) {
    const struct model_layer *layer = &work->model->layers[l];
    struct rows post = {run_address(work->post), work->mlp_stride},
                x = {run_address(work->x), work->d_stride}, out = {work->at_out, work->d_stride};
    struct residual stream = mlp_residual(work);
    if (step_post_later(work, l))
        stream.from = step_post_mid(work);
    uint64_t rows = step_frozen(work, l) ? work->chunk.mlp_rows : 0;
    int hooked = work->hook || site_wanted(work, SITE_MLP_OUT, l);
    if (!work->model->facts.post_norms && !rows && !hooked)
        return step_product(work, &layer->down, post, layer->b_down, stream.from, x, error);
    RUN(step_product(work, &layer->down, post, layer->b_down, 0, out, error));
    return step_add_output(work, SITE_MLP_OUT, norm_step_of(work->model, LN2_POST, l), stream, rows,
                           error);
}

int run_mlp(struct run_work *work, int l, struct error *error) {
    struct rows post = {run_address(work->post), work->mlp_stride};
    RUN(activation(work, l, error));
    RUN(step_visit(work, SITE_MLP_POST, l, post, error));
    return output(work, l, error);
}
