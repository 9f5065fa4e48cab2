/* Circuits as tables: the plan checked and laid out, memory, and the pass that looks on while the base run goes by. */
#include "analysis/circuit.h"

#include <stdlib.h>
#include <string.h>

#define RUN(call) do { if (call) return -1; } while (0)
#define READBACK (UINT64_C(16) << 20)    /* metrics of a tile of tokens come back through it */
#define GROUP_BYTES (UINT64_C(32) << 20) /* normed inputs that are assembled at once, where one input alone needs less */
#define MLP_BYTES (UINT64_C(32) << 20)   /* gates, ups and activations of rows that go through an MLP at once */

/* --- the plan ------------------------------------------------------------------------------------------------------------------------ */

/* first[0..n]: ascending from 0 to total. */
static int firsts_check(const uint32_t *first, uint32_t n, uint32_t total, const char *what, struct error *error) {
    for (uint32_t i = 0; i < n; i++)
        if (first[i] > first[i + 1])
            return error_set(error, ERROR_VALUE, "a plan whose %s go back at %u", what, i);
    return first[0] || first[n] != total ? error_set(error, ERROR_VALUE, "a plan whose %s do not end at %u", what, total) : 0;
}

static int state_entry_bad(const struct circuit_plan *plan, uint32_t input, uint32_t entry) {
    return entry != NO_BLOCK && entry >= plan->entry_first[input + 1] - plan->entry_first[input];
}

static int layer_check(const struct model_facts *f, const struct circuit_plan *plan, uint32_t i, struct error *error) {
    uint32_t w = f->n_heads + 2 * f->n_kv_heads + 1, n_states = plan->state_first[i + 1] - plan->state_first[i];
    uint32_t n_variants = plan->variant_first[i + 1] - plan->variant_first[i], head = 0, share = f->n_heads / f->n_kv_heads;
    for (uint32_t s = plan->state_first[i]; s < plan->state_first[i + 1]; s++) {
        const uint32_t *state = plan->states + 4 * (size_t)s;
        if (state[0] >= f->n_heads || state_entry_bad(plan, i * w + state[0], state[1]) ||
            state_entry_bad(plan, i * w + f->n_heads + state[0] / share, state[2]) ||
            state_entry_bad(plan, i * w + f->n_heads + f->n_kv_heads + state[0] / share, state[3]))
            return error_set(error, ERROR_VALUE, "state %u of a plan names an entry that is not there", s);
    }
    for (uint32_t o = plan->output_first[i]; o < plan->output_first[i + 1]; o++) {
        const uint32_t *output = plan->outputs + 3 * (size_t)o;
        if (output[0] < head || output[0] >= f->n_heads || (output[1] != NO_BLOCK && output[1] >= n_states) ||
            (output[1] != NO_BLOCK && plan->states[4 * (size_t)(plan->state_first[i] + output[1])] != output[0]) ||
            (f->post_norms ? output[2] >= n_variants : output[1] == NO_BLOCK))
            return error_set(error, ERROR_VALUE, "output %u of a plan makes no sense", o);
        head = output[0];
    }
    for (size_t v = (size_t)plan->variant_first[i] * f->n_heads; v < (size_t)plan->variant_first[i + 1] * f->n_heads; v++)
        if (plan->variants[v] != NO_BLOCK && (plan->variants[v] >= n_states ||
                                             plan->states[4 * (size_t)(plan->state_first[i] + plan->variants[v])] != v % f->n_heads))
            return error_set(error, ERROR_VALUE, "variant %zu of a plan names a state that is not there", v);
    return 0;
}

