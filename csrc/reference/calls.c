/* The table of calls. The build makes FIELDS_<struct> (op_fields.h) from the structs. */
#include <stddef.h>
#include <string.h>

#include "op_fields.h"
#include "reference/calls.h"

/* --- ops that take a matrix ------------------------------------------------------------------- */

struct linear_call {
    struct op_linear_args args;
    struct matrix_arguments matrix;
    uint32_t family_plus_1; /* kernel family; 0: the device's own choice */
};
struct linear_pairs_call {
    struct op_linear_pairs_args args;
    struct matrix_arguments matrix;
    uint32_t family_plus_1;
};
struct linear_decode_call {
    struct op_linear_decode_args args;
    struct matrix_arguments matrix;
    uint32_t family_plus_1;
};
struct linear_bwd_call {
    struct op_linear_bwd_args args;
    struct matrix_arguments matrix;
    uint32_t family_plus_1;
};
struct head_out_call {
    struct op_head_out_args args;
    struct matrix_arguments matrix;
    uint32_t family_plus_1;
};
struct row_norms_call {
    struct row_norms_arguments args;
    struct matrix_arguments matrix;
};
struct embed_call {
    struct op_embed_args args;
    struct matrix_arguments matrix;
};

static int matrix_make(const struct matrix_arguments *from, struct op_matrix *matrix,
                       struct error *error) {
    *matrix = (struct op_matrix){
        .type = from->weight_type,
        .n = from->n,
        .k = from->k,
        .k_cells = op_matrix_cells(from->weight_type, from->k),
        .scale = from->matrix_scale,
    };
    uint32_t rows = from->segment_rows ? from->segment_rows
                                       : (from->n + OP_PANEL - 1) / OP_PANEL * OP_PANEL;
    if (from->weight_type > WEIGHT_F16 || from->n == 0 || from->k == 0 || rows % OP_PANEL ||
        (from->n - 1) / rows >= OP_MATRIX_SEGMENTS)
        return error_set(error, ERROR_VALUE,
                         "no matrix of %u x %u, type %u, in segments of %u rows", from->n, from->k,
                         from->weight_type, rows);
    if (from->weights % 16)
        return error_set(error, ERROR_VALUE, "panels must begin at a multiple of 16 bytes");
    for (uint32_t first = 0; first < from->n; first += rows, matrix->n_segments++) {
        matrix->segments[matrix->n_segments].address =
            from->weights + op_matrix_bytes(from->weight_type, first, from->k);
        matrix->segments[matrix->n_segments].first = first;
        matrix->segments[matrix->n_segments].count = from->n - first < rows ? from->n - first
                                                                            : rows;
    }
    return 0;
}

/* The matrix of a reference call. Nonzero: it cannot be made, and the memory has failed. */
static int reference_matrix(struct reference_memory *memory, const struct matrix_arguments *from,
                            struct op_matrix *matrix) {
    if (matrix_make(from, matrix, &memory->error))
        memory->failed = -1;
    return memory->failed;
}

/* Selects the kernel family that a call names. */
static int family_begin(struct ops *ops, uint32_t family_plus_1, struct error *error) {
    int before = ops->kernel_family;
    if (family_plus_1 > LINEAR_FAMILIES)
        return error_set(error, ERROR_VALUE, "there is no kernel family %u", family_plus_1 - 1);
    if (family_plus_1)
        ops->kernel_family = (int)family_plus_1 - 1;
    return before;
}

#define RUN_OF_FAMILY(name) \
    static int name##_run(struct ops *ops, const void *arguments, struct error *error) { \
        const struct name##_call *call = arguments; \
        struct op_matrix matrix; \
        int before = family_begin(ops, call->family_plus_1, error); \
        if (before < 0) \
            return -1; \
        int failed = matrix_make(&call->matrix, &matrix, error) || \
                     op_##name(ops, &matrix, &call->args, error); \
        ops->kernel_family = before; \
        return failed ? -1 : 0; \
    }
RUN_OF_FAMILY(linear)
RUN_OF_FAMILY(linear_pairs)
RUN_OF_FAMILY(linear_decode)
RUN_OF_FAMILY(linear_bwd)
RUN_OF_FAMILY(head_out)

/* x: the input rows, which kernels may load in pairs of floats. */
#define REFERENCE_OF_PRODUCT(name, x, stride) \
    static void name##_reference(struct reference_memory *memory, const void *arguments) { \
        const struct name##_call *call = arguments; \
        struct op_matrix matrix; \
        if (reference_matrix(memory, &call->matrix, &matrix)) \
            return; \
        if (call->args.x % 8 || call->args.stride % 2) \
            reference_fail(memory, "rows of " #x " must begin at multiples of 8 bytes"); \
        else \
            reference_##name(memory, &matrix, &call->args); \
    }
REFERENCE_OF_PRODUCT(linear, x, x_stride)
REFERENCE_OF_PRODUCT(linear_pairs, x, x_stride)
REFERENCE_OF_PRODUCT(linear_decode, x, x_stride)
REFERENCE_OF_PRODUCT(linear_bwd, dy, y_stride)

