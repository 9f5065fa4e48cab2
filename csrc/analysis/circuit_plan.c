/* Checks a plan of circuits and lays it out as tables. */
#include "analysis/circuit.h"

#include <stdlib.h>
#include <string.h>

/* first [n + 1] must ascend from 0 to total. */
static int firsts_check(const uint32_t *first, uint32_t n, uint32_t total, const char *what,
                        struct error *error) {
    for (uint32_t i = 0; i < n; i++)
        if (first[i] > first[i + 1])
            return error_set(error, ERROR_VALUE, "a plan whose %s descend at %u", what, i);
    return first[0] || first[n] != total
               ? error_set(error, ERROR_VALUE, "a plan whose %s do not end at %u", what, total)
               : 0;
}

static int state_entry_bad(const struct circuit_plan *plan, uint32_t input, uint32_t entry) {
    return entry != NO_DIFFERENCE &&
           entry >= plan->entry_first[input + 1] - plan->entry_first[input];
}

/* Checks rows [from, to) of n heads, whose inputs are input, input + 1, ... */
static int rows_check(const struct circuit_plan *plan, const uint32_t *rows, uint32_t from,
                      uint32_t to, uint32_t n, uint32_t input, struct error *error) {
    for (uint32_t r = from; r < to; r++)
        for (uint32_t h = 0; h < n; h++)
            if (state_entry_bad(plan, input + h, rows[(size_t)r * n + h]))
                return error_set(error, ERROR_VALUE,
                                 "row %u of a plan names an entry that does not exist", r);
    return 0;
}

/* Checks the states of layer first_layer + i, and its rows. */
static int states_check(const struct model_facts *f, const struct circuit_plan *plan, uint32_t i,
                        struct error *error) {
    uint32_t H = f->n_heads, G = f->n_kv_heads, input = i * (H + 2 * G + 1),
             wide = f->qk_norm == QK_NORM_WIDE;
    uint32_t n_q = plan->q_row_first[i + 1] - plan->q_row_first[i],
             n_k = plan->k_row_first[i + 1] - plan->k_row_first[i];
    if (!wide && n_q + n_k > 0)
        return error_set(error, ERROR_VALUE, "a plan with rows for a model without a norm of them");
    RUN(rows_check(plan, plan->q_rows, plan->q_row_first[i], plan->q_row_first[i + 1], H, input,
                   error));
    RUN(rows_check(plan, plan->k_rows, plan->k_row_first[i], plan->k_row_first[i + 1], G, input + H,
                   error));
    for (uint32_t s = plan->state_first[i]; s < plan->state_first[i + 1]; s++) {
        const uint32_t *state = plan->states + 4 * (size_t)s;
        uint32_t head = state[0], group = head / (H / G);
        int bad = head >= H || state_entry_bad(plan, input + H + G + group, state[3]);
        if (wide)
            bad = bad || (state[1] != NO_DIFFERENCE && state[1] >= n_q) ||
                  (state[2] != NO_DIFFERENCE && state[2] >= n_k);
        else
            bad = bad || state_entry_bad(plan, input + head, state[1]) ||
                  state_entry_bad(plan, input + H + group, state[2]);
        if (bad)
            return error_set(error, ERROR_VALUE,
                             "state %u of a plan names an entry that does not exist", s);
    }
    return 0;
}