static int plan_check(const struct model_facts *f, const struct circuit_plan *plan, struct error *error) {
    if (plan->first_layer >= f->n_layers)
        return error_set(error, ERROR_VALUE, "layer %u of %u", plan->first_layer, f->n_layers);
    uint32_t n = f->n_layers - plan->first_layer, w = f->n_heads + 2 * f->n_kv_heads + 1;
    if (firsts_check(plan->entry_first, n * w + 1, plan->n_entries, "inputs", error) ||
        firsts_check(plan->ref_first, plan->n_entries, plan->n_refs, "entries", error) ||
        firsts_check(plan->state_first, n, plan->n_states, "states", error) || firsts_check(plan->output_first, n, plan->n_outputs, "outputs", error) ||
        firsts_check(plan->variant_first, n, plan->n_variants, "variants", error) ||
        firsts_check(plan->mask_first, 2 * n + 1, plan->n_masks, "masks", error))
        return -1;
    uint32_t made = 1, mask_block = 1 + plan->n_outputs;
    for (uint32_t i = 0; i < n; i++)
        mask_block += plan->entry_first[i * w + w] - plan->entry_first[i * w + w - 1];
    for (uint32_t stage = 0; stage < 2 * n + 1; stage++) { /* what stage makes may be read from then on */
        if (stage) {
            uint32_t i = (stage - 1) / 2, first = stage % 2 ? i * w : i * w + w - 1, last = stage % 2 ? i * w + w - 1 : (i + 1) * w;
            for (uint32_t r = plan->ref_first[plan->entry_first[first]]; r < plan->ref_first[plan->entry_first[last]]; r++) {
                uint32_t block = plan->refs[r];
                if (block >= made && (block < mask_block || block - mask_block >= plan->mask_first[stage]))
                    return error_set(error, ERROR_VALUE, "reference %u of a plan reads block %u too early", r, block);
            }
            if (stage % 2)
                RUN(layer_check(f, plan, i, error));
            made += stage % 2 ? plan->output_first[i + 1] - plan->output_first[i] : plan->entry_first[last] - plan->entry_first[first];
        }
        for (uint32_t m = plan->mask_first[stage]; m < plan->mask_first[stage + 1]; m++)
            if (plan->masks[m] >= made)
                return error_set(error, ERROR_VALUE, "mask %u of a plan reads block %u too early", m, plan->masks[m]);
    }
    for (uint32_t r = plan->ref_first[plan->entry_first[n * w]]; r < plan->n_refs; r++)
        if (plan->refs[r] >= mask_block + plan->n_masks)
            return error_set(error, ERROR_VALUE, "reference %u of a plan reads block %u of %u", r, plan->refs[r], mask_block + plan->n_masks);
    return 0;
}

/* --- tables -------------------------------------------------------------------------------------------------------------------------- */

/* Blocks of the base run's queries, keys and values that states name; counts go on from the entries' own. */
struct base_blocks { uint32_t *q, *k, *v; };

static uint32_t base_block(uint32_t *blocks, uint32_t i, uint32_t *n) {
    if (blocks[i] == NO_BLOCK)
        blocks[i] = (*n)++;
    return blocks[i];
}

/* Entries of circuit_place for inputs [from, to) and, behind them, base blocks. Every kind counts its blocks from 0. */
static uint32_t *places_write(uint32_t *out, const struct circuit_layer *layer, const struct model_facts *f, uint32_t kind, uint32_t from, uint32_t n,
                              const uint32_t *base) {
    for (uint32_t i = from; i < from + n; i++) {
        uint32_t column = i * f->d_head % OP_PANEL, start = layer->input_first[from];
        for (uint32_t e = layer->input_first[i]; e < layer->input_first[i + 1]; e++, out += 4)
            memcpy(out, (uint32_t[]){kind, e, column, e - start}, 16);
    }
    for (uint32_t i = 0; i < n; i++)
        if (base[i] != NO_BLOCK) {
            memcpy(out, (uint32_t[]){kind | PLACE_BASE, 0, (from + i) * f->d_head, base[i]}, 16);
            out += 4;
        }
    return out;
}

