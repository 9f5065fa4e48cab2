/* Every op as data: its name, the numbers and addresses that it takes, its function for the device
 * and its reference. csrc/python/ops_type.c fills the arguments of any op from these and runs it
 * both ways, for the tests and for `vksteer verify`. */
#ifndef VKSTEER_CALLS_H
#define VKSTEER_CALLS_H

#include "reference/reference.h"

enum op_field_kind { FIELD_ADDRESS, FIELD_UINT, FIELD_FLOAT };

struct op_field {
    const char *name;
    enum op_field_kind kind;
    uint32_t offset; /* in the call's arguments; an address takes 8 bytes, a number 4 */
};

struct op_call {
    const char *name;
    size_t bytes; /* of its arguments; those that are not given are zero */
    /* of the struct of params.h that the arguments begin with; 0: they begin with no such struct */
    size_t params_bytes;
    const struct op_field *fields;
    int n_fields;
    int (*run)(struct ops *ops, const void *arguments, struct error *error);
    void (*reference)(struct reference_memory *memory, const void *arguments);
};

/* Arguments of an op of kernels.def: those of its kernel, then its sizes. */
struct op_arguments {
    _Alignas(8) unsigned char params[OP_PARAMS_MAX];
    uint32_t sizes[2];
};

/* Arguments of ops that take a matrix. */
struct matrix_arguments {
    uint64_t weights; /* panels */
    uint32_t weight_type, n, k;
    uint32_t segment_rows; /* rows of each segment, a multiple of 32; 0: one segment */
    float matrix_scale;    /* factor on products; 0: none */
};
struct row_norms_arguments {
    uint64_t dst;
};

extern const struct op_call op_calls[];
extern const int op_calls_count;
const struct op_call *op_call_find(const char *name); /* NULL if there is none */

#endif
