// dx[m, k] = sum_n dy[m, n] W[n, k] (LINEAR_ADD: + dx[m, k]): the backward of linear.comp on the
// same panels, for drivers whose subgroups are vector registers (software).
//
// Define    WEIGHT  0 float32, 1 bfloat16, 2 float16
//           RM      rows of dy that a subgroup takes
//           TEXELS  (optional) reads the weights through a texel buffer and dy by 64-bit loads,
//                   which need shaderInt64. The results are bit-identical
// Buffers   dy [M, y_stride], weights: panels (linear.comp gives the layout), dx [M, x_stride]
// Grid      x = ceil(M / RM), y = ceil(n_cells / WG); lanes lie along cells of k
// Order     one chain acc = fma(dy, w, acc) for each output, over ascending n, whatever M and RM
//           are
//
// One 16-byte load of W serves 4 or 8 chains of a lane in each of RM rows. Neighbouring lanes read
// 512 bytes apart, but the 32 rows n of a panel use every byte of a cache line in the end.
//
// There are more accumulators than registers, so they lie on the stack. A register tile of W, which
// fills half of the registers (16 of 32), therefore meets all rows before the next one is loaded,
// and the accumulators of a row are loaded and stored once for each tile. This is 1.5 times as fast
// as loading and storing them for each n.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { linear_bwd_params p; };

#include "weights.glsl"

const uint NB = 32;     // rows of W in a panel
const uint KB_MAX = 16; // the sum is padded to it
// n in one step. With 8 lanes (AVX2) the code for 16 does not fit the instruction cache of a core
const uint KB = SG == 8 ? 4 : KB_MAX;
const uint TILE = 16 / CELL; // n of a register tile

#ifdef TEXELS
#define YV 2
#define Y_TYPE vec2
#define LOAD_Y(i) uintBitsToFloat(unpack32(p.dy.at[i]))
#define Y_PART(v, e) v[(e) % 2]
#else
#define YV 1
#define Y_TYPE float
#define LOAD_Y(i) p.dy.at[i]
#define Y_PART(v, e) v
#endif
const uint Y_REGS = (RM * KB / YV + SG - 1) / SG;
const uint Y_MAX = RM * KB_MAX / YV / 4 + 1; // at the smallest SG, 4

void main() {
    const uint lane = gl_SubgroupInvocationID;
    const uint m0 = gl_WorkGroupID.x * RM;
    const uint cell = (gl_WorkGroupID.y * (WG / SG) + gl_SubgroupID) * SG + lane;
    // cells past the end read the last one and are not written
    const uint w_at = (p.first_cell + min(cell, p.n_cells - 1)) * NB;

    uint y_at[Y_MAX]; // rows past the end read the last one and are not written
    [[unroll]] for (uint r = 0; r < Y_REGS; r++) {
        uint e = (r * SG + lane) * YV;
        y_at[r] = (min(m0 + min(e / KB, RM - 1), p.n_rows - 1) * p.y_stride + e % KB) / YV;
    }
    float acc[RM][CELL];
    [[unroll]] for (int i = 0; i < RM; i++) {
        [[unroll]] for (uint c = 0; c < CELL; c++)
            acc[i][c] = 0.0;
    }
    if ((p.flags & LINEAR_ADD) != 0 && cell < p.n_cells) {
        [[unroll]] for (int i = 0; i < RM; i++)
            if (m0 + i < p.n_rows) {
                [[unroll]] for (uint c = 0; c < CELL; c++)
                    acc[i][c] = p.dx.at[(m0 + i) * p.x_stride + cell * CELL + c];
            }
    }

    for (uint n = 0; n < p.n_sum; n += KB) {
        Y_TYPE y[Y_MAX];
        [[unroll]] for (uint r = 0; r < Y_REGS; r++)
            y[r] = LOAD_Y(y_at[r] + n / YV);
        const uint row = (p.first_n + n) / NB * p.panel_cells * NB + (p.first_n + n) % NB;
        [[unroll]] for (uint s = 0; s < KB; s += TILE) {
            uvec4 cells[TILE];
            [[unroll]] for (uint t = 0; t < TILE; t++)
                cells[t] = LOAD_CELL(w_at + row + s + t);
            float w[TILE][CELL];
            [[unroll]] for (uint t = 0; t < TILE; t++) {
                [[unroll]] for (uint c = 0; c < CELL; c++)
                    w[t][c] = cell_values(cells[t], c / 4)[c % 4];
            }
            [[unroll]] for (int i = 0; i < RM; i++) {
                [[unroll]] for (uint t = 0; t < TILE; t++) {
                    uint e = i * KB + s + t;
                    float value = subgroupBroadcast(Y_PART(y[e / YV / SG], e), e / YV % SG);
                    [[unroll]] for (uint c = 0; c < CELL; c++)
                        acc[i][c] = fma(value, w[t][c], acc[i][c]);
                }
            }
        }
    }

    if (cell < p.n_cells) {
        [[unroll]] for (int i = 0; i < RM; i++)
            if (m0 + i < p.n_rows) {
                [[unroll]] for (uint c = 0; c < CELL; c++)
                    p.dx.at[(m0 + i) * p.x_stride + cell * CELL + c] = (p.flags & LINEAR_SCALE) != 0
                                                                           ? acc[i][c] * p.scale
                                                                           : acc[i][c];
            }
    }
}
