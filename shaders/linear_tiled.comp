// dst[m, n] = sum_k x[m, k] W[n, k] (* scale) (+ bias) (+ add), on real GPUs, for many rows.
// Buffers   x [M, x_stride], weights: panels (linear.comp gives the layout), dst [M, out_stride]
// Grid      x = ceil(M / 64), y = ceil(N / 64). A workgroup of 128 computes 64 rows x 64 columns
//           from tiles in shared memory (8.5 KiB), and each invocation 8 x 4 of them. The next
//           tiles are loaded into registers while the present ones are multiplied
// Order     one fma chain for each output, over ascending k, and the epilogue of linear.comp, so
//           the results are bit-identical
#version 450
#extension GL_GOOGLE_include_directive : require
#define FIXED_WORKGROUP 128
#include "types.glsl"
layout(push_constant, scalar) uniform Params { linear_params p; };

#include "linear_epilogue.glsl"
#include "weights.glsl"

const uint BM = 64, BN = 64, BK = 16;
shared float x_tile[BK][BM + 4]; // padded, so that rows begin in different banks
shared float w_tile[BK][BN + 4];

float x_next[BM * BK / 128];
uvec4 w_next[BN * BK / CELL / 128];

void fetch(uint id, uint m0, uint n0, uint cell) {
    [[unroll]] for (uint r = 0; r < BM * BK / 128; r++) { // 16 neighbours read 16 k of one row
        uint e = r * 128 + id, m = min(m0 + e / BK, p.n_rows - 1);
        x_next[r] = p.x.at[m * p.x_stride + cell * CELL + e % BK];
    }
    // 32 neighbours read one cell of 32 columns
    [[unroll]] for (uint r = 0; r < BN * BK / CELL / 128; r++) {
        uint e = r * 128 + id, n = min(n0 + e % BN, p.n_out - 1);
        w_next[r] =
            LOAD_CELL((n / 32 * p.panel_cells + p.first_cell + cell + e / BN) * 32 + n % 32);
    }
}

void main() {
    const uint id = gl_LocalInvocationID.x, m0 = gl_WorkGroupID.x * BM, n0 = gl_WorkGroupID.y * BN;
    const uint tx = id % 16, ty = id / 16; // 16 x 4 columns, 8 x 8 rows
    float acc[8][4];
    [[unroll]] for (int i = 0; i < 8; i++) {
        [[unroll]] for (int j = 0; j < 4; j++)
            acc[i][j] = 0;
    }
    fetch(id, m0, n0, 0);
    for (uint cell = 0; cell < p.k_cells; cell += BK / CELL) {
        [[unroll]] for (uint r = 0; r < BM * BK / 128; r++) {
            uint e = r * 128 + id;
            x_tile[e % BK][e / BK] = x_next[r];
        }
        [[unroll]] for (uint r = 0; r < BN * BK / CELL / 128; r++) {
            uint e = r * 128 + id;
            [[unroll]] for (uint quad = 0; quad < CELL / 4; quad++) {
                vec4 w = cell_values(w_next[r], quad);
                [[unroll]] for (uint c = 0; c < 4; c++)
                    w_tile[e / BN * CELL + quad * 4 + c][e % BN] = w[c];
            }
        }
        barrier();
        if (cell + BK / CELL < p.k_cells)
            fetch(id, m0, n0, cell + BK / CELL);
        // Unrolled only in part: software drivers take 10 s to compile the fully unrolled loop.
        for (uint four = 0; four < BK; four += 4) {
            [[unroll]] for (uint s = 0; s < 4; s++) {
                const uint k = four + s;
                float x[8], w[4];
                [[unroll]] for (int i = 0; i < 8; i++)
                    x[i] = x_tile[k][ty * 8 + i];
                [[unroll]] for (int j = 0; j < 4; j++)
                    w[j] = w_tile[k][tx + j * 16];
                [[unroll]] for (int i = 0; i < 8; i++) {
                    [[unroll]] for (int j = 0; j < 4; j++)
                        acc[i][j] = fma(x[i], w[j], acc[i][j]);
                }
            }
        }
        barrier();
    }
    [[unroll]] for (int i = 0; i < 8; i++) {
        [[unroll]] for (int j = 0; j < 4; j++) {
            uint m = m0 + ty * 8 + i, n = n0 + tx + j * 16;
            if (m < p.n_rows && n < p.n_out)
                p.dst.at[m * p.out_stride + n] = linear_epilogue(p, acc[i][j], m, n);
        }
    }
}
