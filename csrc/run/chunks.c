/* A batch cut into chunks: token lists and query tiles, uploaded before the layers run. */
#include <stdlib.h>
#include <string.h>

#include "run/work.h"

/* Are the keys of a row of n tokens rotated by the table of long texts? */
static int long_rotated(const struct model_facts *f, uint64_t n) {
    return f->rope_switch && n > f->rope_switch;
}

/* Positions of row r after the batch, or after its last step in a block of them. */
static uint64_t row_end(const struct run_work *work, const struct run_batch *batch, uint32_t r) {
    const struct picks *picks = work->chunk.picks;
    return (uint64_t)batch->start[r] + batch->n_tokens[r] + (picks ? picks->n_steps - 1 : 0);
}

static int batch_check(const struct run_work *work, const struct run_cache *cache,
                       const struct run_batch *batch, struct error *error) {
    const struct model_facts *f = &work->model->facts;
    uint64_t at = 0;
    if (batch->first_layer >= f->n_layers || (batch->first_layer && !batch->inputs))
        return error_set(error, ERROR_VALUE,
                         "resuming at layer %u of %u needs the residual stream there",
                         batch->first_layer, f->n_layers);
    if (batch->first_layer < cache->first_layer)
        return error_set(error, ERROR_VALUE,
                         "a batch from layer %u with a cache that begins at layer %u",
                         batch->first_layer, cache->first_layer);
    if (batch->stop_layer &&
        (batch->stop_layer <= batch->first_layer || batch->stop_layer > f->n_layers))
        return error_set(error, ERROR_VALUE, "a run of layers %u to %u of %u", batch->first_layer,
                         batch->stop_layer, f->n_layers);
    for (uint32_t r = 0; r < batch->n_rows; r++) {
        uint64_t end = row_end(work, batch, r);
        if (batch->decode && batch->n_tokens[r] != 1) /* attention may store and read at once */
            return error_set(error, ERROR_VALUE, "decoding takes one token a row, row %u has %u", r,
                             batch->n_tokens[r]);
        if (end > f->n_ctx)
            return error_set(error, ERROR_VALUE,
                             "row %u has %llu tokens, the model's context holds %u: shorten the "
                             "prompt or generate fewer tokens",
                             r, (unsigned long long)end, f->n_ctx);
        if (batch->slot[r] + end > cache->n_slots)
            return error_set(error, ERROR_VALUE, "row %u needs %llu cache slots, there are %u", r,
                             (unsigned long long)end, cache->n_slots - batch->slot[r]);
        int was_long = batch->start[r]
                           ? !!(cache->state[batch->slot[r] + batch->start[r] - 1] & RUN_CACHE_LONG)
                           : long_rotated(f, batch->n_tokens[r]);
        if (long_rotated(f, end) != was_long ||
            long_rotated(f, (uint64_t)batch->start[r] + batch->n_tokens[r]) != was_long)
            return error_set(
                error, ERROR_VALUE,
                "row %u grows from %u to %llu tokens: texts longer than %u are rotated "
                "by another table, so all of its tokens must be run again",
                r, batch->start[r], (unsigned long long)end, f->rope_switch);
        for (uint32_t i = 0; i < batch->n_tokens[r]; i++, at++)
            if (batch->tokens[at] >= f->d_vocab)
                return error_set(error, ERROR_VALUE,
                                 "row %u, position %u: token %u is not in the vocabulary of %u", r,
                                 batch->start[r] + i, batch->tokens[at], f->d_vocab);
        if (r && batch->group[r] == batch->group[r - 1] &&
            (batch->n_tokens[r] != batch->n_tokens[r - 1] ||
             batch->start[r] != batch->start[r - 1]))
            return error_set(error, ERROR_VALUE,
                             "rows %u and %u advance together but differ in length", r - 1, r);
    }
    return 0;
}