/* Checks the states, outputs and variants of layer first_layer + i. */
static int layer_check(const struct model_facts *f, const struct circuit_plan *plan, uint32_t i,
                       struct error *error) {
    uint32_t n_states = plan->state_first[i + 1] - plan->state_first[i];
    uint32_t n_variants = plan->variant_first[i + 1] - plan->variant_first[i], head = 0;
    RUN(states_check(f, plan, i, error));
    for (uint32_t o = plan->output_first[i]; o < plan->output_first[i + 1]; o++) {
        const uint32_t *output = plan->outputs + 3 * (size_t)o;
        if (output[0] < head || output[0] >= f->n_heads ||
            (output[1] != NO_DIFFERENCE && output[1] >= n_states) ||
            (output[1] != NO_DIFFERENCE &&
             plan->states[4 * (size_t)(plan->state_first[i] + output[1])] != output[0]) ||
            (f->post_norms ? output[2] >= n_variants : output[1] == NO_DIFFERENCE))
            return error_set(error, ERROR_VALUE, "output %u of a plan is invalid", o);
        head = output[0];
    }
    for (size_t v = (size_t)plan->variant_first[i] * f->n_heads;
         v < (size_t)plan->variant_first[i + 1] * f->n_heads; v++)
        if (plan->variants[v] != NO_DIFFERENCE &&
            (plan->variants[v] >= n_states ||
             plan->states[4 * (size_t)(plan->state_first[i] + plan->variants[v])] !=
                 v % f->n_heads))
            return error_set(error, ERROR_VALUE,
                             "variant %zu of a plan names a state that does not exist", v);
    return 0;
}

int circuit_plan_check(const struct model_facts *f, const struct circuit_plan *plan,
                       struct error *error) {
    if (plan->first_layer >= f->n_layers)
        return error_set(error, ERROR_VALUE, "layer %u of %u", plan->first_layer, f->n_layers);
    uint32_t n = f->n_layers - plan->first_layer, w = f->n_heads + 2 * f->n_kv_heads + 1;
    if (firsts_check(plan->entry_first, n * w + 1, plan->n_entries, "inputs", error) ||
        firsts_check(plan->ref_first, plan->n_entries, plan->n_refs, "entries", error) ||
        firsts_check(plan->state_first, n, plan->n_states, "states", error) ||
        firsts_check(plan->output_first, n, plan->n_outputs, "outputs", error) ||
        firsts_check(plan->variant_first, n, plan->n_variants, "variants", error) ||
        firsts_check(plan->mask_first, 2 * n + 1, plan->n_masks, "masks", error) ||
        firsts_check(plan->q_row_first, n, plan->n_q_rows, "rows of queries", error) ||
        firsts_check(plan->k_row_first, n, plan->n_k_rows, "rows of keys", error))
        return -1;
    /* differences that exist at a stage, but for the masked ones; the first masked one */
    uint32_t made = 1, masked = 1 + plan->n_outputs;
    for (uint32_t i = 0; i < n; i++)
        masked += plan->entry_first[i * w + w] - plan->entry_first[i * w + w - 1];
    /* What a stage makes may be read from then on, in a parallel layer after the layer. */
    for (uint32_t stage = 0; stage < 2 * n + 1; stage++) {
        if (stage) {
            uint32_t i = (stage - 1) / 2, first = stage % 2 ? i * w : i * w + w - 1,
                     last = stage % 2 ? i * w + w - 1 : (i + 1) * w;
            uint32_t beside = f->parallel && stage % 2 == 0, /* the layer's own heads */
                readable = made - (beside ? plan->output_first[i + 1] - plan->output_first[i] : 0);
            for (uint32_t r = plan->ref_first[plan->entry_first[first]];
                 r < plan->ref_first[plan->entry_first[last]]; r++) {
                uint32_t difference = plan->refs[r];
                if (difference >= readable &&
                    (difference < masked ||
                     difference - masked >= plan->mask_first[stage - beside]))
                    return error_set(error, ERROR_VALUE,
                                     "reference %u of a plan reads difference %u too early", r,
                                     difference);
            }
            if (stage % 2)
                RUN(layer_check(f, plan, i, error));
            made += stage % 2 ? plan->output_first[i + 1] - plan->output_first[i]
                              : plan->entry_first[last] - plan->entry_first[first];
        }
        for (uint32_t m = plan->mask_first[stage]; m < plan->mask_first[stage + 1]; m++)
            if (plan->masks[m] >= made)
                return error_set(error, ERROR_VALUE,
                                 "mask %u of a plan reads difference %u too early", m,
                                 plan->masks[m]);
    }
    for (uint32_t r = plan->ref_first[plan->entry_first[n * w]]; r < plan->n_refs; r++)
        if (plan->refs[r] >= masked + plan->n_masks)
            return error_set(error, ERROR_VALUE, "reference %u of a plan reads difference %u of %u",
                             r, plan->refs[r], masked + plan->n_masks);
    return 0;
}

