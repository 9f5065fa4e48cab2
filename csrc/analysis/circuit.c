/* Creates and destroys circuits, and runs them from hooks of the base run's forward pass. */
#include "analysis/circuit.h"

#include <stdlib.h>

int circuit_create(struct circuit_run **out, struct model *model, const struct circuit_plan *plan,
                   struct error *error) {
    const struct model_facts *f = &model->facts;
    *out = NULL;
    if (circuit_plan_check(f, plan, error))
        return -1;
    struct circuit_run *run = calloc(1, sizeof *run);
    if (!run)
        return error_set(error, ERROR_MEMORY, "out of memory for circuits");
    run->model = model;
    run->first_layer = plan->first_layer;
    run->depth = f->n_layers - plan->first_layer;
    run->n_inputs = f->n_heads + 2 * f->n_kv_heads;
    run->n_differences = 1;
    run->n_entries = plan->n_entries;
    run->logit_entry = plan->entry_first[run->depth * (run->n_inputs + 1)];
    run->n_logits = plan->n_entries - run->logit_entry;
    run->z_stride = op_row_stride(f->d_head);
    run->q_row_stride = op_row_stride(f->n_heads * f->d_head);
    run->k_row_stride = op_row_stride(f->n_kv_heads * f->d_head);
    run->heads_stride = f->d_head % 16 ? op_row_stride(f->n_heads * f->d_head) : run->z_stride;
    /* A head's rows of W_QKV are multiplied in whole panels: the stride is that of the widest. */
    for (uint32_t i = 0; i < run->n_inputs; i++) {
        uint32_t columns = (i * f->d_head % OP_PANEL + f->d_head + OP_PANEL - 1) / OP_PANEL *
                           OP_PANEL;
        if (op_row_stride(columns) > run->product_stride)
            run->product_stride = op_row_stride(columns);
    }
    run->layers = calloc(run->depth, sizeof *run->layers);
    int failed = run->layers ? 0 : error_set(error, ERROR_MEMORY, "out of memory for circuits");
    for (uint32_t i = 0; i < run->depth && !failed; i++)
        failed = circuit_layer_begin(run, plan, i, error);
    run->masked = run->n_differences;
    run->n_masks = plan->n_masks;
    run->n_differences += plan->n_masks;
    if (failed || circuit_tables_make(run, plan, error)) {
        circuit_destroy(run);
        return -1;
    }
    *out = run;
    return 0;
}

void circuit_destroy(struct circuit_run *run) {
    if (!run)
        return;
    if (run->work && run->model)
        gpu_queue_wait(run->model->ops.queue, NULL);
    struct gpu_buffer *buffers[] = {
        run->tables, run->differences, run->normed, run->product, run->q,       run->z,
        run->heads,  run->gathered,    run->raw,    run->scale,   run->gate_up, run->post,
        run->scores, run->steer,       run->q_rows, run->k_rows,  run->base_qk};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        gpu_buffer_destroy(buffers[i]);
    for (uint32_t i = 0; run->layers && i < run->depth; i++) {
        gpu_buffer_destroy(run->layers[i].k);
        gpu_buffer_destroy(run->layers[i].v);
        free(run->layers[i].input_first);
        free(run->layers[i].output_first);
    }
    read_memory_free(&run->read_memory);
    run_work_destroy(run->work);
    free(run->layers);
    free(run->words);
    free(run->mask_first);
    free(run->masks);
    free(run);
}

/* --- the pass --------------------------------------------------------------------------------- */

/* Difference 0: what steering adds to every token, or to each. */
static int steer(struct circuit_run *run, struct error *error) {
    struct run_work *work = run->work;
    struct copy_params copy = {
        .x = run_address(run->steer),
        .dst = circuit_difference(run, 0),
        .n_rows = work->chunk.n_tokens,
        .width = run->model->facts.d_model,
        .x_stride = 0,
        .out_stride = work->d_stride,
    };
    if (run->token_steer) {
        const float *rows = run->token_steer + (uint64_t)work->chunk.places[0].packed * copy.width;
        copy.x_stride = copy.width;
        RUN(work_upload(work, rows, 4 * (uint64_t)copy.n_rows * copy.width, &copy.x, error));
    }
    RUN(op_copy(&run->model->ops, &copy, error));
    return circuit_masks(run, 0, error);
}