/* The layer's tables into words from `at` on; returns where they end. */
static uint32_t layer_tables(struct circuit_run *run, const struct circuit_plan *plan, uint32_t i, uint32_t *resolved, uint32_t at) {
    const struct model_facts *f = &run->model->facts;
    struct circuit_layer *layer = &run->layers[i];
    uint32_t H = f->n_heads, G = f->n_kv_heads, base[3 * 1024], *words = run->words;
    uint32_t *q = base, *k = base + H, *v = base + H + G;
    for (uint32_t j = 0; j < H + 2 * G; j++)
        base[j] = NO_BLOCK;
    layer->n_q = layer->input_first[H];
    layer->n_k = layer->input_first[H + G] - layer->input_first[H];
    layer->n_v = layer->n_entries - layer->input_first[H + G];
    layer->states = resolved;
    for (uint32_t s = 0; s < layer->n_states; s++) {
        const uint32_t *state = plan->states + 4 * (size_t)(plan->state_first[i] + s);
        uint32_t head = state[0], group = head / (H / G);
        resolved[3 * s] = state[1] == NO_BLOCK ? base_block(q, head, &layer->n_q) : layer->input_first[head] + state[1];
        resolved[3 * s + 1] = state[2] == NO_BLOCK ? base_block(k, group, &layer->n_k) : layer->input_first[H + group] - layer->input_first[H] + state[2];
        resolved[3 * s + 2] = state[3] == NO_BLOCK ? base_block(v, group, &layer->n_v)
                                                   : layer->input_first[H + G + group] - layer->input_first[H + G] + state[3];
    }
    layer->places = at;
    uint32_t *end = places_write(words + at, layer, f, PLACE_Q, 0, H, q);
    end = places_write(end, layer, f, PLACE_K, H, G, k);
    end = places_write(end, layer, f, PLACE_V, H + G, G, v);
    layer->n_places = (uint32_t)(end - words - at) / 4;
    layer->gathers = (uint32_t)(end - words);
    for (uint32_t g = 0; g < layer->n_variants * H; g++, end += 4)
        memcpy(end, (uint32_t[]){plan->variants[(size_t)plan->variant_first[i] * H + g], g % H, g / H, 0}, 16);
    layer->differences = (uint32_t)(end - words);
    for (uint32_t o = 0; o < layer->n_outputs; o++, end += 4) {
        const uint32_t *output = plan->outputs + 3 * (size_t)(plan->output_first[i] + o);
        memcpy(end, (uint32_t[]){output[1], output[0], o, f->post_norms ? output[2] : 0}, 16);
    }
    return (uint32_t)(end - words);
}

static void *copied(const void *data, size_t bytes) {
    void *copy = malloc(bytes ? bytes : 1);
    if (copy && bytes)
        memcpy(copy, data, bytes);
    return copy;
}

static int layer_begin(struct circuit_run *run, const struct circuit_plan *plan, uint32_t i, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    struct circuit_layer *layer = &run->layers[i];
    uint32_t n_inputs = run->n_inputs, w = n_inputs + 1;
    layer->entry = plan->entry_first[i * w];
    layer->mlp_entry = plan->entry_first[i * w + n_inputs];
    layer->n_entries = layer->mlp_entry - layer->entry;
    layer->n_mlp = plan->entry_first[(i + 1) * w] - layer->mlp_entry;
    layer->n_states = plan->state_first[i + 1] - plan->state_first[i];
    layer->n_outputs = plan->output_first[i + 1] - plan->output_first[i];
    layer->n_variants = plan->variant_first[i + 1] - plan->variant_first[i];
    layer->block = run->n_blocks;
    run->n_blocks += layer->n_outputs + layer->n_mlp;
    layer->input_first = malloc((n_inputs + 1) * sizeof *layer->input_first);
    layer->output_first = calloc(f->n_heads + 1, sizeof *layer->output_first);
    if (!layer->input_first || !layer->output_first)
        return error_set(error, ERROR_MEMORY, "out of memory for circuits");
    for (uint32_t j = 0; j <= n_inputs; j++)
        layer->input_first[j] = plan->entry_first[i * w + j] - layer->entry;
    for (uint32_t o = plan->output_first[i]; o < plan->output_first[i + 1]; o++)
        layer->output_first[plan->outputs[3 * (size_t)o] + 1]++;
    for (uint32_t h = 0; h < f->n_heads; h++)
        layer->output_first[h + 1] += layer->output_first[h];
    return 0;
}

