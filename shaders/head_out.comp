// dst[h, n] = scale sum_i x[h / group, i] W[n, h * d_head + i] (* gain[n]): one vector for each
// key/value head, multiplied by the part of W_O that belongs to each query head. W_O is read once
// in one dispatch, where H products over slices would take H dispatches.
//
// Buffers   x [G, dh], weights: panels of W [N, H * dh] (linear.comp gives the layout), dst
//           [H, out_stride], gain [N]
// Grid      x = ceil(H / heads_each), y = ceil(N / columns of a workgroup). A subgroup goes through
//           its panel head after head, so it reads in order; lanes lie along n
// Order     one fma chain for each output, over ascending i, as in linear.comp. A head may begin
//           inside a cell: x counts as zero outside the head
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { head_out_params p; };

#include "weights.glsl"

const uint NB = 32, KB = 16; // columns in a panel; inputs in one step
const uint COLUMNS = SG < NB ? NB / SG : 1, COLUMNS_MAX = NB / 4;
const uint X_REGS = (KB + SG - 1) / SG, X_MAX = KB / 4;

void main() {
    const uint lane = gl_SubgroupInvocationID;
    const uint n0 = (gl_WorkGroupID.y * (WG / SG) + gl_SubgroupID) * SG * COLUMNS + lane;
    uint panel[COLUMNS_MAX]; // columns past the end read the last one and are not written
    [[unroll]] for (uint j = 0; j < COLUMNS; j++) {
        uint n = min(n0 + j * SG, p.n_out - 1);
        panel[j] = n / NB * p.panel_cells * NB + n % NB;
    }
    const uint head_end = min((gl_WorkGroupID.x + 1) * p.heads_each, p.n_heads);
    for (uint head = gl_WorkGroupID.x * p.heads_each; head < head_end; head++) {
        const uint first = head * p.d_head, last = first + p.d_head,
                   from = head / p.group * p.d_head;
        float acc[COLUMNS_MAX];
        [[unroll]] for (uint j = 0; j < COLUMNS; j++)
            acc[j] = 0;
        for (uint cell = first / CELL; cell * CELL < last; cell += KB / CELL) {
            float x[X_MAX];
            [[unroll]] for (uint r = 0; r < X_REGS; r++) {
                uint k = cell * CELL + min(r * SG + lane, KB - 1);
                x[r] = k >= first && k < last ? p.x.at[from + max(k, first) - first] : 0.0;
            }
            [[unroll]] for (uint s = 0; s < KB / CELL; s++) {
                uint at = min(cell + s, p.panel_cells - 1) * NB; // past the panel's end x is zero
                uvec4 cells[COLUMNS_MAX];
                [[unroll]] for (uint j = 0; j < COLUMNS; j++)
                    cells[j] = LOAD_CELL(panel[j] + at);
                [[unroll]] for (uint quad = 0; quad < CELL / 4; quad++) {
                    [[unroll]] for (uint c = 0; c < 4; c++) {
                        uint e = s * CELL + quad * 4 + c;
                        float value = subgroupBroadcast(x[e / SG], e % SG);
                        [[unroll]] for (uint j = 0; j < COLUMNS; j++)
                            acc[j] = fma(value, cell_values(cells[j], quad)[c], acc[j]);
                    }
                }
            }
        }
        [[unroll]] for (uint j = 0; j < COLUMNS; j++) {
            uint n = n0 + j * SG;
            if (n < p.n_out)
                p.dst.at[head * p.out_stride + n] = p.has_gain != 0
                                                        ? acc[j] * p.scale * p.gain.at[n]
                                                        : acc[j] * p.scale;
        }
    }
}
