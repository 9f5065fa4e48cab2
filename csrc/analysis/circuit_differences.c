/* Differences of circuits: where they lie, the inputs that read them, their masked copies. */
#include "analysis/circuit.h"

#include <stdlib.h>

struct circuit_layer *circuit_layer_of(const struct circuit_run *run, int layer) {
    return &run->layers[layer - (int)run->first_layer];
}

uint64_t circuit_difference(const struct circuit_run *run, uint32_t difference) {
    return run_address(run->differences) +
           4 * (uint64_t)difference * run->work->chunk.n_tokens * run->work->d_stride;
}

struct circuit_norm circuit_norm_before(const struct circuit_run *run, uint64_t gain,
                                        uint64_t bias) {
    const struct model_facts *f = &run->model->facts;
    return (struct circuit_norm){f->pre_norms ? f->norm : NORM_KIND_NONE, gain, bias};
}

int circuit_norm_rows(struct circuit_run *run, const struct norm_params *params, uint64_t n,
                      struct error *error) {
    uint64_t row = 4 * (uint64_t)params->stride;
    for (uint64_t done = 0, some; done < n; done += some) {
        some = n - done < CIRCUIT_ROWS_A_GRID ? n - done : CIRCUIT_ROWS_A_GRID;
        struct norm_params part = *params;
        part.x += done * row;
        part.dst += part.dst ? done * row : 0;
        part.scale += part.scale ? 4 * done : 0;
        RUN(op_norm(&run->model->ops, &part, (uint32_t)some, error));
    }
    return 0;
}

int circuit_assemble(struct circuit_run *run, uint32_t entry, uint32_t n, struct circuit_norm norm,
                     uint64_t tokens, uint32_t n_tokens, struct error *error) {
    struct run_work *work = run->work;
    uint64_t tables = run_address(run->tables);
    struct circuit_inputs_params params = {
        .x = run_address(work->x),
        .d = run_address(run->differences),
        .refs = tables + 4 * (uint64_t)run->refs,
        .first = tables + 4 * (uint64_t)entry,
        .tokens = tokens,
        .gain = norm.gain,
        .bias = norm.bias,
        .dst = run_address(run->normed),
        .kind = norm.kind,
        .flags = norm.bias ? INPUTS_BIAS : 0,
        .all_tokens = !tokens,
        .n_tokens = n_tokens,
        .n_chunk = work->chunk.n_tokens,
        .width = run->model->facts.d_model,
        .stride = work->d_stride,
        .eps = run->model->facts.norm_eps,
    };
    return op_circuit_inputs(&run->model->ops, &params, n,
                             run->words[entry + n] - run->words[entry], error);
}

/* A token outside the mask gets the row of zeros that follows all differences. */
int circuit_masks(struct circuit_run *run, uint32_t stage, struct error *error) {
    struct run_work *work = run->work;
    const struct chunk *chunk = &work->chunk;
    uint32_t *rows = NULL, first = run->mask_first[stage], end = run->mask_first[stage + 1],
             zero = run->n_differences * run->capacity;
    if (first == end)
        return 0;
    rows = malloc(chunk->n_tokens * sizeof *rows);
    int failed = rows ? 0 : error_set(error, ERROR_MEMORY, "out of memory for masks");
    for (uint32_t m = first; m < end && !failed; m++) {
        uint64_t address;
        for (uint32_t t = 0; t < chunk->n_tokens; t++)
            rows[t] = run->mask && !run->mask[chunk->places[t].packed]
                          ? zero
                          : run->masks[m] * chunk->n_tokens + t;
        failed = work_upload(work, rows, chunk->n_tokens * sizeof *rows, &address, error);
        struct copy_params copy = {
            .x = run_address(run->differences),
            .dst = circuit_difference(run, run->masked + m),
            .rows = address,
            .n_rows = chunk->n_tokens,
            .width = run->model->facts.d_model,
            .x_stride = work->d_stride,
            .out_stride = work->d_stride,
            .flags = COPY_ROWS,
        };
        failed = failed || op_copy(&run->model->ops, &copy, error);
    }
    free(rows);
    return failed ? -1 : 0;
}
