// dx[m, k] = sum_n dy[m, n] W[n, k] (LINEAR_ADD: + dx[m, k]), on real GPUs.
// Buffers   dy [M, y_stride], weights: panels (linear.comp gives the layout), dx [M, x_stride]
// Grid      x = ceil(M / 64), y = ceil(K / 64). A workgroup of 128 computes 64 rows x 64 columns
//           from tiles in shared memory, and each invocation 8 x 4 of them. The next tiles are
//           loaded into registers while the present ones are multiplied
// Order     one fma chain for each output, over ascending n, as in linear_bwd.comp, so the results
//           are bit-identical
#version 450
#extension GL_GOOGLE_include_directive : require
#define FIXED_WORKGROUP 128
#include "types.glsl"
layout(push_constant, scalar) uniform Params { linear_bwd_params p; };

#include "weights.glsl"

const uint BM = 64, BK = 64, BN = 16;
shared float y_tile[BN][BM + 4]; // padded, so that rows begin in different banks
shared float w_tile[BN][BK + 4];

float y_next[BM * BN / 128];
uvec4 w_next[BK * BN / CELL / 128];

void fetch(uint id, uint m0, uint k0, uint n0) {
    [[unroll]] for (uint r = 0; r < BM * BN / 128; r++) { // 16 neighbours read 16 n of one row
        uint e = r * 128 + id, m = min(m0 + e / BN, p.n_rows - 1);
        y_next[r] = p.dy.at[m * p.y_stride + n0 + e % BN];
    }
    // 16 neighbours read one cell of 16 rows of W
    [[unroll]] for (uint r = 0; r < BK * BN / CELL / 128; r++) {
        uint e = r * 128 + id, n = p.first_n + n0 + e % BN,
             cell = min(k0 / CELL + e / BN, p.n_cells - 1);
        w_next[r] = LOAD_CELL((n / 32 * p.panel_cells + p.first_cell + cell) * 32 + n % 32);
    }
}

void main() {
    const uint id = gl_LocalInvocationID.x, m0 = gl_WorkGroupID.x * BM, k0 = gl_WorkGroupID.y * BK;
    const uint tx = id % 16, ty = id / 16; // 16 x 4 columns, 8 x 8 rows
    const uint n_k = p.n_cells * CELL;
    float acc[8][4];
    [[unroll]] for (int i = 0; i < 8; i++) {
        [[unroll]] for (int j = 0; j < 4; j++) {
            uint m = m0 + ty * 8 + i, k = k0 + tx + j * 16;
            acc[i][j] = (p.flags & LINEAR_ADD) != 0 && m < p.n_rows && k < n_k
                            ? p.dx.at[m * p.x_stride + k]
                            : 0.0;
        }
    }
    fetch(id, m0, k0, 0);
    for (uint n0 = 0; n0 < p.n_sum; n0 += BN) {
        [[unroll]] for (uint r = 0; r < BM * BN / 128; r++) {
            uint e = r * 128 + id;
            y_tile[e % BN][e / BN] = y_next[r];
        }
        [[unroll]] for (uint r = 0; r < BK * BN / CELL / 128; r++) {
            uint e = r * 128 + id;
            [[unroll]] for (uint quad = 0; quad < CELL / 4; quad++) {
                vec4 w = cell_values(w_next[r], quad);
                [[unroll]] for (uint c = 0; c < 4; c++)
                    w_tile[e % BN][e / BN * CELL + quad * 4 + c] = w[c];
            }
        }
        barrier();
        if (n0 + BN < p.n_sum)
            fetch(id, m0, k0, n0 + BN);
        // Unrolled only in part: software drivers take 10 s to compile the fully unrolled loop.
        for (uint four = 0; four < BN; four += 4) {
            [[unroll]] for (uint s = 0; s < 4; s++) {
                const uint n = four + s;
                float y[8], w[4];
                [[unroll]] for (int i = 0; i < 8; i++)
                    y[i] = y_tile[n][ty * 8 + i];
                [[unroll]] for (int j = 0; j < 4; j++)
                    w[j] = w_tile[n][tx + j * 16];
                [[unroll]] for (int i = 0; i < 8; i++) {
                    [[unroll]] for (int j = 0; j < 4; j++)
                        acc[i][j] = fma(y[i], w[j], acc[i][j]);
                }
            }
        }
        barrier();
    }
    [[unroll]] for (int i = 0; i < 8; i++) {
        [[unroll]] for (int j = 0; j < 4; j++) {
            uint m = m0 + ty * 8 + i, k = k0 + tx + j * 16;
            if (m < p.n_rows && k < n_k)
                p.dx.at[m * p.x_stride + k] = (p.flags & LINEAR_SCALE) != 0 ? acc[i][j] * p.scale
                                                                            : acc[i][j];
        }
    }
}
