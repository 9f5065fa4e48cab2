// The k largest of every row, kept while the columns go by tile after tile: no [rows x vocabulary]
// array is ever whole. A subgroup a row.
//
// Nearly all columns fail one test, "is any of these above the k-th so far?", so the scan costs a
// load a column. What passes takes the place of the smallest in a list without order, of which
// every lane owns each SG-th slot: no lane waits for another. About k (1 + ln(columns / k)) values
// pass where columns come in no order. At the end of a tile the list is sorted by counting, for
// each, how many stand before it.
//
// Equal values: columns come in ascending order, one that only equals the smallest does not pass,
// and of equal smallest the one with the highest index goes first. So the lower index stays.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { topk_params p; };

// rows of a workgroup, so that shared memory is 16 KiB at any subgroup size
const uint ROWS = WG / SG < 4 ? WG / SG : 4;
const uint AHEAD = 8; // columns a lane looks at together
const float NOTHING = -3.402823466e38;
shared float values[4 * TOPK_MAX], indices[4 * TOPK_MAX];

// Of the lane's own slots the first to go.
uint weakest(uint list) {
    uint slot = list + gl_SubgroupInvocationID;
    for (uint j = slot + SG; j < list + p.k; j += SG)
        if (values[j] < values[slot] || (values[j] == values[slot] && indices[j] > indices[slot]))
            slot = j;
    return slot;
}

void main() {
    const uint lane = gl_SubgroupInvocationID, row = gl_WorkGroupID.x * ROWS + gl_SubgroupID,
               list = gl_SubgroupID * TOPK_MAX;
    if (gl_SubgroupID >= ROWS || row >= p.n_rows)
        return;
    for (uint j = lane; j < p.k; j += SG) {
        values[list + j] = (p.flags & TOPK_BEGIN) != 0 ? NOTHING : p.values.at[row * p.k + j];
        indices[list + j] = (p.flags & TOPK_BEGIN) != 0 ? 0.0 : p.indices.at[row * p.k + j];
    }
    const bool owner = lane < p.k;
    const float infinity = uintBitsToFloat(0x7f800000u);
    uint slot = owner ? weakest(list) : 0;
    float mine = owner ? values[slot] : infinity, least = subgroupMin(mine); // the one to beat
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
                uint from = subgroupMin(v[u] == top ? lane : SG);
                float last = subgroupMax(mine == least ? indices[slot] : -1.0);
                uint to = subgroupMin(mine == least && indices[slot] == last ? lane : SG);
                if (lane == to) {
                    values[slot] = top;
                    indices[slot] = float(p.first + c + u * SG + from);
                    slot = weakest(list);
                    mine = values[slot];
                }
                least = subgroupMin(mine);
                v[u] = lane == from ? NOTHING : v[u];
            }
    }
    subgroupMemoryBarrierShared();
    subgroupBarrier();
    for (uint j = lane; j < p.k; j += SG) {
        float value = values[list + j], index = indices[list + j];
        uint before = 0;
        for (uint i = 0; i < p.k; i++) {
            float other = values[list + i], at = indices[list + i];
            before += other > value || (other == value && (at < index || (at == index && i < j)))
                          ? 1
                          : 0;
        }
        p.values.at[row * p.k + before] = value;
        p.indices.at[row * p.k + before] = index;
    }
}
