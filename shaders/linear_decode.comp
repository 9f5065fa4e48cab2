// dst[m, n] = finish(sum_k norm(x)[m, k] W[n, k]) (+ add), on real GPUs, for the few rows of
// decoding, whose time is that of reading the weights once.
//
// Define    RM         rows of x that a workgroup takes
//           NORM_KIND  norm of x: NORM_KIND_RMS, _LAYER or _NONE. Every workgroup repeats it, which
//                      costs less than a dispatch of its own and the wait for it
//           PAIRS      (optional) a lane also takes the column N / 2 further on, and writes
//                      act(first) * second
//           POST       (optional) x becomes x + RMS norm of `out_`, which the first workgroup of a
//                      row writes to `mid`
// Buffers   x [M, x_stride], weights: panels (linear.comp gives the layout), dst [M, out_stride]
// Grid      x = ceil(M / RM), y = ceil(N / (lanes * LANE_COLUMNS)). Of a workgroup of 256, `lanes`
//           lanes lie along the columns; the 256 / lanes groups of them share k, cell by cell, so
//           that narrow matrices still fill a GPU. A lane loads 16 bytes of W at once, and AHEAD
//           cells before it uses the first
// Order     one fma chain for each output and group, over ascending k; then the groups' sums are
//           added in the order of the groups. It depends on `lanes` and K, never on M. The norm
//           sums as norm.comp does with DECODE, and its products are rounded as there
#version 450
#extension GL_GOOGLE_include_directive : require
#define FIXED_WORKGROUP 256
#include "types.glsl"
#include "act.glsl"
#ifdef POST
#define ARGUMENTS linear_decode_post_params
#define FIRST_CELL 0
#else
#define ARGUMENTS linear_decode_params
#define FIRST_CELL p.first_cell
#endif
layout(push_constant, scalar) uniform Params { ARGUMENTS p; };

#include "linear_epilogue.glsl"
#include "weights.glsl"

#ifdef PAIRS
const uint SETS = 2, LANE_COLUMNS = 1;
#else
const uint SETS = 1, LANE_COLUMNS = RM >= 8 ? 2 : 1;
#endif
const uint COLUMNS = SETS * LANE_COLUMNS;
const uint AHEAD = RM == 1 ? 4 : RM == 2 ? 2 : 1;
const uint QUADS = CELL / 4;
shared float parts[RM * COLUMNS * WG];

#if NORM_KIND != NORM_KIND_NONE || defined(POST)
shared float row_parts[RM * 64];

// Sums over the workgroup, as workgroup_sum adds them, of all rows at once.
void rows_sum(inout float sums[RM]) {
    [[unroll]] for (int i = 0; i < RM; i++) {
        float of_subgroup = subgroupAdd(sums[i]);
        if (subgroupElect())
            row_parts[i * 64 + gl_SubgroupID] = of_subgroup;
    }
    barrier();
    [[unroll]] for (int i = 0; i < RM; i++) {
        float sum = 0;
        for (uint s = 0; s < WG / SG; s++)
            sum += row_parts[i * 64 + s];
        sums[i] = sum;
    }
    barrier();
}

// 1 / scale from a sum of squares, in two steps as in norm.comp
float inverse_of(float sum) {
    float scale = sqrt(sum / float(p.width) + p.eps);
    return 1.0 / uintBitsToFloat(floatBitsToUint(scale) | (p.flags & 0x80000000u));
}
#endif

#ifdef POST
// 1 / scale of the post-norm of each row
void rows_post_norm(uint row[RM], out float inverse[RM]) {
    float sums[RM];
    [[unroll]] for (int i = 0; i < RM; i++) {
        sums[i] = 0;
        for (uint k = gl_LocalInvocationID.x; k < p.width; k += WG) {
            float x = p.out_.at[(row[i] + k) / 4][k % 4];
            sums[i] = fma(x, x, sums[i]);
        }
    }
    rows_sum(sums);
    [[unroll]] for (int i = 0; i < RM; i++)
        inverse[i] = inverse_of(sums[i]);
}

// As in norm.comp: no contraction
float post_value(uint row, uint k, float inverse) {
    precise float x = p.out_.at[(row + k) / 4][k % 4];
    x *= inverse;
    x *= p.post_gain.at[k / 4][k % 4];
    x += p.x.at[(row + k) / 4][k % 4];
    return x;
}

