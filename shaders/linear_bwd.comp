// dx[m, k] = sum_n dy[m, n] W[n, k]: the backward of linear.comp on the same panels, for drivers
// whose subgroups are vector registers (software).
//
// Defines   WEIGHT 0 float32, 1 bfloat16, 2 float16
//           RM    rows of dy a subgroup
//           TEXELS (optional) weights through a texel buffer and dy by 64-bit loads (needs
//                 shaderInt64); with the same bits
// Grid      x = ceil(M / RM), y = ceil(n_cells / WG)
//
// Lanes lie along cells of k: one 16-byte load of W feeds 4 or 8 chains of a lane, times RM rows.
// Neighbouring lanes read 512 bytes apart, but the 32 n of a panel use up each cache line. Order:
// every output is one chain acc = fma(dy, w, acc) over ascending n, whatever M and RM.
//
// More accumulators than there are registers: they lie on the stack. So a block of W that fills
// half of the registers (16 of 32) meets all rows before the next is taken, and a row's
// accumulators are loaded and stored once a block: 1.5 times as fast as once for each n.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { linear_bwd_params p; };

#include "weights.glsl"

const uint NB = 32;     // rows of W in a panel
const uint KB_MAX = 16; // the sum is padded to it
// n a step; 8 lanes: AVX2, whose code for 16 leaves the core's instruction cache
const uint KB = SG == 8 ? 4 : KB_MAX;
const uint BLOCK = 16 / CELL; // n a block

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
        [[unroll]] for (uint s = 0; s < KB; s += BLOCK) {
            uvec4 cells[BLOCK];
            [[unroll]] for (uint t = 0; t < BLOCK; t++)
                cells[t] = LOAD_CELL(w_at + row + s + t);
            float w[BLOCK][CELL];
            [[unroll]] for (uint t = 0; t < BLOCK; t++) {
                [[unroll]] for (uint c = 0; c < CELL; c++)
                    w[t][c] = cell_values(cells[t], c / 4)[c % 4];
            }
            [[unroll]] for (int i = 0; i < RM; i++) {
                [[unroll]] for (uint t = 0; t < BLOCK; t++) {
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
                    p.dx.at[(m0 + i) * p.x_stride + cell * CELL + c] = acc[i][c];
            }
    }
}
