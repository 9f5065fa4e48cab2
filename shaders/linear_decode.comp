// dst[m, n] = sum_k x[m, k] W[n, k] (* scale) (+ bias) (+ add), on real GPUs, for the few rows of
// decoding, whose time is that of reading the weights once.
//
// Define    RM      rows of x that a workgroup takes
// Buffers   x [M, x_stride], weights: panels (linear.comp gives the layout), dst [M, out_stride]
// Grid      x = ceil(M / RM), y = panels. A workgroup of 256 takes a panel of 32 columns; each of
//           its eight groups of 32 lanes sums every eighth cell of k, so that narrow matrices still
//           fill a GPU
// Order     eight fma chains for each output, one for each group, over ascending k; then the eight
//           sums are added in the order of the groups. It depends on K alone, never on M
#version 450
#extension GL_GOOGLE_include_directive : require
#define FIXED_WORKGROUP 256
#include "types.glsl"
layout(push_constant, scalar) uniform Params { linear_params p; };

#include "linear_epilogue.glsl"
#include "weights.glsl"

const uint SPLITS = 8;
shared float parts[SPLITS][RM][32];

void main() {
    const uint id = gl_LocalInvocationID.x, column = id % 32, split = id / 32,
               m0 = gl_WorkGroupID.x * RM;
    const uint n = gl_WorkGroupID.y * 32 + column;
    const uint panel = (gl_WorkGroupID.y * p.panel_cells + p.first_cell) * 32 + column;
    float acc[RM];
    [[unroll]] for (int i = 0; i < RM; i++)
        acc[i] = 0;
    for (uint cell = split; cell < p.k_cells; cell += SPLITS) {
        uvec4 raw = LOAD_CELL(panel + cell * 32);
        [[unroll]] for (uint quad = 0; quad < CELL / 4; quad++) {
            vec4 w = cell_values(raw, quad);
            [[unroll]] for (int i = 0; i < RM; i++) {
                uint x_at = min(m0 + i, p.n_rows - 1) * p.x_stride + cell * CELL + quad * 4;
                [[unroll]] for (uint c = 0; c < 4; c++)
                    acc[i] = fma(p.x.at[x_at + c], w[c], acc[i]);
            }
        }
    }
    [[unroll]] for (int i = 0; i < RM; i++)
        parts[split][i][column] = acc[i];
    barrier();
    // Each group of lanes finishes the rows split, split + SPLITS, ...
    for (uint i = split; i < RM; i += SPLITS)
        if (m0 + i < p.n_rows && n < p.n_out) {
            float sum = parts[0][i][column];
            [[unroll]] for (uint s = 1; s < SPLITS; s++)
                sum += parts[s][i][column];
            p.dst.at[(m0 + i) * p.out_stride + n] = linear_epilogue(p, sum, m0 + i, n);
        }
}