vec4 post_values(uint row, uint quad, float inverse) {
    precise vec4 x = p.out_.at[row / 4 + quad];
    x = x * vec4(inverse);
    x = x * p.post_gain.at[quad];
    x = x + p.x.at[row / 4 + quad];
    return x;
}

// Writes mid of the workgroup's rows
void mid_write(uint m0, uint row[RM], float inverse[RM]) {
    [[unroll]] for (int i = 0; i < RM; i++)
        for (uint k = gl_LocalInvocationID.x; k < p.width && m0 + i < p.n_rows; k += WG)
            p.mid.at[row[i] + k] = post_value(row[i], k, inverse[i]);
}
#define STREAM(i, k) post_value(row[i], k, post[i])
#else
#define STREAM(i, k) p.x_floats.at[row[i] + (k)]
#endif

#if NORM_KIND != NORM_KIND_NONE
// Mean (0 for an RMS norm) and 1 / scale of each row; `row` is where a row of x begins, in floats,
// and `post` the 1 / scale of its post-norm.
void rows_norm(uint row[RM], float post[RM], out float mean[RM], out float inverse[RM]) {
    [[unroll]] for (int i = 0; i < RM; i++)
        mean[i] = 0;
#if NORM_KIND == NORM_KIND_LAYER
    precise float totals[RM];
    [[unroll]] for (int i = 0; i < RM; i++) {
        totals[i] = 0;
        for (uint k = gl_LocalInvocationID.x; k < p.width; k += WG)
            totals[i] += STREAM(i, k);
    }
    rows_sum(totals);
    [[unroll]] for (int i = 0; i < RM; i++) {
        totals[i] /= float(p.width);
        mean[i] = totals[i];
    }
#endif
    float sums[RM];
    [[unroll]] for (int i = 0; i < RM; i++) {
        sums[i] = 0;
        for (uint k = gl_LocalInvocationID.x; k < p.width; k += WG) {
            precise float x = STREAM(i, k);
#if NORM_KIND == NORM_KIND_LAYER
            x = x - mean[i];
#endif
            sums[i] = fma(x, x, sums[i]);
        }
    }
    rows_sum(sums);
    [[unroll]] for (int i = 0; i < RM; i++)
        inverse[i] = inverse_of(sums[i]);
}

vec4 normalize(vec4 x, float mean, float inverse, uint quad) {
    precise vec4 normed = x;
#if NORM_KIND == NORM_KIND_LAYER
    normed = normed - vec4(mean);
#endif
    normed = normed * vec4(inverse);
    normed = normed * p.gain.at[quad];
#if NORM_KIND == NORM_KIND_LAYER
    if ((p.flags & LINEAR_NORM_BIAS) != 0)
        normed = normed + p.norm_bias.at[quad];
#endif
    return normed;
}
#endif

// A quad of x as the product takes it
vec4 load_quad(uint row, uint quad, float post, float mean, float inverse) {
#ifdef POST
    vec4 x = post_values(row, quad, post);
#else
    vec4 x = p.x.at[row / 4 + quad];
#endif
#if NORM_KIND != NORM_KIND_NONE
    x = normalize(x, mean, inverse, quad);
#endif
    return x;
}

// Output n of row m, whose sums over k are `first` and, with PAIRS, `second` of column n + n_out.
float finish(float first, float second, uint m, uint n) {
#ifdef PAIRS
    float bias = 0, second_bias = 0;
    if ((p.flags & LINEAR_BIAS) != 0) {
        bias = p.bias.at[n];
        second_bias = p.bias.at[n + p.n_out];
    }
    first = linear_finish(first, p.flags, p.scale, bias, p.clip, p.softcap, 0.0);
    second = linear_finish(second, p.flags, p.scale, second_bias, p.clip, p.softcap, 0.0);
    return activate(p.act, first) * second;
#else
    float result = linear_epilogue(p, first, m, n);
    return (p.flags & LINEAR_ACT) != 0 ? activate(p.act, result) : result;
#endif
}

