// The k largest of every row, kept while the columns go by tile after tile: no [rows x vocabulary] array is ever whole. A subgroup a row.
//
// Nearly all columns fail one test, "is any of these above the k-th so far?", so the scan costs a load a column and the lists hardly anything:
// about k (1 + ln(columns / k)) insertions a row where the columns come in no order.
//
// Columns come in ascending order and a value goes behind all that are not smaller, so equal values stand by index.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { topk_params p; };

const uint ROWS = WG / SG < 4 ? WG / SG : 4; // rows of a workgroup, so that shared memory is 16 KiB at any subgroup size
const uint AHEAD = 8;                        // columns a lane looks at together
const float NOTHING = -3.402823466e38;
shared float values[4 * TOPK_MAX], indices[4 * TOPK_MAX];

void synchronize() // among the lanes of the row
{
    subgroupMemoryBarrierShared();
    subgroupBarrier();
}

void insert(float value, float index, uint list)
{
    uint lane = gl_SubgroupInvocationID, before = 0;
    for (uint j = lane; j < p.k; j += SG)
        before += values[list + j] >= value ? 1 : 0;
    before = subgroupAdd(before);
    for (uint end = (p.k + SG - 1) / SG * SG; end > before; end -= min(end, SG)) { // from the end: what moves is read before it is written over
        uint j = end - SG + lane;
        bool moves = j < p.k && j > before;
        float v = moves ? values[list + j - 1] : value, i = moves ? indices[list + j - 1] : index;
        synchronize();
        if (j < p.k && j >= before) {
            values[list + j] = v;
            indices[list + j] = i;
        }
        synchronize();
    }
}

void main()
{
    const uint lane = gl_SubgroupInvocationID, row = gl_WorkGroupID.x * ROWS + gl_SubgroupID, list = gl_SubgroupID * TOPK_MAX;
    if (gl_SubgroupID >= ROWS || row >= p.n_rows)
        return;
    for (uint j = lane; j < p.k; j += SG) {
        values[list + j] = (p.flags & TOPK_BEGIN) != 0 ? NOTHING : p.values.at[row * p.k + j];
        indices[list + j] = (p.flags & TOPK_BEGIN) != 0 ? 0.0 : p.indices.at[row * p.k + j];
    }
    synchronize();
    float least = values[list + p.k - 1]; // the one to beat
    for (uint c = 0; c < p.n_columns; c += AHEAD * SG) {
        float v[AHEAD], best = NOTHING;
        [[unroll]] for (uint u = 0; u < AHEAD; u++) {
            uint column = min(c + u * SG + lane, p.n_columns - 1);
            float x = p.x.at[row * p.x_stride + column];
            if ((p.flags & TOPK_SCALED) != 0)
                x *= p.factor.at[column];
            v[u] = c + u * SG + lane < p.n_columns ? x : NOTHING;
            best = max(best, v[u]);
        }
        if (subgroupMax(best) <= least)
            continue;
        [[unroll]] for (uint u = 0; u < AHEAD; u++)
            for (float top = subgroupMax(v[u]); top > least; top = subgroupMax(v[u])) {
                uint first = subgroupMin(v[u] == top ? lane : SG);
                insert(top, float(p.first + c + u * SG + first), list);
                least = values[list + p.k - 1];
                v[u] = lane == first ? NOTHING : v[u];
            }
    }
    for (uint j = lane; j < p.k; j += SG) {
        p.values.at[row * p.k + j] = values[list + j];
        p.indices.at[row * p.k + j] = indices[list + j];
    }
}
