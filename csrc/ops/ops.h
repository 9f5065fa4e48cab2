/* Operations: they check shapes, choose a kernel, fill its arguments and record its dispatch.
 * Nothing here knows what a model is.
 *
 * B rows, T packed tokens, D width, H query heads, G key/value heads, dh head size, V vocabulary.
 * Activations are float32 [T, stride] with stride = op_row_stride(width) and zero pad columns;
 * addresses are device addresses (0: absent). */
#ifndef VKSTEER_OPS_H
#define VKSTEER_OPS_H

#include "gpu/gpu.h"
#include "kernel_table.h" /* enum op_kernel; made by the build from kernels.def */
#include "params.h"

/* All kernels with their SPIR-V, in static storage. */
const struct gpu_kernel *op_kernels_get(void);
int op_kernel_find(const char *name); /* -1 if there is none */

/* Columns from which on a product on matrix units takes the larger tiles (LARGE of
 * linear_matrix.comp): 128 x 128 on most GPUs, where a weight is converted once for 128 rows. */
#define OP_LARGE_COLUMNS 2048

/* Device memory in which products on matrix units split their rows; the last buffer is in use. */
struct op_scratch {
    struct gpu_buffer *buffers[12]; /* each larger than the one before */
    uint32_t n;
    uint64_t expected; /* bytes of the first one, see ops_split_expect */
};

struct ops {
    struct gpu_device *device;
    struct gpu_queue *queue;
    uint32_t subgroup, workgroup; /* invocations */
    int kernel_family;            /* enum op_kernel_family, measured once per device or pinned */
    int fast;            /* products on matrix units: 1 in float16, without the low parts */
    uint32_t large_from; /* columns from which products on matrix units take large tiles */
    struct op_scratch scratch;
};

/* The next dispatch touches at most `bytes` from this address of its arguments on, and not the
 * whole buffer that it lies in. */
#define OP_EXTENT(ops, params, address, bytes) \
    gpu_queue_extent((ops)->queue, offsetof(struct params, address) / 8, bytes)

int ops_create(struct ops *ops, struct gpu_device *device, struct error *error);
void ops_destroy(struct ops *ops);
/* linear_matrix.c: bytes in which products on matrix units split at most n_rows rows of n_k values,
 * and op_dots its n_a + n_b rows, into two parts. */
uint64_t op_split_bytes(uint64_t n_rows, uint32_t n_k);
uint64_t op_dots_bytes(uint32_t n_a, uint32_t n_b, uint32_t n_k);
/* The next products on matrix units need `bytes`: their memory is made as large when the first one
 * needs it, instead of growing step by step. Waits for the device where a smaller one is freed. */
int ops_split_expect(struct ops *ops, uint64_t bytes, struct error *error);
/* Frees the memory, which is made again when it is needed. Waits for the device. */
int ops_split_release(struct ops *ops, struct error *error);

/* most bytes of a kernel's arguments: the push constants that every driver offers */
#define OP_PARAMS_MAX 128

/* Floats from one row to the next: a multiple of 16, and never one of 1024, because rows would then
 * compete for the same cache lines. */
static inline uint32_t op_row_stride(uint32_t width) {
    uint32_t stride = (width + 15) / 16 * 16;
    return stride % 1024 ? stride : stride + 16;
}

/* --- linear.c --------------------------------------------------------------------------------- */

#define OP_PANEL 32
#define OP_MATRIX_SEGMENTS 64

/* W [n, k] on the device, as panels of 32 rows (see shaders/linear.comp), in several segments where
 * one buffer cannot hold it. */
struct op_matrix {
    uint32_t type; /* WEIGHT_* */
    uint32_t n, k;
    uint32_t k_cells; /* 16-byte cells of k in a row */
    float scale;      /* factor on every product with W, forward and backward; 0: none */
    uint64_t range;   /* what ops_matrix_range wrote, which products on matrix units need; 0: they
                       * call it themselves */
    uint32_t n_segments;
    struct {
        uint64_t address;
        uint32_t first, count;
    } segments[OP_MATRIX_SEGMENTS];
};

