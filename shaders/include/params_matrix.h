/* Arguments of the kernels of matrix units; a part of params.h, which includes it.
 *
 * A float32 row x is split into float16 parts: x = s (h + l), where s is a power of two for each
 * row, so that the row's largest magnitude lies from 2^14 to 2^15 in h + l. The parts of a row lie
 * behind each other, h and then l, each MATRIX_BLOCK values padded with zeros. */
#ifndef VKSTEER_PARAMS_MATRIX_H
#define VKSTEER_PARAMS_MATRIX_H

#define MATRIX_BLOCK 32 /* values of the sum that one step of the matrix kernels takes */

/* parts[s, r, :] = h [, l] of x[r, s * slice_k .. min((s + 1) * slice_k, n_k)), scales[s, r] its
 * power of two. */
BLOCK(matrix_split_params) {
    ADDRESS(FloatsIn) x;       /* [n_rows, x_stride] */
    ADDRESS(CellsOut) parts;   /* [slices, n_rows, n_parts, part_cells], cells of 8 float16 */
    ADDRESS(FloatsOut) scales; /* [slices, n_rows] */
    UINT n_rows;
    UINT n_k;
    UINT slice_k;
    UINT x_stride;
    UINT part_cells;
    UINT n_parts; /* 2, or 1: h alone */
};

/* range[0] = max(range[0], the largest finite magnitude of the weights), as the bits of a float. */
BLOCK(matrix_range_params) {
    ADDRESS(Panels) weights;
    ADDRESS(WordsInOut) range;
    UINT n_cells;
    UINT weight_type; /* WEIGHT_F32 or WEIGHT_BF16 */
    UINT n_invocations;
};

/* Forward: dst[m, n] = sum over k of x[m, k] W[n, k], finished as linear_params says.
 * Backward: dst[m, n] (LINEAR_ADD: +)= sum over k of x[m, k] W[first_row + k, n] (LINEAR_SCALE:
 * times `scale`). WEIGHT_PARTS: W is rows of parts, too, with scales of their own in `range`, and
 * the grid's z is a slice of both, with n_rows rows of dst of its own. */
BLOCK(linear_matrix_params) {
    ADDRESS(Panels) x;        /* parts [n_rows, parts, part_cells] */
    ADDRESS(FloatsIn) scales; /* [n_rows] */
    ADDRESS(Panels) weights;  /* panels of 32 rows, or parts [n_out, parts, part_cells] */
    ADDRESS(FloatsIn) range;  /* the largest magnitude in W; WEIGHT_PARTS: [n_out] scales */
    ADDRESS(FloatsInOut) dst; /* [n_rows, out_stride] */
    ADDRESS(FloatsIn) bias;   /* [n_out] */
    ADDRESS(FloatsIn) add;    /* [n_rows, out_stride] */
    UINT n_rows;
    UINT n_out;       /* columns to write */
    UINT part_cells;  /* of x: a multiple of MATRIX_BLOCK / 8 */
    UINT n_parts;     /* of x: 2, or 1 (FAST) */
    UINT panel_cells; /* cells of a row in a panel */
    UINT first_cell;  /* of a row in a panel: for a slice of the inputs */
    UINT n_cells;     /* of a row, from first_cell on */
    UINT first_row;   /* backward: of W */
    UINT n_sum;       /* backward: rows of W */
    UINT out_stride;
    UINT flags;
    float softcap;
    float scale;
    float clip;
};

/* A product of attention: dst = the scores of queries a with keys b, or the attention outputs of a
 * pattern a with values b. */
BLOCK(attn_matrix_params) {
    ADDRESS(Vec4sIn) a; /* queries [T, a_stride], or the pattern [T', H, a_stride] */
    ADDRESS(Vec4sIn) b; /* keys or values, as in the cache: [slots, G * dh] */
    ADDRESS(Tokens) tokens;
    ADDRESS(Tiles) tiles;
    ADDRESS(FloatsOut) dst; /* scores [T', H, dst_stride], or outputs [T, dst_stride] */
    UINT n_tiles;
    UINT first_token; /* T' is counted from it */
    UINT n_heads;
    UINT n_kv_heads;
    UINT d_head; /* a multiple of 4 */
    UINT a_stride;
    UINT dst_stride;
    UINT window;   /* outputs: 0: full */
    float scale;   /* scores */
    float softcap; /* scores: 0: none */
};

/* dst[i] = the sum of n_slices values src[i], src[i + n], ..., in ascending order. */
BLOCK(sum_slices_params) {
    ADDRESS(FloatsIn) src;
    ADDRESS(FloatsOut) dst;
    UINT n;
    UINT n_slices;
};

#endif
