// dst[m, n] = sum_k x[m, k] W[n, k] (* scale) (+ bias) (+ add): the matrix kernel for drivers whose
// subgroups are vector registers (software).
//
// Define    WEIGHT  0 float32, 1 bfloat16, 2 float16
//           RM      rows of x that a subgroup takes
//           RN      columns that a lane takes, so that a subgroup covers SG * RN columns. Without
//                   RN a subgroup covers one panel: for few rows, reading a part of a panel would
//                   cost 2 to 4 times as much. Those variants understand LINEAR_NORM, with the
//                   arithmetic and the order of norm.comp where a workgroup is one subgroup. Every
//                   panel repeats the norm, which costs less than the dispatch that it saves (about
//                   40 us on lavapipe)
//           PAIRS   (optional, without RN) a subgroup also takes the columns that belong to its
//                   own, and finishes both together: gate with up, or the two halves of a head for
//                   the rotation. The chains are the same, and the arithmetic of act.comp or
//                   rope.comp follows
//           TEXELS  (optional) reads the weights through a texel buffer and x by 64-bit loads,
//                   which need shaderInt64. The results are bit-identical
// Buffers   x [M, x_stride], weights: panels, dst [M, out_stride], bias [N], add [M, out_stride],
//           gain [K]
// Grid      x = ceil(M / RM), y = ceil(N / (RN * WG)). Rows vary fastest, so that a panel stays in
//           cache while all rows use it
// Order     one chain acc = fma(x, w, acc) for each output, over ascending k from zero. The shape
//           of a tile only decides which lane holds which chain, so all variants and all M give
//           bit-identical results
//
// Panels: a cell is 16 bytes, 4 or 8 consecutive k of one column n. It lies at
//     e(n, k) = ((n / 32) * panel_cells + k / CELL) * 32 + n % 32,
// with N padded to 32 and K to 16 by zeros.
//
// Why this shape: on lavapipe a load from a buffer in a loop is a gather, which costs per element,
// not per byte, while a broadcast from a constant lane is one or two shuffles and a texel is one
// load. So lanes lie along n, lanes along k load the tile of x once and broadcast it, and tiles are
// large. Shared memory and uniform buffers are several times slower there (docs/decisions.md).
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

#ifdef PAIRS
layout(push_constant, scalar) uniform Params { linear_pairs_params p; };
#include "act.glsl"
const uint SETS = 2; // of columns
uint column(uint n, uint set) { return n / p.half_ * 2 * p.half_ + n % p.half_ + set * p.half_; }
#define FIRST_CELL 0
#else
layout(push_constant, scalar) uniform Params { linear_params p; };
#include "linear_epilogue.glsl"
const uint SETS = 1;
uint column(uint n, uint set) { return n; }
#define FIRST_CELL p.first_cell
#endif

#include "weights.glsl"

const uint NB = 32;     // columns in a panel
const uint KB_MAX = 16; // K is padded to it
// k in one step. With 8 lanes (AVX2) the code for 16 (30 KB at 16 x 4) does not fit the instruction
// cache of a core
const uint KB = SG == 8 ? 8 : KB_MAX;

#ifdef RN
const uint COLUMNS = RN, COLUMNS_MAX = RN;
#else
const uint COLUMNS = SG < NB ? NB / SG : 1, COLUMNS_MAX = NB / 4;
#endif

// One load returns XV floats of x. Element e = row * KB + k of the tile of x lives in register
// e / XV / SG of lane e / XV % SG.
#ifdef TEXELS
#define XV 2
#define X_TYPE vec2
#define LOAD_X(i) uintBitsToFloat(unpack32(p.x.at[i]))
#define X_PART(v, e) v[(e) % 2]
#else
#define XV 1
#define X_TYPE float
#define LOAD_X(i) p.x.at[i]
#define X_PART(v, e) v
#endif
const uint X_REGS = (RM * KB / XV + SG - 1) / SG;
const uint X_MAX = RM * KB_MAX / XV / 4 + 1; // at the smallest SG, 4

#ifndef RN
// 1 / rms of the row that begins at float `row` of x, computed as norm.comp does it where a
// workgroup is one subgroup.
float row_inverse(uint row, uint lane) {
    float sum = 0.0;
    for (uint i = lane; i < p.width; i += SG) {
        float x = X_PART(LOAD_X((row + i) / XV), i);
        sum = fma(x, x, sum);
    }
    float scale = sqrt(subgroupAdd(sum) / float(p.width) + p.eps);
    return 1.0 / scale;
}

// For each element of the tile of x that this lane holds, 1 / rms of its row.
void row_inverses(uint m0, uint lane, out float inverse[X_MAX]) {
    [[unroll]] for (int i = 0; i < RM; i++) {
        float of_row = row_inverse(min(m0 + i, p.n_rows - 1) * p.x_stride, lane);
        [[unroll]] for (uint r = 0; r < X_REGS; r++)
            if ((r * SG + lane) * XV / KB == i)
                inverse[r] = of_row;
    }
}

// The elements of x from column k on that one load returned, divided by the rms and multiplied by
// the gain. The two products are rounded separately, as in norm.comp.
X_TYPE normalize(X_TYPE x, float inverse, uint k) {
    [[unroll]] for (uint v = 0; v < XV; v++) {
        precise float normed = X_PART(x, v) * inverse;
        normed *= p.gain.at[k + v];
        X_PART(x, v) = normed;
    }
    return x;
}
#endif