/* A cell is 16 bytes: 4 float32 or 8 halves. */
static inline uint32_t op_cell_inputs(uint32_t type) { return type == WEIGHT_F32 ? 4 : 8; }
static inline uint32_t op_matrix_cells(uint32_t type, uint32_t k) {
    return (k + 15) / 16 * 16 / op_cell_inputs(type);
}
static inline uint64_t op_matrix_bytes(uint32_t type, uint32_t rows, uint32_t k) {
    return (uint64_t)(rows + OP_PANEL - 1) / OP_PANEL * OP_PANEL * op_matrix_cells(type, k) * 16;
}

/* Columns that a workgroup covers whose subgroups take one panel each. */
static inline uint32_t op_panel_columns(const struct ops *ops) {
    return (ops->subgroup < OP_PANEL ? OP_PANEL : ops->subgroup) * (ops->workgroup / ops->subgroup);
}

/* Kernel families: sets of kernels for the same product. The first two are for drivers whose
 * subgroups are vector registers (software), and the second of them reads weights through texel
 * buffers; both sum in one chain over k in every phase. The third is for real GPUs: in prefill it
 * uses tiles in shared memory with the same chain; in decoding it splits k over a workgroup, in an
 * order of its own. `matrix` decodes like it, and in prefill multiplies on matrix units, in the
 * order of the device (csrc/ops/linear_matrix.c, csrc/ops/attention.c). */
enum op_kernel_family {
    LINEAR_BROADCAST,
    LINEAR_TEXELS,
    LINEAR_TILED,
    LINEAR_MATRIX,
    LINEAR_FAMILIES
};
const char *op_kernel_family_name(int family);
int op_kernel_family_find(const char *name); /* -1 if there is none */
/* Does the device have what the kernel family needs? */
int op_kernel_family_offered(const struct ops *ops, int family);

struct op_linear_args {
    uint64_t x, dst, bias, add; /* [M, x_stride], [M, dst_stride], [n], [M, dst_stride] */
    /* [k]: x is RMS-normalised first, which op_linear_norms must allow; 0: it is not */
    uint64_t gain;
    uint32_t n_rows, x_stride, dst_stride;
    uint32_t first_k, n_k; /* a slice of the inputs (multiples of 16); n_k = 0: all */
    float softcap;         /* 0: none */
    float clip;            /* the product with its bias is clamped to +-clip; 0: it is not */
    uint32_t decode;       /* the phase: 1 for decoding */
    float eps;             /* of the norm */
};
/* Can a product of this many rows normalise its input, bit-identically to op_norm? */
int op_linear_norms(const struct ops *ops, uint32_t n_rows);
int op_linear(struct ops *ops, const struct op_matrix *matrix, const struct op_linear_args *args,
              struct error *error);

/* dst = op_act (PAIRS_GATE) or op_rope (PAIRS_ROTATE, without norm per head) of norm(x) W^T + bias,
 * without storing the [M, n] product. Bit-identical to the separate steps. */
struct op_linear_pairs_args {
    /* [M, x_stride], [k], [M, dst_stride]: GATE n / 2 columns, ROTATE q; [n] or 0 */
    uint64_t x, gain, dst, bias;
    uint64_t angles, tokens, k_cache, v_cache; /* ROTATE, as rope_params */
    uint32_t n_rows, x_stride, dst_stride, kind, act, n_heads, n_kv_heads, d_head;
    float eps;
};
/* Is op_linear_pairs bit-identical to the separate steps, and profitable, for this many rows? It is
 * where op_linear_norms holds, the matrix has one segment, and one dispatch may do all the work. */
int op_linear_pairs_offered(const struct ops *ops, const struct op_matrix *matrix, uint32_t n_rows);
int op_linear_pairs(struct ops *ops, const struct op_matrix *matrix,
                    const struct op_linear_pairs_args *args, struct error *error);
/* Rows [first, first + count) of a matrix as a matrix in the same memory, whose row 0 is row
 * `first`; `first` is a multiple of 32. Fails only where the matrix has no such rows. */
int op_matrix_rows(const struct op_matrix *matrix, uint32_t first, uint32_t count,
                   struct op_matrix *rows, struct error *error);