/* Appends tokens [from, from + n) of row r (counted from its new tokens) to the chunk. */
static void chunk_append(struct run_work *work, struct token_meta *meta, const uint32_t *tokens,
                         uint32_t r, uint32_t from, uint32_t n) {
    struct chunk *chunk = &work->chunk;
    const struct run_batch *batch = chunk->batch;
    uint32_t row_end = chunk->n_tokens + n, length = batch->start[r] + batch->n_tokens[r];
    for (uint32_t i = 0; i < n; i++) {
        uint32_t t = chunk->n_tokens++, pos = batch->start[r] + from + i;
        meta[t] = (struct token_meta){
            .id = tokens[from + i],
            .pos = pos,
            .slot = batch->slot[r] + pos,
            .q_token = t,
            .k_slot = batch->slot[r],
            .v_slot = batch->slot[r],
            .row = r,
            .row_end = row_end,
            .angle = model_angle_row(work->model, pos, length),
        };
        chunk->places[t] = (struct token_place){r, pos,
                                                (uint32_t)(tokens - batch->tokens) + from + i};
        if (i % OP_TILE == 0)
            chunk->tile_list[chunk->n_tiles++] = (struct query_tile){t, 0};
        chunk->tile_list[chunk->n_tiles - 1].count++;
        uint32_t n_keys = pos + (chunk->picks ? chunk->picks->n_steps : 1);
        if (n_keys > chunk->max_keys)
            chunk->max_keys = n_keys;
        if (from + i + 1 == batch->n_tokens[r])
            chunk->last_tokens[chunk->n_last++] = t;
    }
}

/* In frozen layers a token reads queries, keys, values and MLP outputs of other rows of its row
 * group. The group's first row begins at chunk token `first`; each row has n tokens. */
static void freeze(const struct run_batch *batch, struct token_meta *meta, uint32_t *mlp_rows,
                   uint32_t first, uint32_t first_row, uint32_t n_rows, uint32_t n) {
    for (uint32_t r = first_row; r < first_row + n_rows; r++)
        for (uint32_t i = 0; i < n; i++) {
            struct token_meta *m = &meta[first + (r - first_row) * n + i];
            m->q_token = first + (batch->q_row[r] - first_row) * n + i;
            m->k_slot = batch->slot[batch->q_row[r]];
            m->v_slot = batch->slot[batch->v_row[r]];
            mlp_rows[first + (r - first_row) * n + i] = first +
                                                        (batch->mlp_row[r] - first_row) * n + i;
        }
}

static int chunk_run(struct run_work *work, struct run_cache *cache, const struct token_meta *meta,
                     const struct token_meta *frozen_meta, const uint32_t *mlp_rows, int mlp_frozen,
                     struct error *error) {
    struct chunk *chunk = &work->chunk;
    if ((!chunk->picks &&
         work_upload(work, meta, chunk->n_tokens * sizeof *meta, &chunk->tokens, error)) ||
        work_upload(work, chunk->tile_list, chunk->n_tiles * sizeof *chunk->tile_list,
                    &chunk->tiles, error) ||
        (chunk->n_last &&
         work_upload(work, chunk->last_tokens, chunk->n_last * sizeof *chunk->last_tokens,
                     &chunk->last_rows, error)))
        return -1;
    chunk->frozen_tokens = chunk->tokens;
    chunk->mlp_rows = 0;
    if (chunk->batch->frozen && !chunk->picks &&
        work_upload(work, frozen_meta, chunk->n_tokens * sizeof *meta, &chunk->frozen_tokens,
                    error))
        return -1;
    if (mlp_frozen &&
        work_upload(work, mlp_rows, chunk->n_tokens * sizeof *mlp_rows, &chunk->mlp_rows, error))
        return -1;
    if (chunk->picks)
        return run_block_steps(work, cache, meta, chunk->batch->frozen ? frozen_meta : NULL, error);
    if (run_layers(work, cache, error))
        return -1;
    /* Pending readbacks refer to this chunk's token list: they are copied before the next is made.
     */
    if (work->n_pending)
        return work_readback_drain(work, error);
    return 0;
}