// The first cell of a column of W: column n of the result, in one of its sets. A column past the
// end reads the last one and is not written.
uint weight_address(uint n, uint set) {
    n = column(min(n, p.n_out - 1), set);
    return (n / NB * p.panel_cells + FIRST_CELL) * NB + n % NB;
}

// The load that holds element e of the first tile of x. A row past the end reads the last one and
// is not written.
uint x_address(uint m0, uint e) {
    return (min(m0 + min(e / KB, RM - 1), p.n_rows - 1) * p.x_stride + e % KB) / XV;
}

#ifdef PAIRS
void write_result(uint m, uint n, float first, float second) {
    const uint head = n / p.half_, i = n % p.half_;
    if ((p.flags & LINEAR_BIAS) != 0) {
        first += p.bias.at[column(n, 0)];
        second += p.bias.at[column(n, 1)];
    }
    if (p.kind == PAIRS_GATE) {
        p.dst.at[m * p.out_stride + n] = activate(p.act, first) * second;
        return;
    }
    const token_meta token = p.tokens.at[m];
    const uint kv_width = p.n_kv_heads * 2 * p.half_;
    if (head < p.n_heads + p.n_kv_heads) {
        float c = p.angles.at[(token.angle * p.half_ + i) * 2],
              s = p.angles.at[(token.angle * p.half_ + i) * 2 + 1], a = first, b = second;
        first = a * c - b * s;
        second = b * c + a * s;
    }
    if (head < p.n_heads) {
        uint at = m * p.out_stride + head * 2 * p.half_ + i;
        p.dst.at[at] = first;
        p.dst.at[at + p.half_] = second;
    } else if (head < p.n_heads + p.n_kv_heads) {
        uint at = token.slot * kv_width + (head - p.n_heads) * 2 * p.half_ + i;
        p.k_cache.at[at] = first;
        p.k_cache.at[at + p.half_] = second;
    } else {
        uint at = token.slot * kv_width + (head - p.n_heads - p.n_kv_heads) * 2 * p.half_ + i;
        p.v_cache.at[at] = first;
        p.v_cache.at[at + p.half_] = second;
    }
}
#else
void write_result(uint m, uint n, float sum, float unused) {
    p.dst.at[m * p.out_stride + n] = linear_epilogue(p, sum, m, n);
}
#endif

void main() {
    const uint lane = gl_SubgroupInvocationID;
    const uint m0 = gl_WorkGroupID.x * RM;
    const uint n0 = (gl_WorkGroupID.y * (WG / SG) + gl_SubgroupID) * SG * COLUMNS + lane;

    uint w_at[SETS * COLUMNS_MAX];
    [[unroll]] for (uint j = 0; j < SETS * COLUMNS; j++)
        w_at[j] = weight_address(n0 + j % COLUMNS * SG, j / COLUMNS);
    uint x_at[X_MAX];
    [[unroll]] for (uint r = 0; r < X_REGS; r++)
        x_at[r] = x_address(m0, (r * SG + lane) * XV);
#ifndef RN
    float inverse[X_MAX];
    if ((p.flags & LINEAR_NORM) != 0)
        row_inverses(m0, lane, inverse);
#endif
    float acc[RM][SETS * COLUMNS_MAX];
    [[unroll]] for (int i = 0; i < RM; i++) {
        [[unroll]] for (uint j = 0; j < SETS * COLUMNS; j++)
            acc[i][j] = 0;
    }

    for (uint cell = 0; cell < p.k_cells; cell += KB / CELL) {
        X_TYPE x[X_MAX];
        [[unroll]] for (uint r = 0; r < X_REGS; r++)
            x[r] = LOAD_X(x_at[r] + cell * (CELL / XV));
#ifndef RN
        if ((p.flags & LINEAR_NORM) != 0) {
            [[unroll]] for (uint r = 0; r < X_REGS; r++)
                x[r] = normalize(x[r], inverse[r], cell * CELL + (r * SG + lane) * XV % KB);
        }
#endif
        [[unroll]] for (uint s = 0; s < KB / CELL; s++) {
            uvec4 cells[SETS * COLUMNS_MAX];
            [[unroll]] for (uint j = 0; j < SETS * COLUMNS; j++)
                cells[j] = LOAD_CELL(w_at[j] + (cell + s) * NB);
            [[unroll]] for (uint quad = 0; quad < CELL / 4; quad++) {
                vec4 w[SETS * COLUMNS_MAX];
                [[unroll]] for (uint j = 0; j < SETS * COLUMNS; j++)
                    w[j] = cell_values(cells[j], quad);
                [[unroll]] for (int i = 0; i < RM; i++) {
                    [[unroll]] for (int c = 0; c < 4; c++) {
                        uint e = i * KB + s * CELL + quad * 4 + c;
                        float value = subgroupBroadcast(X_PART(x[e / XV / SG], e), e / XV % SG);
                        [[unroll]] for (uint j = 0; j < SETS * COLUMNS; j++)
                            acc[i][j] = fma(value, w[j][c], acc[i][j]);
                    }
                }
            }
        }
    }

    [[unroll]] for (int i = 0; i < RM; i++)
        if (m0 + i < p.n_rows) {
            [[unroll]] for (uint j = 0; j < COLUMNS; j++)
                if (n0 + j * SG < p.n_out)
                    write_result(m0 + i, n0 + j * SG, acc[i][j], acc[i][(SETS - 1) * COLUMNS + j]);
        }
}