/* dx = dy W (+ dx): the gradient with respect to a product's input. */
struct op_linear_bwd_args {
    uint64_t dy, dx; /* [M, y_stride] with zero pad columns, [M, x_stride] */
    uint32_t n_rows, y_stride, x_stride;
    /* a slice of W's rows: dy's first column belongs to row first_n (multiples of 16, or up to
     * the end); n_sum = 0: all */
    uint32_t first_n, n_sum;
    /* a slice of the inputs, dx's first column is first_k (multiples of 16); n_k = 0: all */
    uint32_t first_k, n_k;
    uint32_t add; /* 1: add to what dx holds, for a matrix without a scale */
};
int op_linear_bwd(struct ops *ops, const struct op_matrix *matrix,
                  const struct op_linear_bwd_args *args, struct error *error);

/* --- linear_matrix.c -------------------------------------------------------------------------- */

/* Writes the largest magnitude of a matrix, which products on matrix units scale it by, to 4 bytes
 * of a buffer; float16 weights need no scale, and get a zero. */
int ops_matrix_range(struct ops *ops, const struct op_matrix *matrix, struct gpu_buffer *buffer,
                     uint64_t offset, struct error *error);

/* --- decode.c: decoding on GPUs --------------------------------------------------------------- */

/* y = finish(norm(x) W^T (* scale) [+ bias], clamped, capped) [+ add] of the few rows of decoding.
 * All pad columns of x, gain and norm_bias are read. */
struct op_linear_decode_args {
    /* [M, x_stride] at a multiple of 16 bytes, [M, dst_stride], [n], [M, dst_stride] */
    uint64_t x, dst, bias, add;
    uint64_t gain, norm_bias; /* [k], padded as x: of the norm; norm_bias: 0 for none */
    /* x is first replaced by mid = x + (RMS norm of sub) post_gain, which is written to `mid`, as
     * after a sublayer with a post-norm; [M, x_stride], [k], [M, x_stride]. sub: 0 for none */
    uint64_t sub, post_gain, mid;
    uint32_t n_rows, x_stride, dst_stride;
    uint32_t first_k, n_k; /* a slice of the inputs (multiples of 16); n_k = 0: all */
    uint32_t norm;         /* NORM_KIND_* */
    uint32_t finish, act;  /* FINISH_*, ACT_*; GATE: n / 2 columns of dst */
    float softcap, clip, eps;
};
/* Does decoding use the kernels of GPUs, whose order of sums is their own? */
int op_decode_lean(const struct ops *ops);
/* Does op_linear_decode take this matrix, finished like this? */
int op_linear_decode_offered(const struct ops *ops, const struct op_matrix *matrix,
                             uint32_t finish);
int op_linear_decode(struct ops *ops, const struct op_matrix *matrix,
                     const struct op_linear_decode_args *args, struct error *error);
/* Does op_linear_decode take `sub` with this norm (NORM_KIND_*) and finish? */
int op_linear_decode_post_offered(uint32_t norm, uint32_t finish);
/* Does decoding use op_attn_step, for heads of this size? */
int op_attn_step_offered(const struct ops *ops, uint32_t d_head);

/* --- measure.c: the best of a few dispatches -------------------------------------------------- */
/* A product of m x k by n x k: floating point operations a second (m large) and weight bytes a
 * second (m = 1, decoding). */
int op_linear_measure(struct ops *ops, uint32_t type, uint32_t m, uint32_t n, uint32_t k,
                      int decode, double *flops, double *bytes, struct error *error);
int op_linear_bwd_measure(struct ops *ops, uint32_t type, uint32_t m, uint32_t n, uint32_t k,
                          double *flops, struct error *error);
int op_read_measure(struct ops *ops, uint64_t bytes, double *bytes_per_second, struct error *error);

/* What decides which kernels a model dispatches, besides the kernel family in use. */
struct op_kernels_needed {
    uint32_t type;  /* WEIGHT_* */
    uint32_t group; /* query heads for each key/value head */
    int layer_norm; /* its norms are LayerNorms */
    int gated, positions, pre_norms, post_norms;
};
/* decode.c: the kernels of decoding on GPUs, at most 20; returns how many. */
int op_decode_kernels(const struct op_kernels_needed *needed, int *kernels);
/* Compiles these kernels in parallel. */
int ops_kernels_prepare(struct ops *ops, const struct op_kernels_needed *needed,
                        struct error *error);
