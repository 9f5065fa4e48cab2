/* The memory of circuits: its size and its allocation. */
#include "analysis/circuit.h"

#include <string.h>

/* Inputs of several heads are assembled together up to this size. */
#define GROUP_BYTES (UINT64_C(32) << 20)
/* gates, ups and activations of the rows that an MLP computes at once */
#define MLP_BYTES (UINT64_C(32) << 20)

/* The largest value of a field (at `offset`) of all layers, at least 1. */
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

/* Entries that are assembled together: at least those of the largest input. */
static uint32_t entries_at_once(const struct circuit_run *run, uint32_t capacity) {
    uint64_t room = GROUP_BYTES /
                    (4 * (uint64_t)capacity * op_row_stride(run->model->facts.d_model));
    uint32_t n = run->most_entries ? run->most_entries : 1, all = MOST(run, n_entries);
    return room < n ? n : room > all ? (all > n ? all : n) : (uint32_t)room;
}

static uint32_t mlp_rows_at_once(const struct circuit_run *run, uint32_t capacity) {
    const struct model_facts *f = &run->model->facts;
    uint64_t rows = MLP_BYTES / (4 * ((uint64_t)op_row_stride(f->d_mlp << (f->gated != 0)) +
                                      op_row_stride(f->d_mlp))),
             all = (uint64_t)MOST(run, n_mlp) * capacity;
    rows = rows < 64 ? 64 : rows > 32768 ? 32768 : rows;
    return (uint32_t)(rows < all ? rows : all);
}

/* Attention scores of as many states of tokens as fit into the scratch memory. */
static uint64_t scores_bytes(const struct circuit_run *run, uint32_t capacity, uint32_t longest) {
    struct model_facts one_head = {.n_heads = 1};
    uint64_t n = (uint64_t)MOST(run, n_states) * capacity;
    return run_scratch_bytes(&one_head, run_sizes_of(run->model).scratch,
                             n < CIRCUIT_ROWS_A_GRID ? (uint32_t)n : CIRCUIT_ROWS_A_GRID, longest);
}

/* Split rows of products on matrix units; 0 with other kernels. */
static uint64_t split_bytes(const struct circuit_run *run, uint32_t capacity) {
    uint64_t rows = capacity * (uint64_t)MOST(run, n_entries),
             mlp = mlp_rows_at_once(run, capacity);
    return run->model->ops.kernel_family == LINEAR_MATRIX
               ? run_split_bytes(&run->model->facts, rows > mlp ? rows : mlp, 0)
               : 0;
}

/* Buffers of uploads for the token lists of attention in all layers of a chunk, as work_upload
 * makes them. */
static uint64_t lists_bytes(const struct circuit_run *run, uint32_t capacity) {
    uint64_t total = 0, room = 0;
    for (uint32_t i = 0; i < 2 * run->depth; i++) {
        uint64_t states = (uint64_t)run->layers[i / 2].n_states * capacity,
                 bytes = states *
                         (i % 2 ? sizeof(struct query_tile) / OP_TILE : sizeof(struct token_meta)),
                 size = bytes > WORK_UPLOAD_BYTES ? bytes : WORK_UPLOAD_BYTES;
        if (bytes > room) {
            total += size;
            room = size;
        }
        room -= bytes;
    }
    return total;
}

#define BUFFERS_MOST 20
/* A buffer and its size. */
struct memory {
    struct gpu_buffer **buffer;
    uint64_t bytes;
    const char *name;
};

/* Lists all buffers but the caches; returns their number. */
static int buffers_list(struct circuit_run *run, uint32_t capacity, uint32_t longest,
                        struct memory *memory) {
    const struct model_facts *f = &run->model->facts;
    uint64_t token = 4 * (uint64_t)capacity, d = op_row_stride(f->d_model),
             variants = f->post_norms ? MOST(run, n_variants) : 0;
    uint32_t mlp = mlp_rows_at_once(run, capacity), wide = f->qk_norm == QK_NORM_WIDE;
    uint64_t q_rows = wide ? MOST(run, q_rows.n) : 0, k_rows = wide ? MOST(run, k_rows.n) : 0,
             base_row = op_row_stride((f->n_heads + f->n_kv_heads) * f->d_head);
    const struct memory all[] = {
        {&run->tables, 4 * (uint64_t)run->n_words, "circuits' tables"},
        {&run->steer, 4 * d, "steering"},
        {&run->differences, token * run->n_differences * d + 4 * d,
         "differences of nodes"}, /* and a row of zeros */
        {&run->normed, token * entries_at_once(run, capacity) * d, "circuits' inputs"},
        {&run->product, token * MOST(run, n_entries) * run->product_stride, "circuits' products"},
        {&run->q, token * MOST(run, n_q) * run->z_stride, "circuits' queries"},
        {&run->z, token * MOST(run, n_states) * run->z_stride, "circuits' attention outputs"},
        {&run->heads, token * MOST(run, n_outputs) * run->heads_stride, "circuits' heads"},
        {&run->gathered, token * variants * op_row_stride(f->n_heads * f->d_head),
         "circuits' rows of heads"},
        {&run->raw, token * variants * d, "circuits' attention"},
        {&run->scale, token * (variants + 1), "circuits' scales"},
        {&run->gate_up, 4 * (uint64_t)mlp * op_row_stride(f->d_mlp << (f->gated != 0)),
         "circuits' gates"},
        {&run->post, 4 * (uint64_t)mlp * op_row_stride(f->d_mlp), "circuits' activations"},
        {&run->q_rows, token * q_rows * run->q_row_stride, "circuits' rows of queries"},
        {&run->k_rows, token * k_rows * run->k_row_stride, "circuits' rows of keys"},
        {&run->base_qk, wide ? token * base_row : 0, "queries and keys before their norm"},
        {&run->scores, scores_bytes(run, capacity, longest), "circuits' scores"}};
    _Static_assert(sizeof all / sizeof all[0] <= BUFFERS_MOST, "too many buffers");
    memcpy(memory, all, sizeof all);
    return sizeof all / sizeof all[0];
}

