/* Every op as data: what it is called, which numbers and addresses it takes, how it runs on the device and on its twin. One mechanism then
 * fills, runs and compares any of them (csrc/python/ops_type.c, tests/test_ops.py, `vksteer verify`). */
#ifndef VKSTEER_CALLS_H
#define VKSTEER_CALLS_H

#include "ops/twins.h"

enum op_field_kind { FIELD_ADDRESS, FIELD_UINT, FIELD_FLOAT };

struct op_field {
    const char *name;
    enum op_field_kind kind;
    uint32_t offset; /* in the call's block; an address takes 8 bytes, a number 4 */
};

struct op_call {
    const char *name;
    size_t bytes;        /* of its block, zero where nothing is said */
    size_t params_bytes; /* of the argument block of params.h that it starts with, 0: it has none of its own */
    const struct op_field *fields;
    int n_fields;
    int (*run)(struct ops *ops, const void *block, struct error *error);
    void (*twin)(struct twin_memory *memory, const void *block);
};

extern const struct op_call op_calls[];
extern const int op_calls_count;
const struct op_call *op_call_find(const char *name); /* NULL if there is none */

/* self_test.c: may the kernels of `family` (enum op_linear_family) take the place of the baseline's? Runs both on a small awkward problem with
 * weights of one type (WEIGHT_*; -1: of every type), in both phases and backward: bits must be the baseline's (in decoding, for a family with an order of its own, close to it), and a row's
 * bits must not depend on how many rows there are. 0: so it is; -1: not (ERROR_VALUE), or the device failed; the error says where.
 * For optional families, once per device, driver and engine version, before they are chosen. Compiles every kernel of the two families for the
 * type, at first use seconds on a software driver; after that it takes a few hundredths of a second. */
int op_linear_self_test(struct ops *ops, int family, int only_type, struct error *error);

#endif
