/* The parts of op_linear_self_test, for self_test.c. */
#ifndef VKSTEER_SELF_TEST_H
#define VKSTEER_SELF_TEST_H

#include "ops/ops.h"

/* Attention's two products on matrix units against the baseline's, and each tile alone, which must
 * be bit-identical. */
int self_test_attention(struct ops *ops, struct error *error);

/* -1 to 1, with random bits in the whole mantissa, so that another order of sums or another
 * rounding shows. */
static inline float self_test_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return (float)(int32_t)*state * 0x1p-31f;
}

#endif
