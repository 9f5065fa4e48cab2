/* What a run works with: buffers for one chunk of tokens, upload memory and readback memory. Shared
 * by the files of csrc/run and csrc/analysis. */
#ifndef VKSTEER_WORK_H
#define VKSTEER_WORK_H

#include "run/run.h"

#define WORK_UPLOAD_BYTES (UINT64_C(1) << 20) /* of a buffer of uploads, or one upload's */

struct upload_buffer {
    struct gpu_buffer *buffer;
    uint64_t used;
    struct upload_buffer *next;
};

/* Captured or computed floats that wait in readback memory: those of token t lie at
 * offset + t * token_floats. */
struct readback {
    float *to;
    uint64_t offset;         /* floats from the start of the readback memory */
    uint32_t first, n;       /* tokens of the chunk (or, if by_row, entries of chunk.last_tokens) */
    uint32_t token_floats;   /* floats from token to token in readback memory */
    uint32_t n_heads, width; /* what to take of it: n_heads x width, heads `head_floats` apart */
    uint32_t head_floats;
    /* n consecutive runs of token_floats values that belong to no token, copied as they are */
    int plain;
    int by_row;    /* one value a row: the output has no column axis */
    int over_keys; /* scores or pattern: the output's last axis is keys */
    float masked;  /* over keys: the value of keys outside the query's causal window */
    uint32_t window;
};

struct token_place {
    uint32_t row, pos, packed;
}; /* packed: index into the batch's tokens */

/* Steps of decoding whose tokens stay on the device (decode_block.c). */
struct picks {
    uint32_t n_steps;
    /* [tokens of the chunk] as op_pick writes them: the ids of the tokens, which those after them
     * replace; their logits are not given out */
    uint64_t ids;
    uint32_t share; /* so many consecutive tokens take the first one's id */
    float empty, near;
};

/* The tokens that go through the layers together. */
struct chunk {
    const struct run_batch *batch;
    uint32_t n_tokens, n_tiles, n_last, max_keys;
    struct token_place *places;                                 /* [capacity] */
    uint64_t tokens, frozen_tokens, tiles, last_rows, mlp_rows; /* device addresses */
    struct query_tile *tile_list;                               /* [capacity] */
    /* [capacity] chunk tokens that end a row: their logits are computed in LAST mode */
    uint32_t *last_tokens;
    struct picks *picks; /* NULL: tokens come from the host and logits go there */
};

struct run_work {
    struct model *model;
    uint32_t capacity; /* tokens that a chunk may hold */
    /* scores and per-head results are computed in spans of tokens that take about so many bytes */
    uint64_t scratch;
    uint32_t d_stride, qkv_stride, z_stride, gate_up_stride, mlp_stride;
    struct gpu_buffer *x, *norm, *normalized, *scale, *qkv, *z, *out, *gate_up, *post;
    struct gpu_buffer *parallel_mid;               /* work_mid of models with parallel layers */
    struct gpu_buffer *scores, *result, *expanded; /* grown when needed */
    /* [V], made at first use (analysis/lens.c) */
    struct gpu_buffer *unembed_norms;
    /* of decode_block.c: token lists and ids, and logits [rows, V] that ids are picked from */
    struct gpu_buffer *block, *picked_from;
    struct gpu_buffer *readback;
    uint64_t readback_bytes, readback_used; /* bytes; floats */
    struct readback *pending;
    uint32_t n_pending, pending_capacity;
    struct upload_buffer *uploads;
    struct chunk chunk;
    /* Where the values of the layer being run lie: in buffers of this work or of a tape (tape.h).
     */
    uint64_t at_qkv, at_gate_up, at_out;
    struct run_tape *tape;       /* NULL: nothing is kept for a backward pass */
    const struct run_hook *hook; /* NULL: none */
};

/* The residual stream [T, d_stride] between attention and MLP: work->x itself, or in parallel
 * layers x + attention's output beside it, because the MLP reads x, too. */
static inline struct gpu_buffer *work_mid(const struct run_work *work) {
    return work->parallel_mid ? work->parallel_mid : work->x;
}

/* Points at which a hook receives the address of a value [T, stride] on the device, for what is
 * computed beside the run (csrc/analysis). */
enum run_hook_point {
    HOOK_QKV,      /* [q | k | v] before their norm and rotation */
    HOOK_Z,        /* attention outputs per head, before W_O */
    HOOK_ATTN_RAW, /* attention's output before the post-norm (post-norm models only) */
    HOOK_MLP_OUT,  /* what the MLP adds to the residual stream */
    HOOK_FINAL,    /* the residual stream after the last layer */
    /* backward pass, gradients with respect to: */
    HOOK_D_RESID_POST,
    HOOK_D_RESID_MID,
    HOOK_D_RESID_PRE, /* the residual stream */
    /* logits' input after / before norm and gain */
    HOOK_D_FINAL_NORMED,
    HOOK_D_FINAL_INPUT,
    /* the MLP's input after / before norm and gain, through the MLP alone */
    HOOK_D_MLP_NORMED,
    HOOK_D_MLP_INPUT,
    HOOK_D_QKV, /* q, k, v before norm per head and rotation */
};
struct run_hook {
    void *context;
    int (*call)(void *context, struct run_work *work, enum run_hook_point point, int layer,
                uint64_t address, uint32_t stride, struct error *error);
};
/* Calls the run's hook, if it has one. */
int run_hook_call(struct run_work *work, enum run_hook_point point, int layer, uint64_t address,
                  uint32_t stride, struct error *error);

