/* The backward pass of one chunk: forward.c read from the end. Every step gives the gradient with
 * respect to what its forward step took, and every site of the forward pass is passed again:
 * gradients are captured, and edits are applied in reverse.
 *
 * dx, in tape->dx [T, D], is the gradient with respect to the residual stream. Patterns are
 * computed again; everything else that a step needs is on the tape. */
#include "run/steps.h"

/* Runs a layer again from its kept input, for the values that its backward pass needs. */
static int layer_again(struct run_work *work, struct run_cache *cache, int l, struct error *error) {
    const struct run_batch *batch = work->chunk.batch;
    const struct run_hook *hook = work->hook;
    struct run_batch silent = *batch;
    RUN(step_copy(work, run_address(work->tape->layers[l].x), run_address(work->x), 0, error));
    silent.n_captures = 0;
    work->chunk.batch = &silent;
    work->hook = NULL;
    int failed = run_layer(work, cache, l, error);
    work->chunk.batch = batch;
    work->hook = hook;
    return failed;
}

static int layer_backward(struct run_work *work, struct run_cache *cache, int l,
                          struct error *error) {
    struct rows dx = {run_address(work->tape->dx), work->d_stride};
    /* what the last layer computed is still there */
    if (!work->tape->keep_inside && l + 1 < (int)work->model->facts.n_layers)
        RUN(layer_again(work, cache, l, error));
    RUN(step_visit_backward(work, SITE_RESID_POST, l, dx, error));
    RUN(run_mlp_backward(work, l, error));
    if (!work->model->facts.parallel)
        RUN(step_visit_backward(work, SITE_RESID_MID, l, dx, error));
    RUN(run_attention_backward(work, cache, l, error));
    RUN(run_hook_call(work, HOOK_D_RESID_PRE, l, dx.address, dx.stride, error));
    return step_visit_backward(work, SITE_RESID_PRE, l, dx, error);
}

static int final_norm_backward(struct run_work *work, struct rows dx, struct error *error) {
    struct norm_step ln_final = norm_step_of(work->model, LN_FINAL, 0);
    uint64_t x = run_address(work->x), dnorm = run_address(work->tape->dnorm);
    RUN(run_hook_call(work, HOOK_D_FINAL_NORMED, 0, dnorm, work->d_stride, error));
    RUN(step_norm_backward(work, ln_final, x, dnorm, 0, dx.address, error));
    return run_hook_call(work, HOOK_D_FINAL_INPUT, 0, dx.address, dx.stride, error);
}

/* The embedding and the learned positions are added, so both have the gradient of their sum. An
 * edit of one leaves the other's alone, so the positions' acts on a copy. */
static int embed_backward(struct run_work *work, struct rows dx, struct error *error) {
    struct rows copy = {run_address(work->tape->draw), work->d_stride};
    if (site_wanted(work, SITE_POS_EMBED, 0)) {
        RUN(step_copy(work, dx.address, copy.address, 0, error));
        RUN(step_visit_backward(work, SITE_POS_EMBED, 0, copy, error));
    }
    return step_visit_backward(work, SITE_EMBED, 0, dx, error);
}

static int layers_backward(struct run_work *work, struct run_cache *cache, int stop_layer,
                           struct error *error) {
    struct rows dx = {run_address(work->tape->dx), work->d_stride};
    RUN(final_norm_backward(work, dx, error));
    for (int l = (int)work->model->facts.n_layers - 1; l >= stop_layer; l--)
        RUN(layer_backward(work, cache, l, error));
    if (stop_layer)
        return 0;
    return embed_backward(work, dx, error);
}

int run_differentiate(struct run_work *work, struct run_tape *tape, struct run_cache *cache,
                      const struct run_batch *batch, const struct run_backward *backward,
                      struct error *error) {
    struct run_batch gradients = *batch;
    uint64_t total = 0;
    for (uint32_t r = 0; r < batch->n_rows; r++)
        total += batch->n_tokens[r];
    if (total > tape->capacity || backward->stop_layer < tape->first_layer ||
        tape->first_layer < batch->first_layer)
        return error_set(error, ERROR_VALUE,
                         "the tape begins at layer %u and holds %u tokens: it does not fit a "
                         "backward pass of %llu tokens to layer %u",
                         tape->first_layer, tape->capacity, (unsigned long long)total,
                         backward->stop_layer);
    work->tape = tape;
    tape->backward = backward;
    int failed = run_one_chunk(work, cache, batch, error);
    gradients.n_captures = 0;
    work->chunk.batch = &gradients;
    int values_only = backward->stop_layer >= tape->n_layers && !backward->n_captures &&
                      !backward->n_scalings && !work->hook;
    failed = failed || metric_gradient(work, tape, backward->metric, values_only, error);
    gradients.captures = backward->captures; /* into arrays of their own */
    gradients.n_captures = backward->n_captures;
    failed = failed ||
             (!values_only && layers_backward(work, cache, (int)backward->stop_layer, error)) ||
             (work->n_pending ? work_readback_drain(work, error)
                              : gpu_queue_wait(work->model->ops.queue, error));
    run_one_chunk_end(work, failed);
    work->tape = NULL;
    tape->backward = NULL;
    return failed ? -1 : 0;
}