static int tables_make(struct circuit_run *run, const struct circuit_plan *plan, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    uint32_t w = run->n_inputs + 1;
    size_t size = (size_t)plan->n_entries + 1 + plan->n_refs + 4 * ((size_t)plan->n_entries + (size_t)run->depth * run->n_inputs) +
                  4 * (size_t)plan->n_variants * f->n_heads + 4 * (size_t)plan->n_outputs + 3 * (size_t)plan->n_states;
    if (size > UINT32_MAX / 8 || f->n_heads + 2 * f->n_kv_heads > 3 * 1024)
        return error_set(error, ERROR_VALUE, "a plan of %zu words is too large: evaluate fewer circuits at once", size);
    run->words = malloc(size * sizeof *run->words);
    run->mask_first = copied(plan->mask_first, (2 * (size_t)run->depth + 2) * 4);
    run->masks = copied(plan->masks, plan->n_masks * (size_t)4);
    if (!run->words || !run->mask_first || !run->masks)
        return error_set(error, ERROR_MEMORY, "out of memory for circuits");
    memcpy(run->words, plan->ref_first, (plan->n_entries + 1) * (size_t)4);
    run->refs = plan->n_entries + 1;
    if (plan->n_refs)
        memcpy(run->words + run->refs, plan->refs, plan->n_refs * (size_t)4);
    uint32_t at = run->refs + plan->n_refs;
    uint32_t *resolved = run->words + size - 3 * (size_t)plan->n_states; /* the device does not get these */
    for (uint32_t i = 0; i < run->depth; i++) {
        at = layer_tables(run, plan, i, resolved, at);
        resolved += 3 * (size_t)run->layers[i].n_states;
    }
    run->n_words = at;
    for (uint32_t j = 0; j < run->depth * w + 1; j++)
        if (plan->entry_first[j + 1] - plan->entry_first[j] > run->most_entries)
            run->most_entries = plan->entry_first[j + 1] - plan->entry_first[j];
    return 0;
}

int circuit_create(struct circuit_run **out, struct model *model, const struct circuit_plan *plan, struct error *error) {
    const struct model_facts *f = &model->facts;
    *out = NULL;
    if (plan_check(f, plan, error))
        return -1;
    struct circuit_run *run = calloc(1, sizeof *run);
    if (!run)
        return error_set(error, ERROR_MEMORY, "out of memory for circuits");
    run->model = model;
    run->first_layer = plan->first_layer;
    run->depth = f->n_layers - plan->first_layer;
    run->n_inputs = f->n_heads + 2 * f->n_kv_heads;
    run->n_blocks = 1;
    run->n_entries = plan->n_entries;
    run->logit_entry = plan->entry_first[run->depth * (run->n_inputs + 1)];
    run->n_logits = plan->n_entries - run->logit_entry;
    run->z_stride = op_row_stride(f->d_head);
    run->heads_stride = f->d_head % 16 ? op_row_stride(f->n_heads * f->d_head) : run->z_stride;
    for (uint32_t i = 0; i < run->n_inputs; i++) { /* whole panels are multiplied: as wide as the widest input's */
        uint32_t columns = (i * f->d_head % OP_PANEL + f->d_head + OP_PANEL - 1) / OP_PANEL * OP_PANEL;
        if (op_row_stride(columns) > run->product_stride)
            run->product_stride = op_row_stride(columns);
    }
    run->layers = calloc(run->depth, sizeof *run->layers);
    int failed = run->layers ? 0 : error_set(error, ERROR_MEMORY, "out of memory for circuits");
    for (uint32_t i = 0; i < run->depth && !failed; i++)
        failed = layer_begin(run, plan, i, error);
    run->mask_block = run->n_blocks;
    run->n_masks = plan->n_masks;
    run->n_blocks += plan->n_masks;
    if (failed || tables_make(run, plan, error)) {
        circuit_destroy(run);
        return -1;
    }
    *out = run;
    return 0;
}

/* --- memory -------------------------------------------------------------------------------------------------------------------------- */

static uint32_t most(const struct circuit_run *run, size_t offset) {
    uint32_t n = 1;
    for (uint32_t i = 0; i < run->depth; i++) {
        uint32_t here;
        memcpy(&here, (const char *)&run->layers[i] + offset, sizeof here);
        n = here > n ? here : n;
    }
    return n;
}
#define MOST(run, field) most(run, offsetof(struct circuit_layer, field))

static uint32_t entries_at_once(const struct circuit_run *run, uint32_t capacity) {
    uint64_t room = GROUP_BYTES / (4 * (uint64_t)capacity * op_row_stride(run->model->facts.d_model));
    uint32_t n = run->most_entries ? run->most_entries : 1, all = MOST(run, n_entries);
    return room < n ? n : room > all ? (all > n ? all : n) : (uint32_t)room;
}