static void head_out_reference(struct reference_memory *memory, const void *arguments) {
    const struct head_out_call *call = arguments;
    struct op_matrix matrix;
    if (!reference_matrix(memory, &call->matrix, &matrix))
        reference_head_out(memory, &matrix, &call->args);
}

static int row_norms_run(struct ops *ops, const void *arguments, struct error *error) {
    const struct row_norms_call *call = arguments;
    struct op_matrix matrix;
    if (matrix_make(&call->matrix, &matrix, error))
        return -1;
    return op_row_norms(ops, &matrix, call->args.dst, error);
}

static void row_norms_reference(struct reference_memory *memory, const void *arguments) {
    const struct row_norms_call *call = arguments;
    struct op_matrix matrix;
    if (!reference_matrix(memory, &call->matrix, &matrix))
        reference_row_norms(memory, &matrix, call->args.dst);
}

static int embed_run(struct ops *ops, const void *arguments, struct error *error) {
    const struct embed_call *call = arguments;
    struct op_matrix matrix;
    return matrix_make(&call->matrix, &matrix, error) || op_embed(ops, &matrix, &call->args, error)
               ? -1
               : 0;
}

static void embed_reference(struct reference_memory *memory, const void *arguments) {
    const struct embed_call *call = arguments;
    struct op_matrix matrix;
    if (!reference_matrix(memory, &call->matrix, &matrix))
        reference_embed(memory, &matrix, &call->args);
}

#define FIELDS_matrix(name) FIELDS_matrix_arguments(offsetof(struct name##_call, matrix))
#define FIELDS_family(name) \
    {"family_plus_1", FIELD_UINT, offsetof(struct name##_call, family_plus_1)}
static const struct op_field linear_fields[] = {FIELDS_op_linear_args(0), FIELDS_matrix(linear),
                                                FIELDS_family(linear)},
                             linear_pairs_fields[] = {FIELDS_op_linear_pairs_args(0),
                                                      FIELDS_matrix(linear_pairs),
                                                      FIELDS_family(linear_pairs)},
                             linear_decode_fields[] = {FIELDS_op_linear_decode_args(0),
                                                       FIELDS_matrix(linear_decode),
                                                       FIELDS_family(linear_decode)},
                             linear_bwd_fields[] = {FIELDS_op_linear_bwd_args(0),
                                                    FIELDS_matrix(linear_bwd),
                                                    FIELDS_family(linear_bwd)},
                             head_out_fields[] = {FIELDS_op_head_out_args(0),
                                                  FIELDS_matrix(head_out), FIELDS_family(head_out)},
                             row_norms_fields[] = {FIELDS_row_norms_arguments(0),
                                                   FIELDS_matrix(row_norms)},
                             embed_fields[] = {FIELDS_op_embed_args(0), FIELDS_matrix(embed)};

/* --- ops of kernels.def ----------------------------------------------------------------------- */

#define SIZE_FIELD(size, i) {#size, FIELD_UINT, offsetof(struct op_arguments, sizes[i])}
#define NONE
#define ONE(size) SIZE_FIELD(size, 0),
#define TWO(first, second) SIZE_FIELD(first, 0), SIZE_FIELD(second, 1),
#define OP(name, params_type, ...) \
    static const struct op_field name##_fields[] = {FIELDS_##params_type(0), __VA_ARGS__};
#include "ops/kernels.def"

#define NONE
#define ONE(size) , call->sizes[0]
#define TWO(first, second) , call->sizes[0], call->sizes[1]
#define OP(name, params_type, ...) \
    static int name##_run(struct ops *ops, const void *arguments, struct error *error) { \
        const struct op_arguments *call = arguments; \
        const void *params = call->params; \
        return op_##name(ops, (const struct params_type *)params __VA_ARGS__, error); \
    } \
    static void name##_reference(struct reference_memory *memory, const void *arguments) { \
        const struct op_arguments *call = arguments; \
        const void *params = call->params; \
        reference_##name(memory, (const struct params_type *)params __VA_ARGS__); \
    }
#include "ops/kernels.def"

/* --- the table -------------------------------------------------------------------------------- */

#define ROW(name, bytes, params_bytes) \
    {#name, \
     bytes, \
     params_bytes, \
     name##_fields, \
     sizeof name##_fields / sizeof name##_fields[0], \
     name##_run, \
     name##_reference}
#define OP(name, params_type, ...) \
    ROW(name, sizeof(struct op_arguments), sizeof(struct params_type)),
const struct op_call op_calls[] = {
#include "ops/kernels.def"
    ROW(embed, sizeof(struct embed_call), 0),
    ROW(linear, sizeof(struct linear_call), 0),
    ROW(linear_pairs, sizeof(struct linear_pairs_call), 0),
    ROW(linear_decode, sizeof(struct linear_decode_call), 0),
    ROW(linear_bwd, sizeof(struct linear_bwd_call), 0),
    ROW(head_out, sizeof(struct head_out_call), 0),
    ROW(row_norms, sizeof(struct row_norms_call), 0),
};
const int op_calls_count = sizeof op_calls / sizeof op_calls[0];

const struct op_call *op_call_find(const char *name) {
    for (int i = 0; i < op_calls_count; i++)
        if (strcmp(op_calls[i].name, name) == 0)
            return &op_calls[i];
    return NULL;
}
