/* Several steps of greedy decoding recorded one after the other. Everything about the next steps is
 * known ahead but their tokens, which the embedding reads from a list that op_pick wrote in the
 * step before, so that the host need not wait in between. */
#include <stdlib.h>
#include <string.h>

#include "run/work.h"

static int block_check(const struct run_work *work, const struct run_batch *batch,
                       const struct run_block *block, struct error *error) {
    uint32_t vocabulary = work->model->facts.d_vocab;
    int single = batch->decode && batch->logits_mode == RUN_LOGITS_LAST && !batch->n_captures &&
                 !batch->inputs && !batch->first_layer && !batch->stop_layer;
    for (uint32_t r = 0; r < batch->n_rows; r++)
        single &= batch->n_tokens[r] == 1;
    if (!single || block->n_steps == 0 || block->share == 0 || batch->n_rows % block->share ||
        batch->n_rows > work->capacity || vocabulary > 1u << 24 ||
        (uint64_t)batch->n_rows * block->n_steps * 4 > work->readback_bytes)
        return error_set(error, ERROR_VALUE,
                         "%u steps of %u rows at once: a row brings one token and no captures, at "
                         "most %u rows decode together, and token ids are below 2^24",
                         block->n_steps, batch->n_rows, work->capacity);
    return 0;
}

static int block_record(struct run_work *work, struct run_cache *cache,
                        const struct run_batch *batch, const struct run_block *block,
                        uint32_t *start, struct error *error) {
    uint32_t n_rows = batch->n_rows, last = 1;
    for (uint32_t r = 0; r < n_rows; r++) {
        start[r] = batch->start[r];
        last = start[r] + block->n_steps > last ? start[r] + block->n_steps : last;
    }
    /* recorded commands must not see either of them grow */
    if (model_angles_prepare(work->model, last, error) ||
        work_grow(work, &work->picked, 4 * (uint64_t)n_rows * block->n_steps, "picked tokens",
                  error))
        return -1;
    struct run_batch step = *batch;
    step.start = start;
    for (uint32_t i = 0; i < block->n_steps; i++) {
        uint64_t to = run_address(work->picked) + 4 * (uint64_t)n_rows * i;
        struct picks picks = {
            .from = i ? to - 4 * (uint64_t)n_rows : 0,
            .share = block->share,
            .to = to,
            .empty = block->empty,
            .near = block->near,
        };
        work->chunk.picks = &picks;
        int failed = run_forward_record(work, cache, &step, error);
        work->chunk.picks = NULL;
        if (failed)
            return -1;
        for (uint32_t r = 0; r < n_rows; r++)
            start[r]++;
    }
    return gpu_queue_copy(work->model->ops.queue, work->picked, 0, work->readback, 0,
                          4 * (uint64_t)n_rows * block->n_steps, error);
}

int run_decode_block(struct run_work *work, struct run_cache *cache, const struct run_batch *batch,
                     const struct run_block *block, float *picked, struct error *error) {
    if (block_check(work, batch, block, error))
        return -1;
    uint32_t *start = malloc(batch->n_rows * sizeof *start + 1);
    if (!start)
        return error_set(error, ERROR_MEMORY, "out of memory for a block of steps");
    int failed = block_record(work, cache, batch, block, start, error) ||
                 gpu_queue_wait(work->model->ops.queue, error);
    free(start);
    if (failed) {
        gpu_queue_abandon(work->model->ops.queue);
        return -1;
    }
    memcpy(picked, gpu_buffer_map(work->readback),
           (size_t)batch->n_rows * block->n_steps * sizeof *picked);
    return 0;
}
