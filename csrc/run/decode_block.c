/* Several steps of greedy decoding recorded one after the other. Everything about the next steps is
 * known ahead but their tokens, which the embedding reads from the ids that op_pick wrote in the
 * step before, so that the host need not wait in between.
 *
 * Steps differ in their positions alone, which lie in memory (the token lists): a copy before each
 * step puts its lists where the kernels read them. So the commands of a step are recorded once and
 * run again for the others, unless an edit takes some of the positions only. */
#include <stdlib.h>
#include <string.h>

#include "run/work.h"

#define KEEP_TRIES 2 /* memory may grow in the first step of a block, which cannot be kept then */

/* What is copied before and after the steps: [n_steps] token lists of `bytes` each, `offset` bytes
 * into an upload buffer, and the ids at `ids` bytes in work->block. */
struct block_memory {
    struct gpu_buffer *uploads;
    uint64_t offset, bytes, ids;
};

/* How many steps from the present one on have the same commands? */
static uint32_t steps_alike(const struct run_work *work, uint32_t most) {
    const struct chunk *chunk = &work->chunk;
    const struct edit_list *edits = chunk->batch->edits;
    for (uint32_t i = 0; edits && i < edits->n_edits; i++) {
        const struct edit *edit = &edits->edits[i];
        if (site_kind(edit->site) == SITE_KIND_KEYS) /* its operand must hold one more key */
            return 1;
        for (uint32_t t = 0; t < chunk->n_tokens && most > 1; t++) {
            struct token_place place = chunk->places[t];
            uint32_t n = edit_alike(edits, edit, chunk->batch->edit_row[place.row], place.pos);
            most = n < most ? n : most;
        }
    }
    return most;
}

/* Uploads the token lists of all steps behind the ids of the first one. */
static int lists_upload(struct run_work *work, const struct token_meta *meta,
                        const struct token_meta *frozen, struct block_memory *memory,
                        struct error *error) {
    struct chunk *chunk = &work->chunk;
    uint32_t n = chunk->n_tokens, n_steps = chunk->picks->n_steps, n_lists = frozen ? 2 : 1;
    uint64_t address, ids_bytes = 4 * (uint64_t)n;
    memory->bytes = (uint64_t)n_lists * n * sizeof *meta;
    memory->ids = memory->bytes;
    char *data = malloc(ids_bytes + n_steps * memory->bytes);
    if (!data)
        return error_set(error, ERROR_MEMORY, "out of memory for token lists");
    for (uint32_t t = 0; t < n; t++)
        ((float *)data)[t] = (float)meta[t].id;
    struct token_meta *to = (struct token_meta *)(data + ids_bytes);
    for (uint32_t i = 0; i < n_steps; i++)
        for (uint32_t e = 0; e < n_lists * n; e++) {
            *to = e < n ? meta[e] : frozen[e - n];
            to->pos += i;
            to->slot += i;
            to->angle += i;
            to++;
        }
    int failed = work_upload(work, data, ids_bytes + n_steps * memory->bytes, &address, error);
    free(data);
    if (failed || work_grow(work, &work->block, memory->ids + ids_bytes, "tokens of steps", error))
        return -1;
    memory->uploads = work->uploads->buffer;
    memory->offset = address - run_address(memory->uploads) + ids_bytes;
    chunk->tokens = chunk->frozen_tokens = run_address(work->block);
    if (frozen)
        chunk->frozen_tokens += n * sizeof *meta;
    chunk->picks->ids = run_address(work->block) + memory->ids;
    return gpu_queue_copy(work->model->ops.queue, memory->uploads, memory->offset - ids_bytes,
                          work->block, memory->ids, ids_bytes, error);
}

static int step_begin(struct run_work *work, const struct block_memory *memory, uint32_t step,
                      struct error *error) {
    return gpu_queue_copy(work->model->ops.queue, memory->uploads,
                          memory->offset + step * memory->bytes, work->block, 0, memory->bytes,
                          error);
}

static int step_end(struct run_work *work, const struct block_memory *memory, uint32_t step,
                    struct error *error) {
    uint32_t n = work->chunk.n_tokens;
    for (uint32_t t = 0; t < n; t++)
        work->chunk.places[t].pos++;
    return gpu_queue_copy(work->model->ops.queue, work->block, memory->ids, work->readback,
                          4 * (uint64_t)n * step, 4 * (uint64_t)n, error);
}

int run_block_steps(struct run_work *work, struct run_cache *cache, const struct token_meta *meta,
                    const struct token_meta *frozen, struct error *error) {
    struct gpu_queue *queue = work->model->ops.queue;
    uint32_t n_steps = work->chunk.picks->n_steps, step = 0;
    int tries = 0, kept = 0;
    struct block_memory memory;
    if (lists_upload(work, meta, frozen, &memory, error))
        return -1;
    while (step < n_steps) {
        uint32_t alike = tries < KEEP_TRIES ? steps_alike(work, n_steps - step) : 1;
        int keep = alike > 1;
        kept = 0;
        if (step_begin(work, &memory, step, error) ||
            (keep && gpu_queue_keep_begin(queue, error)) || run_layers(work, cache, error) ||
            (keep && gpu_queue_keep_end(queue, &kept, error)) ||
            step_end(work, &memory, step++, error))
            return -1;
        tries += keep && !kept;
        for (uint32_t i = 1; kept && i < alike; i++)
            if (step_begin(work, &memory, step, error) || gpu_queue_run_kept(queue, error) ||
                step_end(work, &memory, step++, error))
                return -1;
    }
    return 0;
}