static uint32_t mlp_rows_at_once(const struct circuit_run *run, uint32_t capacity) {
    const struct model_facts *f = &run->model->facts;
    uint64_t rows = MLP_BYTES / (4 * ((uint64_t)op_row_stride(2 * f->d_mlp) + op_row_stride(f->d_mlp))), all = (uint64_t)MOST(run, n_mlp) * capacity;
    rows = rows < 64 ? 64 : rows > 32768 ? 32768 : rows;
    return (uint32_t)(rows < all ? rows : all);
}

struct wanted { struct gpu_buffer **buffer; uint64_t bytes; const char *name; };

/* All buffers but the caches, and how large they are. */
static int buffers_list(struct circuit_run *run, uint32_t capacity, struct wanted *wanted) {
    const struct model_facts *f = &run->model->facts;
    uint64_t token = 4 * (uint64_t)capacity, d = op_row_stride(f->d_model), variants = f->post_norms ? MOST(run, n_variants) : 0;
    uint32_t mlp = mlp_rows_at_once(run, capacity);
    const struct wanted all[] = {
        {&run->tables, 4 * (uint64_t)run->n_words, "circuits' tables"}, {&run->steer, 4 * d, "steering"},
        {&run->d, token * run->n_blocks * d + 4 * d, "differences of nodes"}, /* and a zero row */
        {&run->normed, token * entries_at_once(run, capacity) * d, "circuits' inputs"},
        {&run->product, token * MOST(run, n_entries) * run->product_stride, "circuits' products"},
        {&run->q, token * MOST(run, n_q) * run->z_stride, "circuits' queries"}, {&run->z, token * MOST(run, n_states) * run->z_stride, "circuits' mixes"},
        {&run->heads, token * MOST(run, n_outputs) * run->heads_stride, "circuits' heads"},
        {&run->gathered, token * variants * op_row_stride(f->n_heads * f->d_head), "circuits' rows of heads"},
        {&run->raw, token * variants * d, "circuits' attention"}, {&run->scale, token * (variants + 1), "circuits' scales"},
        {&run->gate_up, 4 * (uint64_t)mlp * op_row_stride(2 * f->d_mlp), "circuits' gates"},
        {&run->post, 4 * (uint64_t)mlp * op_row_stride(f->d_mlp), "circuits' activations"}, {&run->scores, WORK_SCRATCH, "circuits' scores"}};
    memcpy(wanted, all, sizeof all);
    return sizeof all / sizeof all[0];
}

uint64_t circuit_bytes(const struct circuit_run *run, uint32_t capacity, uint32_t n_slots, uint64_t *largest) {
    const struct model_facts *f = &run->model->facts;
    struct wanted wanted[16];
    int n = buffers_list((struct circuit_run *)run, capacity, wanted);
    uint64_t total = run_work_bytes(f, capacity, READBACK) + read_bytes(f) + 8 * (uint64_t)capacity * op_row_stride(f->d_model) + run_cache_bytes(f, n_slots, 0);
    *largest = 4 * (uint64_t)n_slots * f->d_head * (MOST(run, n_k) > MOST(run, n_v) ? MOST(run, n_k) : MOST(run, n_v));
    for (int i = 0; i < n; i++) {
        total += wanted[i].bytes;
        *largest = wanted[i].bytes > *largest ? wanted[i].bytes : *largest;
    }
    for (uint32_t i = 0; i < run->depth; i++) /* the caches, and the token lists of attention */
        total += 4 * (uint64_t)n_slots * f->d_head * (run->layers[i].n_k + run->layers[i].n_v) +
                 (uint64_t)capacity * run->layers[i].n_states * (sizeof(struct token_meta) + sizeof(struct query_tile));
    return total;
}

static int zeroed(struct circuit_run *run, struct gpu_buffer **out, uint64_t bytes, const char *name, struct error *error) {
    if (bytes == 0)
        return 0;
    if (gpu_buffer_create(out, run->model->ops.device, bytes, GPU_DEVICE_LOCAL, name, error))
        return -1;
    return gpu_stream_zero(run->model->ops.stream, *out, 0, gpu_buffer_size(*out), error);
}