uint64_t circuit_bytes(const struct circuit_run *run, uint32_t capacity, uint32_t n_slots,
                       uint32_t longest, int distributions, uint64_t *largest) {
    const struct model_facts *f = &run->model->facts;
    struct memory memory[BUFFERS_MOST];
    int n = buffers_list((struct circuit_run *)run, capacity, longest, memory);
    uint64_t total = run_work_bytes(f, run_sizes_of(run->model).scratch, capacity, longest,
                                    CIRCUIT_READBACK, 1) +
                     (distributions ? read_bytes(f) : 0) + split_bytes(run, capacity) +
                     8 * (uint64_t)capacity * op_row_stride(f->d_model) +
                     run_cache_bytes(f, n_slots, 0);
    *largest = 4 * (uint64_t)n_slots * f->d_head *
               (MOST(run, n_k) > MOST(run, n_v) ? MOST(run, n_k) : MOST(run, n_v));
    for (int i = 0; i < n; i++) {
        total += memory[i].bytes;
        *largest = memory[i].bytes > *largest ? memory[i].bytes : *largest;
    }
    for (uint32_t i = 0; i < run->depth; i++)
        total += 4 * (uint64_t)n_slots * f->d_head * (run->layers[i].n_k + run->layers[i].n_v);
    total += lists_bytes(run, capacity);
    return total;
}

/* A device buffer of zeros; none if `bytes` is 0. */
static int zeroed(struct circuit_run *run, struct gpu_buffer **out, uint64_t bytes,
                  const char *name, struct error *error) {
    if (bytes == 0)
        return 0;
    if (gpu_buffer_create(out, run->model->ops.device, bytes, GPU_DEVICE_LOCAL, name, error))
        return -1;
    return gpu_queue_zero(run->model->ops.queue, *out, 0, gpu_buffer_size(*out), error);
}

/* Uploads bytes by a transfer. A kernel that copies floats may flush subnormal numbers to zero, and
 * words that are read as floats look like them. */
static int bytes_upload(struct circuit_run *run, const void *data, uint64_t bytes,
                        struct gpu_buffer *to, struct error *error) {
    struct gpu_buffer *from;
    if (gpu_buffer_create(&from, run->model->ops.device, bytes, GPU_UPLOAD, "circuits' upload",
                          error))
        return -1;
    memcpy(gpu_buffer_map(from), data, bytes);
    int failed = gpu_queue_copy(run->model->ops.queue, from, 0, to, 0, bytes, error) ||
                 gpu_queue_wait(run->model->ops.queue, error);
    if (failed)
        gpu_queue_abandon(run->model->ops.queue);
    gpu_buffer_destroy(from);
    return failed ? -1 : 0;
}

int circuit_reserve(struct circuit_run *run, uint32_t capacity, uint32_t n_slots, uint32_t longest,
                    const float *steer, struct error *error) {
    const struct model_facts *f = &run->model->facts;
    struct memory memory[BUFFERS_MOST];
    if (run->work)
        return error_set(error, ERROR_VALUE, "these circuits have their memory already");
    int n = buffers_list(run, capacity, longest, memory);
    run->capacity = capacity;
    run->n_slots = n_slots;
    run->assembled = entries_at_once(run, capacity);
    run->mlp_rows = mlp_rows_at_once(run, capacity);
    if (ops_split_expect(&run->model->ops, split_bytes(run, capacity), error) ||
        run_work_create(&run->work, run->model, capacity, CIRCUIT_READBACK, error))
        return -1;
    for (int i = 0; i < n; i++)
        if (zeroed(run, memory[i].buffer, memory[i].bytes, memory[i].name, error))
            goto fail;
    for (uint32_t i = 0; i < run->depth; i++) {
        struct circuit_layer *layer = &run->layers[i];
        uint64_t region = 4 * (uint64_t)n_slots * f->d_head;
        if (zeroed(run, &layer->k, region * layer->n_k, "circuits' keys", error) ||
            zeroed(run, &layer->v, region * layer->n_v, "circuits' values", error))
            goto fail;
    }
    if (bytes_upload(run, run->words, 4 * (uint64_t)run->n_words, run->tables, error) ||
        bytes_upload(run, steer, 4 * (uint64_t)f->d_model, run->steer, error))
        goto fail;
    return 0;
fail:
    gpu_queue_abandon(run->model->ops.queue);
    return -1;
}
