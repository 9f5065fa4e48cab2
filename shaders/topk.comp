// The k largest values of every row and their columns, kept while the columns arrive one vocabulary
// tile after another, so that no [rows, vocabulary] array exists.
// Buffers   x [n_rows, x_stride], factor [n_columns], values and indices [n_rows, k]
// Grid      x = ceil(rows / ROWS); a subgroup takes one row
//
// Nearly all columns fail one test, "is any of these above the k-th largest so far?", so the scan
// costs one load for each column. A value that passes replaces the smallest of an unordered list,
// of which every lane owns each SG-th entry, so no lane waits for another. About k (1 +
// ln(columns / k)) values pass where the columns come in no particular order. At the end of a tile
// the list is sorted: the place of a value is the number of values that stand before it.
//
// Equal values: columns arrive in ascending order, a value that only equals the smallest does not
// pass, and among equal smallest values the one with the highest index is replaced first. So the
// lower index stays.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { topk_params p; };

// rows of a workgroup, so that shared memory is 16 KiB at any subgroup size
const uint ROWS = WG / SG < 4 ? WG / SG : 4;
const uint AHEAD = 8; // columns that a lane loads at once
const float NOTHING = -3.402823466e38;
shared float values[4 * TOPK_MAX], indices[4 * TOPK_MAX];

// Of the lane's own entries, the one that is replaced first.
uint weakest(uint list) {
    uint entry = list + gl_SubgroupInvocationID;
    for (uint j = entry + SG; j < list + p.k; j += SG)
        if (values[j] < values[entry] ||
            (values[j] == values[entry] && indices[j] > indices[entry]))
            entry = j;
    return entry;
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
    uint entry = owner ? weakest(list) : 0;
    float mine = owner ? values[entry] : infinity,
          least = subgroupMin(mine); // a value must exceed it
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
                float last = subgroupMax(mine == least ? indices[entry] : -1.0);
                uint to = subgroupMin(mine == least && indices[entry] == last ? lane : SG);
                if (lane == to) {
                    values[entry] = top;
                    indices[entry] = float(p.first + c + u * SG + from);
                    entry = weakest(list);
                    mine = values[entry];
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
