/* The backward pass of mlp.c, its steps in reverse. */
#include "run/steps.h"

/* dgate, dup from dpost, where post = act(gate) * up, or without a gate act(up) */
static int activate_backward(struct run_work *work, int l, struct error *error) {
    struct run_tape *tape = work->tape;
    struct act_bwd_params act = {
        .gate_up = run_address(tape->layers[l].gate_up),
        .dpost = run_address(tape->dpost),
        .dgate_up = run_address(tape->dgate_up),
        .width = work->model->facts.d_mlp,
        .in_stride = work->gate_up_stride,
        .out_stride = work->mlp_stride,
        .act = work->model->facts.act,
        .plain = !work->model->facts.gated,
    };
    return op_act_bwd(&work->model->ops, &act, work->chunk.n_tokens, error);
}

/* dx_pre = dx + gradient through ln2; a hook gets what passes through the MLP alone. */
static int norm_backward(struct run_work *work, int l, struct error *error) {
    struct run_tape *tape = work->tape;
    struct norm_step ln2 = norm_step_of(work->model, LN2, l);
    uint64_t y = run_address(tape_mlp_input(tape, l)), dx = run_address(tape->dx),
             dx_pre = run_address(tape_dx_pre(tape)), dnorm = run_address(tape->dnorm),
             input = run_address(tape->draw);
    RUN(run_hook_call(work, HOOK_D_MLP_NORMED, l, dnorm, work->d_stride, error));
    if (!work->hook)
        return step_norm_backward(work, ln2, y, dnorm, dx, dx_pre, error);
    RUN(step_norm_backward(work, ln2, y, dnorm, 0, input, error));
    RUN(run_hook_call(work, HOOK_D_MLP_INPUT, l, input, work->d_stride, error));
    return step_copy(work, input, dx_pre, dx, error);
}

int run_mlp_backward(struct run_work *work, int l, struct error *error) {
    const struct model_layer *layer = &work->model->layers[l];
    struct run_tape *tape = work->tape;
    struct norm_step post_norm = norm_step_of(work->model, LN2_POST, l);
    struct rows dx = {run_address(tape->dx), work->d_stride},
                dnorm = {run_address(tape->dnorm), work->d_stride},
                dpost = {run_address(tape->dpost), work->mlp_stride},
                dgate = {run_address(tape->dgate_up), work->gate_up_stride}, dup = dgate, d;
    dup.address += 4 * (uint64_t)work->model->facts.d_mlp;
    RUN(run_hook_call(work, HOOK_D_RESID_POST, l, dx.address, dx.stride, error));
    RUN(step_add_output_backward(work, SITE_MLP_OUT, post_norm, tape->layers[l].mlp_raw, &d,
                                 error));
    RUN(step_product_backward(work, &layer->down, d, dpost, error));
    RUN(step_visit_backward(work, SITE_MLP_POST, l, dpost, error));
    RUN(activate_backward(work, l, error));
    if (work->model->facts.gated)
        RUN(step_visit_backward(work, SITE_MLP_PRE_LINEAR, l, dup, error));
    RUN(step_visit_backward(work, SITE_MLP_PRE, l, dgate, error));
    RUN(step_product_backward(work, &layer->gate_up, dgate, dnorm, error));
    return norm_backward(work, l, error);
}
