/* Float64 reference implementations on the CPU: every op written a second time as plain loops, for
 * the tests and for `vksteer verify`.
 *
 * A reference takes the same arguments as its op, and every field means what it means to the op.
 * Addresses point into host memory in which each float of the device is a double, so that rounding
 * in the reference is negligible. Every access is checked: a reference that returns without failing
 * has shown that the arguments stay inside their buffers, which is why it runs before the device
 * sees the same arguments. */
#ifndef VKSTEER_REFERENCE_H
#define VKSTEER_REFERENCE_H

#include "ops/ops.h"

#define REFERENCE_BUFFERS 16
/* address = (buffer + 1) << REFERENCE_SHIFT | byte offset on the device, 4 for every item; 0:
 * absent */
#define REFERENCE_SHIFT 40

struct reference_buffer {
    const char *name;
    double *floats;        /* [n], or NULL where the buffer holds words */
    const uint32_t *words; /* [n], or NULL; no op writes words */
    uint64_t n;
};

struct reference_memory {
    struct reference_buffer buffers[REFERENCE_BUFFERS]; /* borrowed */
    uint32_t n_buffers;
    /* an access was outside its buffer, or an argument was invalid; `error` says which, and the
     * results mean nothing */
    int failed;
    struct error error;
    double no_float; /* stands in for a float that must not be accessed */
};

static inline uint64_t reference_address(uint32_t buffer, uint64_t item) {
    return ((uint64_t)(buffer + 1) << REFERENCE_SHIFT) + 4 * item;
}

/* Item `index` after `address`: a pointer to a float (never NULL), or the value of a word. */
double *reference_float(struct reference_memory *memory, uint64_t address, uint64_t index);
uint32_t reference_word(struct reference_memory *memory, uint64_t address, uint64_t index);
struct token_meta reference_token(struct reference_memory *memory, uint64_t tokens, uint64_t index);
/* The activation `act` (ACT_*) at x. slope: receives its derivative there, or NULL. */
double reference_activate(uint32_t act, double x, double *slope);
/* The first of the keys [start, pos] that a query at `pos` sees. */
static inline uint32_t reference_window_start(uint32_t pos, uint32_t window) {
    return window && pos + 1 > window ? pos + 1 - window : 0;
}
/* Records a failure, unless there is one already. */
#define reference_fail(memory, ...) \
    do { \
        if (!(memory)->failed) \
            (memory)->failed = error_set(&(memory)->error, ERROR_VALUE, __VA_ARGS__); \
    } while (0)

/* W[n, k], or 0 outside the matrix. */
double reference_weight(struct reference_memory *memory, const struct op_matrix *matrix, uint32_t n,
                        uint32_t k);

/* linear.c; matrices lie in panels of words, as on the device. */
void reference_linear(struct reference_memory *memory, const struct op_matrix *matrix,
                      const struct op_linear_args *args);
void reference_linear_decode(struct reference_memory *memory, const struct op_matrix *matrix,
                             const struct op_linear_decode_args *args);
void reference_linear_pairs(struct reference_memory *memory, const struct op_matrix *matrix,
                            const struct op_linear_pairs_args *args);
void reference_linear_bwd(struct reference_memory *memory, const struct op_matrix *matrix,
                          const struct op_linear_bwd_args *args);
void reference_embed(struct reference_memory *memory, const struct op_matrix *embedding,
                     const struct op_embed_args *args);

/* lens.c */
void reference_head_out(struct reference_memory *memory, const struct op_matrix *matrix,
                        const struct op_head_out_args *args);
void reference_row_norms(struct reference_memory *memory, const struct op_matrix *matrix,
                         uint64_t dst);

/* norm.c */
/* 1 / sqrt(mean of the squares of `width` floats from item `first` on + eps). */
double reference_inverse_rms(struct reference_memory *memory, uint64_t x, uint64_t first,
                             uint32_t width, double eps);
/* The gradient of sum_i dn[i] n[i] with respect to x, where n = (x - mean) / scale and
 * scale = sqrt(mean (x - mean)^2 + eps):
 * dx[i] = (dn[i] - dn_mean) / scale - n[i] (dn . n) / (width scale). Both means are 0 for an RMS
 * norm. */
struct norm_slope {
    double scale, along; /* dn . n */
    double mean, dn_mean;
};
double reference_norm_slope_at(const struct norm_slope *slope, double dn, double x, uint32_t width);

/* metric.c */
/* softcap * tanh(x / softcap); x itself where softcap is 0. */
double reference_cap(double x, double softcap);
/* log sum exp of the `width` floats from item `first` on, each after the soft cap. */
double reference_log_sum(struct reference_memory *memory, uint64_t x, uint64_t first,
                         uint32_t width, double softcap);

/* --- reference_<op> of every op of kernels.def ------------------------------------------------ */

#define NONE
#define ONE(size) , uint32_t size
#define TWO(first, second) , uint32_t first, uint32_t second
#define OP(name, params_type, ...) \
    void reference_##name(struct reference_memory *memory, const struct params_type *p __VA_ARGS__);
#include "ops/kernels.def"

#endif