static uint32_t group_rows(const struct run_batch *batch, uint32_t first) {
    uint32_t n = 1;
    while (first + n < batch->n_rows && batch->group[first + n] == batch->group[first])
        n++;
    return n;
}

static int groups_check(const struct run_batch *batch, uint32_t capacity, int *mlp_frozen,
                        struct error *error) {
    *mlp_frozen = 0;
    for (uint32_t r = 0, n; r < batch->n_rows; r += n) {
        n = group_rows(batch, r);
        if (n > 1 && n > capacity / OP_TILE)
            return error_set(error, ERROR_VALUE, "%u rows in one group: at most %u", n,
                             capacity / OP_TILE);
        for (uint32_t i = r; batch->frozen && i < r + n; i++) {
            if (batch->q_row[i] - r >= n || batch->v_row[i] - r >= n || batch->mlp_row[i] - r >= n)
                return error_set(error, ERROR_VALUE, "row %u is frozen to a row outside its group",
                                 i);
            *mlp_frozen |= batch->mlp_row[i] != i;
        }
    }
    return 0;
}

struct token_lists {
    struct token_meta *meta, *frozen; /* [capacity] */
    uint32_t *mlp_rows;
};

static int token_lists_make(struct token_lists *lists, uint32_t capacity, struct error *error) {
    *lists = (struct token_lists){malloc(capacity * sizeof *lists->meta),
                                  malloc(capacity * sizeof *lists->frozen),
                                  malloc(capacity * sizeof *lists->mlp_rows)};
    return lists->meta && lists->frozen && lists->mlp_rows
               ? 0
               : error_set(error, ERROR_MEMORY, "out of memory for token lists");
}

static void token_lists_free(struct token_lists *lists) {
    free(lists->meta);
    free(lists->frozen);
    free(lists->mlp_rows);
}

/* Fills chunks group by group; the rows of a group always advance by the same number of tokens. */
static int batch_run(struct run_work *work, struct run_cache *cache, const struct run_batch *batch,
                     struct token_lists *lists, int mlp_frozen, struct error *error) {
    struct chunk *chunk = &work->chunk;
    const uint32_t *tokens = batch->tokens;
    uint32_t row = 0, done = 0; /* done: tokens of each row of this group that are finished */
    while (row < batch->n_rows) {
        if (work_upload_reset(work, error))
            return -1;
        chunk->n_tokens = chunk->n_tiles = chunk->n_last = chunk->max_keys = 0;
        while (row < batch->n_rows) {
            uint32_t n_rows = group_rows(batch, row), length = batch->n_tokens[row],
                     room = (work->capacity - chunk->n_tokens) / n_rows;
            uint32_t n = length - done < room ? length - done : room;
            if (n == 0 && length > done)
                break;
            uint32_t first = chunk->n_tokens;
            for (uint32_t i = 0; i < n_rows; i++)
                chunk_append(work, lists->meta, tokens + (size_t)i * length, row + i, done, n);
            memcpy(lists->frozen + first, lists->meta + first,
                   (chunk->n_tokens - first) * sizeof *lists->meta);
            if (batch->frozen)
                freeze(batch, lists->frozen, lists->mlp_rows, first, row, n_rows, n);
            done += n;
            if (done < length)
                break;
            tokens += (size_t)n_rows * length;
            row += n_rows;
            done = 0;
        }
        if (chunk->n_tokens &&
            chunk_run(work, cache, lists->meta, lists->frozen, lists->mlp_rows, mlp_frozen, error))
            return -1;
    }
    return 0;
}

/* Checks the batch and prepares the rotation tables for its longest row. */
static int batch_begin(struct run_work *work, struct run_cache *cache,
                       const struct run_batch *batch, int *mlp_frozen, struct error *error) {
    uint32_t last = 1;
    if (batch_check(work, cache, batch, error) ||
        groups_check(batch, work->capacity, mlp_frozen, error))
        return -1;
    for (uint32_t r = 0; r < batch->n_rows; r++) {
        uint32_t end = (uint32_t)row_end(work, batch, r);
        last = end > last ? end : last;
        run_cache_written(cache, batch->slot[r] + batch->start[r], end - batch->start[r],
                          long_rotated(&work->model->facts, end),
                          batch->first_layer <= cache->first_layer && !batch->stop_layer);
    }
    work->chunk.batch = batch;
    work->n_pending = 0;
    work->readback_used = 0;
    return model_angles_prepare(work->model, last, error);
}