/* Words and the steering vector: copied as bytes, because a kernel that copies floats may flush what looks like a tiny one. */
static int bytes_upload(struct circuit_run *run, const void *data, uint64_t bytes, struct gpu_buffer *to, struct error *error) {
    struct gpu_buffer *from;
    if (gpu_buffer_create(&from, run->model->ops.device, bytes, GPU_UPLOAD, "circuits' upload", error))
        return -1;
    memcpy(gpu_buffer_map(from), data, bytes);
    int failed = gpu_stream_copy(run->model->ops.stream, from, 0, to, 0, bytes, error) || gpu_stream_wait(run->model->ops.stream, error);
    if (failed)
        gpu_stream_abandon(run->model->ops.stream);
    gpu_buffer_destroy(from);
    return failed ? -1 : 0;
}

int circuit_reserve(struct circuit_run *run, uint32_t capacity, uint32_t n_slots, const float *steer, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    struct wanted wanted[16];
    if (run->work)
        return error_set(error, ERROR_VALUE, "these circuits have their memory already");
    int n = buffers_list(run, capacity, wanted);
    run->capacity = capacity;
    run->n_slots = n_slots;
    run->assembled = entries_at_once(run, capacity);
    run->mlp_rows = mlp_rows_at_once(run, capacity);
    if (run_work_create(&run->work, run->model, capacity, READBACK, error))
        return -1;
    for (int i = 0; i < n; i++)
        if (zeroed(run, wanted[i].buffer, wanted[i].bytes, wanted[i].name, error))
            goto fail;
    for (uint32_t i = 0; i < run->depth; i++) {
        struct circuit_layer *layer = &run->layers[i];
        uint64_t region = 4 * (uint64_t)n_slots * f->d_head;
        if (zeroed(run, &layer->k, region * layer->n_k, "circuits' keys", error) || zeroed(run, &layer->v, region * layer->n_v, "circuits' values", error))
            goto fail;
    }
    if (bytes_upload(run, run->words, 4 * (uint64_t)run->n_words, run->tables, error) ||
        bytes_upload(run, steer, 4 * (uint64_t)f->d_model, run->steer, error))
        goto fail;
    return 0;
fail:
    gpu_stream_abandon(run->model->ops.stream);
    return -1;
}