/* Reads the metrics of those tokens of the chunk that the request names. */
static int finish(struct circuit_run *run, struct error *error) {
    struct run_work *work = run->work;
    const struct chunk *chunk = &work->chunk;
    const struct read_request *read = run->read;
    uint32_t first = 0, end, origin = chunk->places[0].packed, tile;
    while (first < read->n && read->tokens[first] < origin)
        first++;
    for (end = first; end < read->n && read->tokens[end] < origin + chunk->n_tokens; end++)
        ;
    if (first == end || run->n_logits == 0)
        return 0;
    uint32_t *tokens = malloc((end - first) * sizeof *tokens);
    uint64_t address;
    if (!tokens)
        return error_set(error, ERROR_MEMORY, "out of memory for metric tokens");
    for (uint32_t i = first; i < end; i++)
        tokens[i - first] = read->tokens[i] - origin;
    int failed = work_upload(work, tokens, (end - first) * sizeof *tokens, &address, error);
    free(tokens);
    RUN(failed);
    tile = read->distributions || read->logits ? read_tile(&run->model->facts) : chunk->n_tokens;
    /* Metrics take four floats for every token and entry: at most a quarter of the readback
     * memory. */
    if ((uint64_t)tile * run->n_logits > CIRCUIT_READBACK / 64)
        tile = CIRCUIT_READBACK / 64 > run->n_logits
                   ? (uint32_t)(CIRCUIT_READBACK / 64 / run->n_logits)
                   : 1;
    struct circuit_norm norm = {run->model->facts.norm, run->model->ln_final,
                                run->model->b_ln_final};
    for (uint32_t at = first, n; at < end; at += n) {
        n = end - at < tile ? end - at : tile;
        RUN(circuit_assemble(run, run->logit_entry, run->n_logits, norm,
                             address + 4 * (uint64_t)(at - first), n, error));
        if (read->pairs)
            RUN(read_pairs(work, &run->read_memory, read, at, n, run_address(run->normed),
                           run->n_logits, error));
        if (read->distributions)
            RUN(read_distributions(work, &run->read_memory, read, at, n, run_address(run->normed),
                                   run->n_logits, error));
        if (read->logits)
            RUN(read_logits(work, &run->read_memory, read, at, n, run_address(run->normed),
                            run->n_logits, error));
    }
    return 0;
}

static int hook_call(void *context, struct run_work *work, enum run_hook_point what, int layer,
                     uint64_t address, uint32_t stride, struct error *error) {
    struct circuit_run *run = context;
    int post_norms = run->model->facts.post_norms;
    if (what == HOOK_FINAL)
        return finish(run, error);
    if (layer < (int)run->first_layer)
        return 0;
    if (what == HOOK_QKV)
        return circuit_base_rows(run, layer, address, stride, error);
    if (what == HOOK_Z && layer == (int)run->first_layer)
        RUN(steer(run, error));
    if (what == HOOK_Z && !post_norms)
        return circuit_attention(run, layer, address, 0, error);
    /* With a post-norm its statistic is needed, too; work->z still holds the attention outputs. */
    if (what == HOOK_ATTN_RAW)
        return circuit_attention(run, layer, run_address(work->z), address, error);
    return what == HOOK_MLP_OUT ? circuit_mlp(run, layer, address, error) : 0;
}

int circuit_forward(struct circuit_run *run, struct run_cache *cache, const struct run_batch *batch,
                    const struct read_request *read, const uint8_t *mask, const float *token_steer,
                    struct error *error) {
    struct run_hook hook = {.context = run, .call = hook_call};
    if (!run->work)
        return error_set(error, ERROR_VALUE, "these circuits have no memory yet");
    if (cache->n_slots > run->n_slots || batch->first_layer > run->first_layer ||
        batch->stop_layer || batch->frozen)
        return error_set(
            error, ERROR_VALUE,
            "circuits from layer %u with %u slots do not fit a run from layer %u with %u",
            run->first_layer, run->n_slots, batch->first_layer, cache->n_slots);
    run->read = read;
    run->mask = mask;
    run->token_steer = token_steer;
    run->work->hook = &hook;
    int failed = run_forward(run->work, cache, batch, error);
    run->work->hook = NULL;
    run->read = NULL;
    run->mask = NULL;
    run->token_steer = NULL;
    return failed;
}
