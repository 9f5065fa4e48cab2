// The product of float32 rows with a matrix, on matrix units (VK_KHR_cooperative_matrix):
//     dst[m, n] = sum_k x[m, k] W[n, k] (* scale) (+ bias) (+ add)
//     BACKWARD: dst[m, n] = sum_k x[m, k] W[first_row + k, n] (+ dst[m, n])
// Units multiply float16 and add in float32. x comes as float16 parts h and l and a power of two
// for each row (matrix_split.comp), and W is brought into float16's range by a power of two:
// bfloat16 and float16 weights are exact then, and float32 weights are split, too.
//
// Defines   WEIGHT  type of W; WEIGHT_PARTS: rows that matrix_split.comp wrote
//           FAST    h alone: one product in float16
//           LARGE   tiles for many columns
// Buffers   see linear_matrix_params
// Grid      x = ceil(M / BM), y = ceil(N / BN), z = slices (WEIGHT_PARTS; else 1)
// Order     for each output: in each step of TK values h W and then l W (float32 weights: h W_h,
//           l W_h, h W_l); a partial sum for every SPAN blocks, and these in ascending order.
//           Inside a step the device decides. It never depends on the number of rows
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#define MATRIX_UNITS
#ifdef LARGE
#define MATRIX_WORKGROUP 6 // the constant that holds the size of the workgroup
#else
#define MATRIX_WORKGROUP 5
#endif
#include "types.glsl"
layout(push_constant, scalar) uniform Params { linear_matrix_params p; };

#include "linear_epilogue.glsl"
#include "matrix_scale.glsl"
#if WEIGHT == WEIGHT_PARTS
#define CELL 8
#else
#include "weights.glsl"
#endif

// Subgroups of a workgroup along m and n, and tiles of each of them.
#ifdef LARGE
const uint SM = 2, SN = 4, FM = 4, FN = 2;
#else
const uint SM = 2, SN = 2, FM = 2, FN = 2;
#endif
#ifdef FAST
const uint X_PARTS = 1, W_PARTS = 1;
#else
const uint X_PARTS = 2, W_PARTS = WEIGHT == WEIGHT_F32 || WEIGHT == WEIGHT_PARTS ? 2 : 1;
#endif
const uint BM = SM * FM * TM, BN = SN * FN * TN, BK = MATRIX_BLOCK, THREADS = SM * SN * SG;
const uint SPAN = 8; // blocks of a partial sum

// Tiles in shared memory, in cells of 8 float16, a row padded by one so that rows begin in
// different banks: x [part, m, k], W [part, n, k] or (BACKWARD) [part, k, n]. Results use the same
// memory.
#ifdef BACKWARD
const uint W_ROWS = BK, W_ROW = BN / 8 + 1;
#else
const uint W_ROWS = BN, W_ROW = BK / 8 + 1;
#endif
const uint X_ROW = BK / 8 + 1, W_TILE = X_PARTS * BM * X_ROW;
shared uvec4 tile[W_TILE + W_PARTS * W_ROWS * W_ROW];

// What an invocation fetches for the next block.
#if WEIGHT == WEIGHT_PARTS
const uint W_LOADS = W_PARTS * BN * BK / CELL;
#else
const uint W_LOADS = BN * BK / CELL;
#endif
const uint X_LOADS = X_PARTS * BM * BK / 8;
const uint X_EACH = (X_LOADS + THREADS - 1) / THREADS, W_EACH = (W_LOADS + THREADS - 1) / THREADS;
uvec4 x_next[X_EACH], w_next[W_EACH];

#if WEIGHT == WEIGHT_PARTS
uint slice_row() { return gl_WorkGroupID.z * p.n_rows; }
#else
uint slice_row() { return 0; }
#endif

