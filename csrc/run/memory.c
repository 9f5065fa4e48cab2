/* How much goes through the device at once, and the memory that it takes. */
#include "run/work.h"

/* Upper limits, by the kind of device: 512 rows keep a CPU's caches warm, but fill only part of a
 * GPU in the narrow products. */
static const struct run_sizes largest[] = {
    {2048, UINT64_C(128) << 20, UINT64_C(64) << 20},
    {512, UINT64_C(32) << 20, UINT64_C(64) << 20}, /* software */
};
/* Every group of frozen rows has a tile of OP_TILE tokens. */
static const struct run_sizes smallest = {64, UINT64_C(4) << 20, UINT64_C(16) << 20};

/* Bytes of the buffers [capacity, stride]. */
static uint64_t chunk_bytes(const struct model_facts *f, uint32_t capacity) {
    uint32_t heads = f->n_heads * f->d_head, kv = f->n_kv_heads * f->d_head;
    uint64_t floats = (f->parallel ? 5 : 4) * (uint64_t)op_row_stride(f->d_model) +
                      op_row_stride(heads + 2 * kv) + op_row_stride(heads) +
                      op_row_stride(work_gate_up_width(f)) + op_row_stride(f->d_mlp) + 1;
    return floats * capacity * 4;
}

static uint64_t between(uint64_t bytes, uint64_t least, uint64_t most) {
    return bytes < least ? least : bytes > most ? most : bytes;
}

struct run_sizes run_sizes_of(const struct model *model) {
    int software = gpu_device_get_info(model->ops.device)->type == GPU_SOFTWARE;
    uint64_t memory = model->memory;
    struct run_sizes sizes = largest[software];
    while (sizes.chunk > smallest.chunk && chunk_bytes(&model->facts, sizes.chunk) > memory / 16)
        sizes.chunk /= 2;
    sizes.scratch = between(memory / 64, smallest.scratch, sizes.scratch);
    sizes.readback = between(memory / 32, smallest.readback, sizes.readback);
    return sizes;
}

uint64_t run_scratch_bytes(const struct model_facts *f, uint64_t scratch, uint32_t n_tokens,
                           uint32_t n_keys) {
    uint64_t token = 4 * (uint64_t)f->n_heads * op_row_stride(n_keys), most = scratch / token;
    most = most > n_tokens ? n_tokens : most;
    return token * (most < OP_TILE ? OP_TILE : most);
}

/* One buffer holds the lists of a chunk; a residual stream that does not fit in has its own, and
 * another one follows. */
static uint64_t upload_bytes(const struct model_facts *f, uint32_t n_tokens, int resumed) {
    uint64_t lists = (uint64_t)n_tokens * (sizeof(struct token_meta) + sizeof(struct query_tile)),
             rows = 4 * (uint64_t)n_tokens * f->d_model;
    return resumed && lists + rows > WORK_UPLOAD_BYTES ? rows + 2 * WORK_UPLOAD_BYTES
                                                       : WORK_UPLOAD_BYTES;
}

uint64_t run_work_bytes(const struct model_facts *f, uint64_t scratch, uint32_t capacity,
                        uint32_t n_keys, uint64_t readback, int resumed) {
    return chunk_bytes(f, capacity) + readback + run_scratch_bytes(f, scratch, capacity, n_keys) +
           upload_bytes(f, capacity, resumed);
}

uint64_t run_split_bytes(const struct model_facts *f, uint64_t n_rows, int backward) {
    uint32_t heads = f->n_heads * f->d_head, kv = f->n_kv_heads * f->d_head;
    const uint32_t widths[] = {f->d_model, heads, f->d_mlp, backward ? heads + 2 * kv : 0,
                               backward ? work_gate_up_width(f) : 0};
    uint64_t most = 0;
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
        uint64_t bytes = op_split_bytes(n_rows, widths[i]);
        most = bytes > most ? bytes : most;
    }
    return most;
}