// Adds the groups' sums of every output of the workgroup, and writes what follows from them.
void write_results(uint id, uint m0, uint n0) {
    const uint splits = WG / p.lanes;
    for (uint o = id; o < RM * LANE_COLUMNS * p.lanes; o += WG) {
        const uint i = o / (LANE_COLUMNS * p.lanes), c = o / p.lanes % LANE_COLUMNS,
                   n = n0 + o % (LANE_COLUMNS * p.lanes), at = (i * COLUMNS + c) * WG + o % p.lanes;
        if (m0 + i >= p.n_rows || n >= p.n_out)
            continue;
        float first = parts[at], second = 0;
#ifdef PAIRS
        second = parts[at + WG];
#endif
        for (uint s = 1; s < splits; s++) {
            first += parts[at + s * p.lanes];
#ifdef PAIRS
            second += parts[at + WG + s * p.lanes];
#endif
        }
        p.dst.at[(m0 + i) * p.out_stride + n] = finish(first, second, m0 + i, n);
    }
}

// The first cell of row n of W.
uint weight_address(uint n) { return (n / 32 * p.panel_cells + FIRST_CELL) * 32 + n % 32; }

void main() {
    const uint id = gl_LocalInvocationID.x, column = id % p.lanes, split = id / p.lanes,
               splits = WG / p.lanes, m0 = gl_WorkGroupID.x * RM,
               n0 = gl_WorkGroupID.y * p.lanes * LANE_COLUMNS;
    uint w_at[COLUMNS];
    [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
        uint n = min(n0 + c % LANE_COLUMNS * p.lanes + column, p.n_out - 1);
        w_at[c] = weight_address(n + c / LANE_COLUMNS * p.n_out);
    }
    uint row[RM]; // in floats
    [[unroll]] for (int i = 0; i < RM; i++)
        row[i] = min(m0 + i, p.n_rows - 1) * p.x_stride;
    float post[RM], mean[RM], inverse[RM];
#ifdef POST
    rows_post_norm(row, post);
    if (gl_WorkGroupID.y == 0)
        mid_write(m0, row, post);
#endif
#if NORM_KIND != NORM_KIND_NONE
    rows_norm(row, post, mean, inverse);
#endif
    float acc[RM][COLUMNS];
    [[unroll]] for (uint e = 0; e < RM * COLUMNS; e++)
        acc[e / COLUMNS][e % COLUMNS] = 0;
    for (uint cell = split; cell < p.k_cells; cell += AHEAD * splits) {
        uvec4 raw[AHEAD][COLUMNS];
        vec4 x[AHEAD][RM][QUADS];
        // past the end the last cell is loaded again and not used
        [[unroll]] for (uint u = 0; u < AHEAD; u++) {
            const uint at = min(cell + u * splits, p.k_cells - 1);
            [[unroll]] for (uint c = 0; c < COLUMNS; c++)
                raw[u][c] = LOAD_CELL(w_at[c] + at * 32);
            [[unroll]] for (int i = 0; i < RM; i++) {
                [[unroll]] for (uint quad = 0; quad < QUADS; quad++)
                    x[u][i][quad] = load_quad(row[i], at * QUADS + quad, post[i], mean[i],
                                              inverse[i]);
            }
        }
        [[unroll]] for (uint u = 0; u < AHEAD; u++)
            if (cell + u * splits < p.k_cells) {
                [[unroll]] for (uint quad = 0; quad < QUADS; quad++) {
                    vec4 w[COLUMNS];
                    [[unroll]] for (uint c = 0; c < COLUMNS; c++)
                        w[c] = cell_values(raw[u][c], quad);
                    [[unroll]] for (int i = 0; i < RM; i++) {
                        [[unroll]] for (uint k = 0; k < 4; k++) {
                            [[unroll]] for (uint c = 0; c < COLUMNS; c++)
                                acc[i][c] = fma(x[u][i][quad][k], w[c][k], acc[i][c]);
                        }
                    }
                }
            }
    }
    [[unroll]] for (int i = 0; i < RM; i++) {
        [[unroll]] for (uint c = 0; c < COLUMNS; c++)
            parts[(i * COLUMNS + c) * WG + id] = acc[i][c];
    }
    barrier();
    write_results(id, m0, n0);
}