// The cell of W that load e of a block takes. Cells past the end are those of another place in W,
// which meet zeros of x or columns that are not written.
uint w_at(uint e, uint n0, uint block) {
#if WEIGHT == WEIGHT_PARTS
    const uint part = e / (BN * BK / 8), n = min(n0 + e / (BK / 8) % BN, p.n_out - 1);
    return ((gl_WorkGroupID.z * p.n_out + n) * W_PARTS + part) * p.part_cells + block * (BK / 8) +
           e % (BK / 8);
#elif defined(BACKWARD)
    const uint n = p.first_row + min(block * BK + e % BK, p.n_sum - 1),
               cell = p.first_cell + min(n0 / CELL + e / BK, p.n_cells - 1);
    return (n / 32 * p.panel_cells + cell) * 32 + n % 32;
#else
    const uint n = min(n0 + e % BN, p.n_out - 1),
               cell = p.first_cell + min(block * (BK / CELL) + e / BN, p.n_cells - 1);
    return (n / 32 * p.panel_cells + cell) * 32 + n % 32;
#endif
}

void fetch(uint id, uint m0, uint n0, uint block) {
    [[unroll]] for (uint r = 0; r < X_EACH; r++) { // neighbours read neighbouring k of one row
        const uint e = min(r * THREADS + id, X_LOADS - 1), part = e / (BM * BK / 8),
                   m = min(m0 + e / (BK / 8) % BM, p.n_rows - 1);
        x_next[r] = p.x.at[((slice_row() + m) * X_PARTS + part) * p.part_cells + block * (BK / 8) +
                           e % (BK / 8)];
    }
    [[unroll]] for (uint r = 0; r < W_EACH; r++) // neighbours read one cell of neighbouring rows
        w_next[r] = p.weights.at[w_at(min(r * THREADS + id, W_LOADS - 1), n0, block)];
}

#if WEIGHT == WEIGHT_F32
// 4 values of part 0 (h) or 1 (l).
uvec2 half_values(vec4 w, uint part) {
    const uvec2 high = uvec2(packHalf2x16(w.xy), packHalf2x16(w.zw));
    if (part == 0)
        return high;
    return uvec2(packHalf2x16(w.xy - unpackHalf2x16(high.x)),
                 packHalf2x16(w.zw - unpackHalf2x16(high.y)));
}
#endif

void w_store(uint e, uvec4 raw, float factor) {
#if WEIGHT == WEIGHT_PARTS
    tile[W_TILE + e / (BK / 8) * W_ROW + e % (BK / 8)] = raw;
#else
    const uint row = e % W_ROWS, cell = e / W_ROWS;
#if WEIGHT == WEIGHT_F32
    [[unroll]] for (uint part = 0; part < W_PARTS; part++) {
        const uvec2 w = half_values(cell_values(raw, 0) * factor, part);
        const uint at = W_TILE + (part * W_ROWS + row) * W_ROW + cell / 2;
        if (cell % 2 == 0)
            tile[at].xy = w;
        else
            tile[at].zw = w;
    }
#else
#if WEIGHT == WEIGHT_BF16
    [[unroll]] for (uint quad = 0; quad < 2; quad++) {
        const vec4 w = cell_values(raw, quad) * factor;
        raw[2 * quad] = packHalf2x16(w.xy);
        raw[2 * quad + 1] = packHalf2x16(w.zw);
    }
#endif
    tile[W_TILE + row * W_ROW + cell] = raw;
#endif
#endif
}

void store(uint id, float factor) {
    [[unroll]] for (uint r = 0; r < X_EACH; r++) {
        const uint e = r * THREADS + id;
        if (e < X_LOADS)
            tile[e / (BK / 8) * X_ROW + e % (BK / 8)] = x_next[r];
    }
    [[unroll]] for (uint r = 0; r < W_EACH; r++)
        if (r * THREADS + id < W_LOADS)
            w_store(r * THREADS + id, w_next[r], factor);
}

// The tiles of a subgroup: the sum, its partial sum, and what is multiplied next.
coopmat<float, gl_ScopeSubgroup, TM, TN, gl_MatrixUseAccumulator> sums[FM][FN], part[FM][FN];
coopmat<float16_t, gl_ScopeSubgroup, TM, TK, gl_MatrixUseA> x[FM];
coopmat<float16_t, gl_ScopeSubgroup, TK, TN, gl_MatrixUseB> w[FN];
#define ZERO coopmat<float, gl_ScopeSubgroup, TM, TN, gl_MatrixUseAccumulator>(0.0)

#define FOR_TILES \
    [[unroll]] for (uint i = 0; i < FM; i++) [[unroll]] \
        for (uint j = 0; j < FN; j++)