/* The index of the base run's query, key or value of a head in this layer, behind those of the
 * entries; *n counts both. A base run's value that no state names gets none. */
static uint32_t base_index(uint32_t *base, uint32_t i, uint32_t *n) {
    if (base[i] == NO_DIFFERENCE)
        base[i] = (*n)++;
    return base[i];
}

/* Writes entries of circuit_place_params for the n inputs from `from` on, which are all queries,
 * keys or values (`kind`), then those of the base run. Destinations are counted from 0 for each
 * kind. rows: the queries or keys of rows take the place of those of entries; NULL without rows.
 * Returns the end. */
static uint32_t *places_write(uint32_t *out, struct circuit_layer *layer,
                              const struct model_facts *f, uint32_t kind, uint32_t from, uint32_t n,
                              const struct circuit_rows *rows, const uint32_t *base) {
    const uint32_t *begin = out;
    for (uint32_t r = 0; rows && r < rows->n * n; r++, out += 4)
        memcpy(out, (uint32_t[]){kind, r / n, r % n * f->d_head, r}, 16);
    for (uint32_t i = from; i < from + n && !rows; i++) {
        uint32_t column = i * f->d_head % OP_PANEL, start = layer->input_first[from];
        for (uint32_t e = layer->input_first[i]; e < layer->input_first[i + 1]; e++, out += 4)
            memcpy(out, (uint32_t[]){kind, e, column, e - start}, 16);
    }
    for (uint32_t i = 0; i < n; i++)
        if (base[i] != NO_DIFFERENCE) {
            memcpy(out, (uint32_t[]){kind | PLACE_BASE, 0, (from + i) * f->d_head, base[i]}, 16);
            out += 4;
        }
    layer->n_places[kind] = (uint32_t)(out - begin) / 4;
    return out;
}

/* Writes entries of circuit_heads_params that gather rows [n, heads] of the inputs from `from` on;
 * returns the end. */
static uint32_t *rows_write(uint32_t *out, const uint32_t *words, struct circuit_rows *rows,
                            const struct circuit_layer *layer, const struct model_facts *f,
                            uint32_t from, const uint32_t *entries) {
    rows->table = (uint32_t)(out - words);
    for (uint32_t r = 0; r < rows->n; r++)
        for (uint32_t h = 0; h < rows->n_heads; h++, entries++, out += 4)
            memcpy(out,
                   (uint32_t[]){*entries == NO_DIFFERENCE ? NO_DIFFERENCE
                                                          : layer->input_first[from + h] + *entries,
                                h, r, (from + h) * f->d_head % OP_PANEL},
                   16);
    return out;
}

/* Writes to layer->states [n_states, 3] where the query, key and value of every state lie, and to
 * base [H + 2G] the indices of the base run's, or NO_DIFFERENCE. Counts all of them. */
static void states_resolve(struct circuit_layer *layer, const struct model_facts *f,
                           const uint32_t *states, uint32_t *resolved, uint32_t *base) {
    uint32_t H = f->n_heads, G = f->n_kv_heads, *q = base, *k = base + H, *v = base + H + G;
    const uint32_t *first = layer->input_first;
    int wide = f->qk_norm == QK_NORM_WIDE;
    for (uint32_t j = 0; j < H + 2 * G; j++)
        base[j] = NO_DIFFERENCE;
    layer->n_q = wide ? layer->q_rows.n * H : first[H];
    layer->n_k = wide ? layer->k_rows.n * G : first[H + G] - first[H];
    layer->n_v = layer->n_entries - first[H + G];
    layer->states = resolved;
    for (uint32_t s = 0; s < layer->n_states; s++, states += 4, resolved += 3) {
        uint32_t head = states[0], group = head / (H / G);
        uint32_t q_at = wide ? states[1] * H + head : first[head] + states[1],
                 k_at = wide ? states[2] * G + group : first[H + group] - first[H] + states[2],
                 v_at = first[H + G + group] - first[H + G] + states[3];
        resolved[0] = states[1] == NO_DIFFERENCE ? base_index(q, head, &layer->n_q) : q_at;
        resolved[1] = states[2] == NO_DIFFERENCE ? base_index(k, group, &layer->n_k) : k_at;
        resolved[2] = states[3] == NO_DIFFERENCE ? base_index(v, group, &layer->n_v) : v_at;
    }
}