/* Records what run_forward runs. After a failure call gpu_queue_abandon. */
static int forward_record(struct run_work *work, struct run_cache *cache,
                          const struct run_batch *batch, struct error *error) {
    int mlp_frozen;
    struct token_lists lists;
    int failed = token_lists_make(&lists, work->capacity, error) ||
                 batch_begin(work, cache, batch, &mlp_frozen, error) ||
                 batch_run(work, cache, batch, &lists, mlp_frozen, error);
    work->chunk.batch = NULL;
    token_lists_free(&lists);
    return failed ? -1 : 0;
}

int run_forward(struct run_work *work, struct run_cache *cache, const struct run_batch *batch,
                struct error *error) {
    int failed = forward_record(work, cache, batch, error) ||
                 gpu_queue_wait(work->model->ops.queue, error);
    if (failed)
        gpu_queue_abandon(work->model->ops.queue);
    return failed ? -1 : 0;
}

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

int run_decode_block(struct run_work *work, struct run_cache *cache, const struct run_batch *batch,
                     const struct run_block *block, float *picked, struct error *error) {
    if (block_check(work, batch, block, error))
        return -1;
    struct picks picks = {
        .n_steps = block->n_steps,
        .share = block->share,
        .empty = block->empty,
        .near = block->near,
    };
    work->chunk.picks = &picks;
    int failed = forward_record(work, cache, batch, error) ||
                 gpu_queue_wait(work->model->ops.queue, error);
    work->chunk.picks = NULL;
    if (failed) {
        gpu_queue_abandon(work->model->ops.queue);
        return -1;
    }
    memcpy(picked, gpu_buffer_map(work->readback),
           (size_t)batch->n_rows * block->n_steps * sizeof *picked);
    return 0;
}

int run_one_chunk(struct run_work *work, struct run_cache *cache, const struct run_batch *batch,
                  struct error *error) {
    struct chunk *chunk = &work->chunk;
    struct token_lists lists;
    uint64_t total = 0;
    int mlp_frozen;
    if (batch->stop_layer)
        return error_set(error, ERROR_VALUE, "a backward pass needs all layers, not those below %u",
                         batch->stop_layer);
    for (uint32_t r = 0; r < batch->n_rows; r++) {
        total += batch->n_tokens[r];
        if (batch->start[r])
            return error_set(error, ERROR_VALUE,
                             "a backward pass needs whole rows; row %u starts at position %u", r,
                             batch->start[r]);
    }
    if (total > work->capacity || batch->frozen)
        return error_set(
            error, ERROR_VALUE, "a backward pass of %llu tokens%s, there is memory for %u",
            (unsigned long long)total, batch->frozen ? " of frozen rows" : "", work->capacity);
    int failed = token_lists_make(&lists, work->capacity, error) ||
                 work_upload_reset(work, error) ||
                 batch_begin(work, cache, batch, &mlp_frozen, error);
    if (!failed) {
        const uint32_t *tokens = batch->tokens;
        chunk->n_tokens = chunk->n_tiles = chunk->n_last = chunk->max_keys = 0;
        for (uint32_t r = 0; r < batch->n_rows; tokens += batch->n_tokens[r++])
            chunk_append(work, lists.meta, tokens, r, 0, batch->n_tokens[r]);
        failed = chunk_run(work, cache, lists.meta, lists.frozen, lists.mlp_rows, 0, error);
    }
    token_lists_free(&lists);
    return failed ? -1 : 0;
}

void run_one_chunk_end(struct run_work *work, int failed) {
    if (failed)
        gpu_queue_abandon(work->model->ops.queue);
    work->chunk.batch = NULL;
}
