/* Every op as data: what it is called, which numbers and addresses it takes, how it runs on the
 * device and on its reference. One mechanism then fills, runs and compares any of them
 * (csrc/python/ops_type.c, tests/test_ops.py, `vksteer verify`). */
#ifndef VKSTEER_CALLS_H
#define VKSTEER_CALLS_H

#include "reference/reference.h"

enum op_field_kind { FIELD_ADDRESS, FIELD_UINT, FIELD_FLOAT };

struct op_field {
    const char *name;
    enum op_field_kind kind;
    uint32_t offset; /* in the call's block; an address takes 8 bytes, a number 4 */
};

struct op_call {
    const char *name;
    size_t bytes; /* of its block, zero where nothing is said */
    /* of the argument block of params.h that it starts with, 0: it has none of its own */
    size_t params_bytes;
    const struct op_field *fields;
    int n_fields;
    int (*run)(struct ops *ops, const void *block, struct error *error);
    void (*reference)(struct reference_memory *memory, const void *block);
};

extern const struct op_call op_calls[];
extern const int op_calls_count;
const struct op_call *op_call_find(const char *name); /* NULL if there is none */

#endif
