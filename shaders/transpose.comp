// Panels of W [N, K] -> panels of a slice of its transpose, so that the forward product of linear.comp runs the way back: no value changes.
//
// Defines   HALVES (weights of 2 bytes; else float32)
// Grid      x = cells of n (folded over y where a dimension is too short), a lane a cell of k
//
// A lane turns one square of CELL x CELL values: consecutive cells on both sides.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { transpose_params p; };

const uint NB = 32;

void main()
{
    const uint j = gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x; // cell of n
    const uint c = gl_WorkGroupID.z * WG + gl_LocalInvocationID.x;           // cell of k, counted from first_cell
    if (j >= p.n_cells || c >= p.k_cells)
        return;
#ifdef HALVES
    const uint n = p.first_n + j * 8, k = c * 8;
#else
    const uint n = p.first_n + j * 4, k = c * 4;
#endif
    const uint from = (n / NB * p.panel_cells + p.first_cell + c) * NB + n % NB;
    const uint to = (k / NB * p.out_cells + p.first_out + j) * NB + k % NB;
#ifdef HALVES
    uvec4 w[8];
    [[unroll]] for (uint i = 0; i < 8; i++)
        w[i] = p.weights.at[from + i];
    [[unroll]] for (uint i = 0; i < 4; i++) { // words of a cell: values 2i and 2i + 1 of k
        uvec4 low, high;
        [[unroll]] for (uint q = 0; q < 4; q++) {
            low[q] = (w[2 * q][i] & 0xffff) | w[2 * q + 1][i] << 16;
            high[q] = w[2 * q][i] >> 16 | (w[2 * q + 1][i] & 0xffff0000u);
        }
        p.dst.at[to + 2 * i] = low;
        p.dst.at[to + 2 * i + 1] = high;
    }
#else
    uvec4 w[4];
    [[unroll]] for (uint i = 0; i < 4; i++)
        w[i] = p.weights.at[from + i];
    [[unroll]] for (uint i = 0; i < 4; i++)
        p.dst.at[to + i] = uvec4(w[0][i], w[1][i], w[2][i], w[3][i]);
#endif
}