/* Writes the layer's tables to run->words from `at` on and its states to `resolved`; returns the
 * end of the tables. */
static uint32_t layer_tables(struct circuit_run *run, const struct circuit_plan *plan, uint32_t i,
                             uint32_t *resolved, uint32_t at) {
    const struct model_facts *f = &run->model->facts;
    struct circuit_layer *layer = &run->layers[i];
    uint32_t H = f->n_heads, G = f->n_kv_heads, base[3 * 1024], *words = run->words;
    const struct circuit_rows *q_rows = NULL, *k_rows = NULL;
    if (f->qk_norm == QK_NORM_WIDE) {
        q_rows = &layer->q_rows;
        k_rows = &layer->k_rows;
    }
    states_resolve(layer, f, plan->states + 4 * (size_t)plan->state_first[i], resolved, base);
    layer->place_table = at;
    uint32_t *end = places_write(words + at, layer, f, PLACE_Q, 0, H, q_rows, base);
    end = places_write(end, layer, f, PLACE_K, H, G, k_rows, base + H);
    end = places_write(end, layer, f, PLACE_V, H + G, G, NULL, base + H + G);
    end = rows_write(end, words, &layer->q_rows, layer, f, 0,
                     plan->q_rows + (size_t)plan->q_row_first[i] * H);
    end = rows_write(end, words, &layer->k_rows, layer, f, H,
                     plan->k_rows + (size_t)plan->k_row_first[i] * G);
    layer->gather_table = (uint32_t)(end - words);
    for (uint32_t g = 0; g < layer->n_variants * H; g++, end += 4)
        memcpy(
            end,
            (uint32_t[]){plan->variants[(size_t)plan->variant_first[i] * H + g], g % H, g / H, 0},
            16);
    layer->output_table = (uint32_t)(end - words);
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

int circuit_layer_begin(struct circuit_run *run, const struct circuit_plan *plan, uint32_t i,
                        struct error *error) {
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
    layer->q_rows.n = plan->q_row_first[i + 1] - plan->q_row_first[i];
    layer->q_rows.n_heads = f->n_heads;
    layer->k_rows.n = plan->k_row_first[i + 1] - plan->k_row_first[i];
    layer->k_rows.n_heads = f->n_kv_heads;
    layer->difference = run->n_differences;
    run->n_differences += layer->n_outputs + layer->n_mlp;
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

int circuit_tables_make(struct circuit_run *run, const struct circuit_plan *plan,
                        struct error *error) {
    const struct model_facts *f = &run->model->facts;
    uint32_t w = run->n_inputs + 1;
    size_t size =
        (size_t)plan->n_entries + 1 + plan->n_refs +
        4 * ((size_t)plan->n_entries + (size_t)run->depth * run->n_inputs) +
        8 * ((size_t)plan->n_q_rows * f->n_heads + (size_t)plan->n_k_rows * f->n_kv_heads) +
        4 * (size_t)plan->n_variants * f->n_heads + 4 * (size_t)plan->n_outputs +
        3 * (size_t)plan->n_states;
    if (size > UINT32_MAX / 8 || f->n_heads + 2 * f->n_kv_heads > 3 * 1024)
        return error_set(error, ERROR_VALUE,
                         "a plan of %zu words is too large: evaluate fewer circuits at once", size);
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
    /* states stay on the host, behind the tables */
    uint32_t *resolved = run->words + size - 3 * (size_t)plan->n_states;
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