/* Copies `bytes` to memory that kernels can read until the next upload_reset. */
int work_upload(struct run_work *work, const void *data, uint64_t bytes, uint64_t *address,
                struct error *error);
int work_upload_reset(struct run_work *work, struct error *error);
/* At least `bytes`, zeroed when (re)made; contents are lost then. */
int work_grow(struct run_work *work, struct gpu_buffer **buffer, uint64_t bytes, const char *name,
              struct error *error);
/* Reserves readback memory for *n tokens of token_floats, or for fewer where it is short (*n says
 * how many). Drains what is pending where it must. */
int work_readback_take(struct run_work *work, uint32_t *n, uint32_t token_floats, uint64_t *offset,
                       struct error *error);
int work_readback_push(struct run_work *work, const struct readback *readback, struct error *error);
/* Reserves readback memory for n floats: a kernel writes them at *address, and the next drain
 * copies them to `to` as they are. */
int work_readback_floats(struct run_work *work, uint32_t n, float *to, uint64_t *address,
                         struct error *error);
/* Waits for the device and copies every pending readback into its array. */
int work_readback_drain(struct run_work *work, struct error *error);

/* Columns of the product before the MLP's activation: gate and up, or up alone. */
static inline uint32_t work_gate_up_width(const struct model_facts *facts) {
    return facts->d_mlp << (facts->gated != 0);
}

/* forward.c: one chunk through all layers, then the logits. */
int run_layers(struct run_work *work, struct run_cache *cache, struct error *error);
/* decode_block.c: the steps of a block (chunk.picks). meta, frozen: the chunk's token lists at the
 * first step, [n_tokens]; frozen: NULL for none. */
int run_block_steps(struct run_work *work, struct run_cache *cache, const struct token_meta *meta,
                    const struct token_meta *frozen, struct error *error);
/* One layer on the residual stream in work->x, without the sites before and after it. */
int run_layer(struct run_work *work, struct run_cache *cache, int layer, struct error *error);
/* logits.c: work->norm = final norm of the residual stream in work->x, with its sites. */
int run_final_norm(struct run_work *work, struct error *error);
uint64_t run_address(const struct gpu_buffer *buffer); /* 0 for none */

/* chunks.c: the whole batch as one chunk, through the layers and the logits. work->chunk stays
 * valid (and the uploads, until the next work_upload_reset) so that a backward pass can follow.
 * Call run_one_chunk_end afterwards, also after a failure. */
int run_one_chunk(struct run_work *work, struct run_cache *cache, const struct run_batch *batch,
                  struct error *error);
void run_one_chunk_end(struct run_work *work, int failed);

/* query_spans.c: the queries of a layer whose scores are in scratch memory together: tiles
 * [tile, end) of a chunk, queries [first, first + n). key_stride: floats from head to head. */
struct query_span {
    uint32_t tile, end, first, n, key_stride;
};
/* Queries that fit the scratch memory, each with this many bytes of scores; at least a tile. */
uint32_t query_span_most(const struct run_work *work, uint64_t query_bytes);
/* Advances the span (zero at first) over the tiles, at most `most` queries at once; 0 at the end.
 */
int query_span_next(const struct query_tile *tiles, uint32_t n_tiles, uint32_t most,
                    struct query_span *span);

/* Which edits of a site act: all, those of EDIT_ADD_SCALED (nothing is captured yet), the others.
 */
enum site_edits { EDITS_ALL, EDITS_SCALED, EDITS_NOT_SCALED };

/* A site's values as they lie in memory. */
struct site_view {
    int site, layer;
    uint64_t address;
    uint32_t first, n_tokens; /* tokens of the chunk that the view holds */
    uint32_t token_stride, n_heads, head_stride, width;
    uint64_t scale; /* [n_tokens] of the norm before it, for EDIT_ADD_SCALED; 0: none */
    enum site_edits edits;
};
/* visit.c: does a site have edits or captures; its edits, then its captures. */
int site_wanted(const struct run_work *work, int site, int layer);
int site_edited(const struct run_work *work, int site, int layer);
/* Has a site an EDIT_ADD_SCALED? */
int site_scaled(const struct run_work *work, int site, int layer);
int site_visit(struct run_work *work, const struct site_view *view, struct error *error);
/* In the backward pass: the view holds the gradient with respect to the site's value after its
 * edits. It is captured (chunk.batch->captures), then becomes the gradient with respect to the
 * value before them. */
int site_visit_backward(struct run_work *work, const struct site_view *view, struct error *error);
struct site_view site_view_rows(const struct run_work *work, int site, int layer, uint64_t at,
                                uint32_t stride);

#endif