// The subgroup's first row of x and first column of W are sm and sn of the workgroup's.
void w_load(uint w_part, uint k, uint sn) {
    [[unroll]] for (uint j = 0; j < FN; j++) {
#ifdef BACKWARD
        const uint at = W_TILE + (w_part * BK + k) * W_ROW + (sn + j * TN) / 8;
        coopMatLoad(w[j], tile, at, W_ROW, gl_CooperativeMatrixLayoutRowMajor);
#else
        const uint at = W_TILE + (w_part * BN + sn + j * TN) * W_ROW + k / 8;
        coopMatLoad(w[j], tile, at, W_ROW, gl_CooperativeMatrixLayoutColumnMajor);
#endif
    }
}

void block_multiply(uint sm, uint sn) {
    for (uint k = 0; k < BK; k += TK) {
        [[unroll]] for (uint w_part = 0; w_part < W_PARTS; w_part++) {
            w_load(w_part, k, sn);
            // not l with l, which is below float32's rounding
            [[unroll]] for (uint x_part = 0; x_part + w_part < X_PARTS; x_part++) {
                [[unroll]] for (uint i = 0; i < FM; i++)
                    coopMatLoad(x[i], tile, (x_part * BM + sm + i * TM) * X_ROW + k / 8, X_ROW,
                                gl_CooperativeMatrixLayoutRowMajor);
                FOR_TILES part[i][j] = coopMatMulAdd(x[i], w[j], part[i][j]);
            }
        }
    }
}

// Writes one result, which lacks the factors of its row and of W.
void result_write(uint m, uint n, float sum, float inverse) {
    sum *= p.scales.at[slice_row() + m];
#if WEIGHT == WEIGHT_PARTS
    sum *= p.range.at[gl_WorkGroupID.z * p.n_out + n];
    p.dst.at[(slice_row() + m) * p.out_stride + n] = sum;
#elif defined(BACKWARD)
    sum *= inverse;
    const uint at = m * p.out_stride + n;
    if ((p.flags & LINEAR_ADD) != 0)
        sum = p.dst.at[at] + sum;
    p.dst.at[at] = (p.flags & LINEAR_SCALE) != 0 ? sum * p.scale : sum;
#else
    sum *= inverse;
    p.dst.at[m * p.out_stride + n] = linear_epilogue(p, sum, m, n);
#endif
}

// Writes the sums, tile by tile through shared memory that no other subgroup uses.
void sums_write(uint m0, uint n0, float inverse) {
    const uint own = gl_SubgroupID * (TM * TN / 4);
    FOR_TILES {
        coopMatStore(sums[i][j], tile, own, TN / 4, gl_CooperativeMatrixLayoutRowMajor);
        subgroupBarrier();
        for (uint e = gl_SubgroupInvocationID; e < TM * TN; e += SG) {
            const uint m = m0 + i * TM + e / TN, n = n0 + j * TN + e % TN;
            if (m < p.n_rows && n < p.n_out)
                result_write(m, n, uintBitsToFloat(tile[own + e / 4][e % 4]), inverse);
        }
        subgroupBarrier();
    }
}

void main() {
    const uint id = gl_LocalInvocationID.x, m0 = gl_WorkGroupID.x * BM, n0 = gl_WorkGroupID.y * BN;
    const uint sm = gl_SubgroupID / SN * FM * TM, sn = gl_SubgroupID % SN * FN * TN;
#if WEIGHT == WEIGHT_F32 || WEIGHT == WEIGHT_BF16
    const uint exponent = matrix_exponent(floatBitsToUint(p.range.at[0]));
    const float factor = matrix_factor(exponent), inverse = matrix_inverse(exponent);
#else
    const float factor = 1, inverse = 1;
#endif
    const uint end = p.part_cells / (BK / 8);
    FOR_TILES sums[i][j] = ZERO;
    fetch(id, m0, n0, 0);
    for (uint block = 0; block < end;) {
        FOR_TILES part[i][j] = ZERO;
        const uint stop = min(block + SPAN, end);
        for (; block < stop; block++) {
            store(id, factor);
            barrier();
            if (block + 1 < end)
                fetch(id, m0, n0, block + 1);
            block_multiply(sm, sn);
            barrier();
        }
        FOR_TILES sums[i][j] += part[i][j];
    }
    sums_write(m0 + sm, n0 + sn, inverse);
}
