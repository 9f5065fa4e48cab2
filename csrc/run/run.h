/* Running a model: batches of packed rows through the layers, with a key/value cache, captures and
 * edits at named sites. */
#ifndef VKSTEER_RUN_H
#define VKSTEER_RUN_H

#include "model/model.h"
#include "run/edits.h"
#include "run/sites.h"

struct run_work;

/* Keys and values of every layer: slot s of a layer holds the G * dh floats of one token. A row
 * owns a range of slots. */
struct run_cache {
    struct gpu_device *device;
    uint32_t n_layers, n_slots, first_layer;
    struct gpu_buffer **k, **v; /* [n_layers] */
    uint8_t *state;             /* [n_slots] RUN_CACHE_* */
};
#define RUN_CACHE_EDITED 1 /* something was added to what the model computed */
#define RUN_CACHE_LONG 2   /* its key was rotated by the table of texts beyond rope_switch */
/* first_layer: layers below it get no memory, so that only batches that resume at this layer or
 * above may use the cache. */
int run_cache_create(struct run_cache **out, struct model *model, uint32_t n_slots,
                     uint32_t first_layer, struct error *error);
void run_cache_destroy(struct run_cache *cache);
/* Copies keys and values of the n slots at `from` to each of n_to places, in layers >= first_layer:
 * a shared prefix is computed once. Ranges must not overlap. */
int run_cache_copy(struct run_work *work, struct run_cache *cache, uint32_t from,
                   const uint32_t *to, uint32_t n_to, uint32_t n, uint32_t first_layer,
                   struct error *error);
/* Notes that the model writes n slots from `first` on: what was added to them is gone where all
 * layers are written. */
void run_cache_written(struct run_cache *cache, uint32_t first, uint32_t n, int long_rotated,
                       int all_layers);
/* What is added to n slots: to slot slots[i] the addition values[which[i], :], where values are
 * float32 [n_values, keys or values, layers, G * dh] on the host. */
struct run_cache_additions {
    const uint32_t *slots, *which; /* [n] */
    uint32_t n, n_values;
    const float *values;
};
/* Adds once: a slot that has been edited is refused, also in a copy, until the model writes it
 * again. Zeros leave a slot bit-identical. The sum is rounded once, in float32. */
int run_cache_add(struct run_work *work, struct run_cache *cache,
                  const struct run_cache_additions *add, struct error *error);
/* Keys and values of n slots to the host, [keys or values, layers, n, G * dh]. */
int run_cache_read(struct run_work *work, const struct run_cache *cache, const uint32_t *slots,
                   uint32_t n, float *to, struct error *error);
uint64_t run_cache_bytes(const struct model_facts *facts, uint32_t n_slots, uint32_t first_layer);

/* Captured values go to the caller's zeroed array `to`: [n_out_rows, n_columns, W] for a site of
 * width W, [n_out_rows, H, n_columns, n_keys] for a site over keys. */
struct run_capture {
    int site, layer;
    float *to;
};

enum run_logits { RUN_LOGITS_NONE, RUN_LOGITS_LAST, RUN_LOGITS_ALL };

/* One batch. Row r brings n_tokens[r] new tokens at positions start[r], ...; its cache slots begin
 * at slot[r] (position 0). Rows of one group (consecutive rows with the same group number) have
 * equal lengths and advance together. */
struct run_batch {
    uint32_t n_rows;
    const uint32_t *tokens;                          /* packed, all rows */
    const uint32_t *n_tokens, *start, *slot, *group; /* [n_rows] */
    const uint32_t *edit_row; /* [n_rows] the row of the edit list that a row is */
    /* [n_rows] the rows whose patterns, values and MLP outputs a row takes in the frozen layers;
     * NULL: its own */
    const uint32_t *q_row, *v_row, *mlp_row;
    const uint8_t *frozen; /* [n_layers], NULL: none */
    const struct edit_list *edits;
    const struct run_capture *captures;
    uint32_t n_captures;
    enum run_logits logits_mode;
    float *logits;          /* ALL: [n_out_rows, n_columns, V]; LAST: [n_out_rows, V] */
    const int32_t *out_row; /* [n_rows] row of the output arrays, -1: none */
    /* [n_rows] output column of position p is column[r] + p (left padding) */
    const int32_t *column;
    const int32_t *key_column; /* [n_rows] the same for keys */
    uint32_t n_columns, n_keys;
    /* layers >= stop_layer, the final norm and the logits are left out; 0: nothing is */
    uint32_t stop_layer;
    /* layers < first_layer are not run: their output is `inputs`, the residual stream [all tokens,
     * D] packed as the tokens; NULL with first_layer 0 */
    uint32_t first_layer;
    const float *inputs;
    int decode; /* the phase: 1 where every row brings one token after its prompt, else 0 */
};