void circuit_destroy(struct circuit_run *run) {
    if (!run)
        return;
    if (run->work && run->model)
        gpu_stream_wait(run->model->ops.stream, NULL);
    struct gpu_buffer *buffers[] = {run->tables, run->d, run->normed, run->product, run->q, run->z, run->heads, run->gathered, run->raw, run->scale,
                                    run->gate_up, run->post, run->scores, run->steer};
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

/* --- the pass ------------------------------------------------------------------------------------------------------------------------ */

uint64_t circuit_block(const struct circuit_run *run, uint32_t block) {
    return run_address(run->d) + 4 * (uint64_t)block * run->work->chunk.n_tokens * run->work->d_stride;
}

int circuit_assemble(struct circuit_run *run, uint32_t entry, uint32_t n, uint64_t gain, uint64_t tokens, uint32_t n_tokens, struct error *error) {
    struct run_work *work = run->work;
    uint64_t tables = run_address(run->tables);
    struct circuit_inputs_params params = {.x = run_address(work->x), .d = run_address(run->d), .refs = tables + 4 * (uint64_t)run->refs,
                                           .first = tables + 4 * (uint64_t)entry, .tokens = tokens, .gain = gain, .dst = run_address(run->normed),
                                           .all_tokens = !tokens, .n_tokens = n_tokens, .n_chunk = work->chunk.n_tokens,
                                           .width = run->model->facts.d_model, .stride = work->d_stride, .eps = run->model->facts.norm_eps};
    return op_circuit_inputs(&run->model->ops, &params, n, run->words[entry + n] - run->words[entry], error);
}

/* Masked copies of what this stage made: rows of tokens outside the mask are those of a zero row behind all blocks. */
int circuit_masks(struct circuit_run *run, uint32_t stage, struct error *error) {
    struct run_work *work = run->work;
    const struct chunk *chunk = &work->chunk;
    uint32_t *rows = NULL, first = run->mask_first[stage], end = run->mask_first[stage + 1], zero = run->n_blocks * run->capacity;
    if (first == end)
        return 0;
    rows = malloc(chunk->n_tokens * sizeof *rows);
    int failed = rows ? 0 : error_set(error, ERROR_MEMORY, "out of memory for masks");
    for (uint32_t m = first; m < end && !failed; m++) {
        uint64_t address;
        for (uint32_t t = 0; t < chunk->n_tokens; t++)
            rows[t] = run->mask && !run->mask[chunk->places[t].packed] ? zero : run->masks[m] * chunk->n_tokens + t;
        failed = work_upload(work, rows, chunk->n_tokens * sizeof *rows, &address, error);
        struct copy_params copy = {.x = run_address(run->d), .dst = circuit_block(run, run->mask_block + m), .rows = address, .n_rows = chunk->n_tokens,
                                   .width = run->model->facts.d_model, .x_stride = work->d_stride, .out_stride = work->d_stride, .flags = COPY_ROWS};
        failed = failed || op_copy(&run->model->ops, &copy, error);
    }
    free(rows);
    return failed ? -1 : 0;
}

static int steer(struct circuit_run *run, struct error *error) {
    struct run_work *work = run->work;
    struct copy_params copy = {.x = run_address(run->steer), .dst = circuit_block(run, 0), .n_rows = work->chunk.n_tokens,
                               .width = run->model->facts.d_model, .x_stride = 0, .out_stride = work->d_stride};
    RUN(op_copy(&run->model->ops, &copy, error));
    return circuit_masks(run, 0, error);
}

/* Logits of the tokens of this chunk that the request names. */
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
    tile = read->whole || read->logits ? read_tile(&run->model->facts) : chunk->n_tokens;
    if ((uint64_t)tile * run->n_logits > READBACK / 64) /* four floats of every token and entry, and room to spare */
        tile = READBACK / 64 > run->n_logits ? (uint32_t)(READBACK / 64 / run->n_logits) : 1;
    for (uint32_t at = first, n; at < end; at += n) {
        n = end - at < tile ? end - at : tile;
        RUN(circuit_assemble(run, run->logit_entry, run->n_logits, run->model->ln_final, address + 4 * (uint64_t)(at - first), n, error));
        if (read->pairs)
            RUN(read_pairs(work, &run->read_memory, read, at, n, run_address(run->normed), run->n_logits, error));
        if (read->whole)
            RUN(read_whole(work, &run->read_memory, read, at, n, run_address(run->normed), run->n_logits, error));
        if (read->logits)
            RUN(read_logits(work, &run->read_memory, read, at, n, run_address(run->normed), run->n_logits, error));
    }
    return 0;
}

static int see(void *context, struct run_work *work, enum run_seen what, int layer, uint64_t address, uint32_t stride, struct error *error) {
    struct circuit_run *run = context;
    int post_norms = run->model->facts.post_norms;
    (void)stride;
    if (what == SEEN_FINAL)
        return finish(run, error);
    if (layer < (int)run->first_layer)
        return 0;
    if (what == SEEN_Z && layer == (int)run->first_layer)
        RUN(steer(run, error));
    if (what == SEEN_Z && !post_norms)
        return circuit_attention(run, layer, address, 0, error);
    if (what == SEEN_ATTN_RAW) /* a post-norm's statistic is needed, too; the mixes are still there */
        return circuit_attention(run, layer, run_address(work->z), address, error);
    return what == SEEN_MLP_OUT ? circuit_mlp(run, layer, address, error) : 0;
}

int circuit_forward(struct circuit_run *run, struct run_cache *cache, const struct run_batch *batch, const struct read_request *read, const uint8_t *mask,
                    struct error *error) {
    struct run_observer observer = {.context = run, .see = see};
    if (!run->work)
        return error_set(error, ERROR_VALUE, "these circuits have no memory yet");
    if (cache->n_slots > run->n_slots || batch->first_layer > run->first_layer || batch->frozen)
        return error_set(error, ERROR_VALUE, "circuits from layer %u with %u slots do not fit a run from layer %u with %u", run->first_layer, run->n_slots,
                         batch->first_layer, cache->n_slots);
    run->read = read;
    run->mask = mask;
    run->work->observer = &observer;
    int failed = run_forward(run->work, cache, batch, error);
    run->work->observer = NULL;
    run->read = NULL;
    run->mask = NULL;
    return failed;
}