/* The same for the backward pass, at its first use. */
int ops_backward_prepare(struct ops *ops, const struct op_kernels_needed *needed,
                         struct error *error);

/* --- lens.c ----------------------------------------------------------------------------------- */

struct op_head_out_args {
    uint64_t x, dst, gain; /* [n_kv_heads, d_head], [n_heads, dst_stride], [n] or 0 */
    uint32_t n_heads, n_kv_heads, d_head, dst_stride;
};
/* dst[h, :] = x[h's key/value head] W_O^h (* gain) for a W_O [n, n_heads * d_head]. */
int op_head_out(struct ops *ops, const struct op_matrix *matrix,
                const struct op_head_out_args *args, struct error *error);
/* dst[n] = 1 / |W[n, :]|, or 0 where the row is zero. */
int op_row_norms(struct ops *ops, const struct op_matrix *matrix, uint64_t dst,
                 struct error *error);

/* --- attention.c ------------------------------------------------------------------------------ */

/* Arguments of the three steps that op_attn_decode does in one. tiles: device address of the
 * queries' tiles, which op_attn_decode does not have. */
struct scores_params op_attn_scores_params(const struct decode_params *decode, uint64_t tiles);
struct softmax_params op_attn_softmax_params(const struct decode_params *decode);
struct attn_output_params op_attn_output_params(const struct decode_params *decode, uint64_t tiles);
/* Are both products of attention computed on matrix units? Never in decoding, so that the separate
 * steps have the bits of op_attn_decode. */
int op_attn_matrix_offered(const struct ops *ops, uint32_t d_head, int decode);
/* The two kernels of these products in prefill. */
void op_attn_kernels(const struct ops *ops, int *kernels);
/* The kernel of op_attn_decode for `group` query heads that share a key/value head. */
int op_attn_decode_kernel(uint32_t group);

/* --- elementwise.c ---------------------------------------------------------------------------- */

/* dst[t, :] = scale * E[id(t), :], or of learned positions [add[t, :] +] scale * E[pos(t), :]. Rows
 * that the matrix does not have are left as they are. */
struct op_embed_args {
    uint64_t tokens, dst, add; /* [T] token_meta, [T, stride], [T, stride] or 0 */
    /* [T] as op_pick writes it: id(t) is picked[t - t % share], or 0 where that is negative; 0: the
     * ids of `tokens` */
    uint64_t picked;
    uint32_t n_tokens, stride, share;
    uint32_t positions; /* 1: the rows are those of positions */
    float scale;
};
int op_embed(struct ops *ops, const struct op_matrix *embedding, const struct op_embed_args *args,
             struct error *error);

/* --- every op of kernels.def: its kernel's arguments, then its sizes -------------------------- */

#define NONE
#define ONE(size) , uint32_t size
#define TWO(first, second) , uint32_t first, uint32_t second
#define OP(name, params_type, ...) \
    int op_##name(struct ops *ops, const struct params_type *params __VA_ARGS__, \
                  struct error *error);
#include "ops/kernels.def"

/* --- self_test.c ------------------------------------------------------------------------------ */

/* May the kernels of `family` (enum op_kernel_family) replace those of the baseline
 * (LINEAR_BROADCAST)? Runs both on a small awkward problem with weights of one type (WEIGHT_*; -1:
 * of every type), in both phases and backward. The results must be bit-identical to the baseline's,
 * or, where a kernel family has an order of its own, close to them; and a row's result
 * must not depend on how many rows there are. Returns 0 if all this holds, and -1 if it does not
 * (ERROR_VALUE) or the device failed; the error says where.
 * It runs once per device, driver and engine version, before an optional kernel family is chosen.
 * The first run compiles every kernel of the two kernel families for the type, which takes seconds
 * on a software driver; later runs take a few hundredths of a second. */
int op_linear_self_test(struct ops *ops, int family, int only_type, struct error *error);

#endif
