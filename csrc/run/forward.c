/* The forward pass of one chunk, one line for each step of the model. x is the residual stream,
 * in work->x [T, D]; between attention and MLP it is work_mid. */
#include <stdlib.h>
#include <string.h>

#include "run/steps.h"

/* x = the layer inputs that the caller kept. */
static int resume(struct run_work *work, struct error *error) {
    const struct chunk *chunk = &work->chunk;
    size_t width = work->model->facts.d_model;
    uint64_t rows;
    float *packed = malloc(chunk->n_tokens * width * sizeof *packed);
    if (!packed)
        return error_set(error, ERROR_MEMORY, "out of memory for a resumed run");
    for (uint32_t t = 0; t < chunk->n_tokens; t++)
        memcpy(packed + t * width, chunk->batch->inputs + chunk->places[t].packed * width,
               width * sizeof *packed);
    int failed = work_upload(work, packed, chunk->n_tokens * width * sizeof *packed, &rows, error);
    free(packed);
    if (failed)
        return -1;
    struct copy_params copy = {
        .x = rows,
        .dst = run_address(work->x),
        .n_rows = chunk->n_tokens,
        .width = (uint32_t)width,
        .x_stride = (uint32_t)width,
        .out_stride = work->d_stride,
    };
    return op_copy(&work->model->ops, &copy, error);
}

/* x += pos_embed[position] */
static int embed_positions(struct run_work *work, struct error *error) {
    const struct model *model = work->model;
    struct rows x = {run_address(work->x), work->d_stride},
                rows = {run_address(work->out), work->d_stride};
    struct op_embed_args args = {
        .tokens = work->chunk.tokens,
        .dst = x.address,
        .add = x.address,
        .n_tokens = work->chunk.n_tokens,
        .stride = x.stride,
        .positions = 1,
        .scale = 1,
    };
    if (!site_wanted(work, SITE_POS_EMBED, 0))
        return op_embed(&work->model->ops, &model->pos_embed, &args, error);
    args.dst = rows.address;
    args.add = 0;
    RUN(op_embed(&work->model->ops, &model->pos_embed, &args, error));
    RUN(step_visit(work, SITE_POS_EMBED, 0, rows, error));
    return step_copy(work, rows.address, x.address, x.address, error);
}

/* x = embed[token] * embed_scale [+ pos_embed[position]] */
static int embed(struct run_work *work, struct error *error) {
    const struct model *model = work->model;
    struct rows x = {run_address(work->x), work->d_stride};
    struct op_embed_args args = {
        .tokens = work->chunk.tokens,
        .dst = x.address,
        .n_tokens = work->chunk.n_tokens,
        .stride = x.stride,
        .scale = model->facts.embed_scale,
    };
    if (work->chunk.picks) {
        args.picked = work->chunk.picks->ids;
        args.share = work->chunk.picks->share;
    }
    RUN(op_embed(&work->model->ops, &model->embed, &args, error));
    RUN(step_visit(work, SITE_EMBED, 0, x, error));
    return model->facts.pos_embed ? embed_positions(work, error) : 0;
}

int run_layer(struct run_work *work, struct run_cache *cache, int l, struct error *error) {
    struct rows x = {run_address(work->x), work->d_stride};
    RUN(tape_layer_begin(work, l, error));
    RUN(run_attention(work, cache, l, error));
    if (!work->model->facts.parallel)
        RUN(step_visit(work, SITE_RESID_MID, l, x, error));
    RUN(tape_layer_middle(work, l, error));
    return run_mlp(work, l, error);
}

int run_layers(struct run_work *work, struct run_cache *cache, struct error *error) {
    const struct run_batch *batch = work->chunk.batch;
    struct rows x = {run_address(work->x), work->d_stride};
    int n_layers = (int)work->model->facts.n_layers, stop = (int)batch->stop_layer;
    RUN(batch->inputs ? resume(work, error) : embed(work, error));
    for (int l = (int)batch->first_layer; l < (stop ? stop : n_layers); l++) {
        RUN(step_visit(work, SITE_RESID_PRE, l, x, error));
        RUN(run_layer(work, cache, l, error));
        RUN(step_visit(work, SITE_RESID_POST, l, x, error));
    }
    if (stop) /* the input of the first layer left out can still be captured */
        return stop < n_layers ? step_visit(work, SITE_RESID_PRE, stop, x, error) : 0;
    RUN(run_hook_call(work, HOOK_FINAL, 0, x.address, x.stride, error));
    return run_logits(work, error);
}