struct run_work; /* buffers for one chunk of tokens; one per model, reused */
/* capacity: tokens that go through the layers at once; backward needs the batch in one
 * chunk. readback: bytes of readback memory. */
int run_work_create(struct run_work **out, struct model *model, uint32_t capacity,
                    uint64_t readback, struct error *error);
void run_work_destroy(struct run_work *work);

/* Runs the batch through all layers. On error the cache's new slots are undefined,
 * everything else stays usable. */
int run_forward(struct run_work *work, struct run_cache *cache, const struct run_batch *batch,
                struct error *error);

/* Greedy decoding of several steps without the host: the token that each row picks, the one with
 * the largest logit (the first of equal ones), is its next step's. */
struct run_block {
    uint32_t n_steps; /* at least 1 */
    /* so many consecutive rows take the tokens that the first one picks: 2 where every row is
     * followed by its base run */
    uint32_t share;
    /* A row whose logits are not all finite, or whose first logit is `empty` within +-near, picks
     * -1 and goes on with token 0: the caller looks at its logits. */
    float empty, near;
};
/* picked: [n_steps, n_rows]. batch: the first step, in which every row brings one token after its
 * prompt (`decode`), without captures; at most a chunk of rows. Positions and slots of the others
 * follow. A row must not pass rope_switch in a block. The same tokens as by steps of run_forward.
 */
int run_decode_block(struct run_work *work, struct run_cache *cache, const struct run_batch *batch,
                     const struct run_block *block, float *picked, struct error *error);

/* y[n, :] = x[n, :] W^T for one of the model's matrices ("qkv", "o", ..., layer); arrays on the
 * host, [n, columns] and [n, rows]. */
int run_apply(struct run_work *work, const char *matrix, int layer, const float *x, uint32_t n,
              float *y, struct error *error);
/* Rows [first, first + n) of one of the model's matrices to the host, [n, columns], as
 * the device holds them. */
int run_rows_read(struct run_work *work, const char *matrix, int layer, uint32_t first, uint32_t n,
                  float *out, struct error *error);
/* Copies a vector (a gain with its offset, a bias) to the host. */
int run_vector_read(struct run_work *work, const char *name, int layer, float *out,
                    struct error *error);

/* memory.c: sizes that follow from the memory that was free on the device before the model was
 * made. Results are bit-identical whatever they are. */
struct run_sizes {
    uint32_t chunk;    /* tokens of one forward pass; longer batches are cut into chunks */
    uint64_t scratch;  /* bytes of the scores of one span of tokens, at least a query tile's */
    uint64_t readback; /* bytes of the model's readback memory */
};
struct run_sizes run_sizes_of(const struct model *model);
/* The functions below give device bytes, from the facts alone. Scores of a chunk of n_tokens whose
 * rows have up to n_keys keys: */
uint64_t run_scratch_bytes(const struct model_facts *facts, uint64_t scratch, uint32_t n_tokens,
                           uint32_t n_keys);
/* A run_work of `capacity` tokens with its scores and uploads. resumed: batches bring the residual
 * stream of all tokens. */
uint64_t run_work_bytes(const struct model_facts *facts, uint64_t scratch, uint32_t capacity,
                        uint32_t n_keys, uint64_t readback, int resumed);
/* What products of n_rows rows on matrix units split them in; it belongs to the model's ops. */
uint64_t run_split_bytes(const struct model_facts *facts, uint64_t n_rows, int backward);

#endif
