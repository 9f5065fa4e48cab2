// dst[r] = the column of the largest of x[r, :], the first of equal ones; -1 where a value is not
// finite, or x[r, 0] is `empty` within +-near.
// Buffers   x [n, x_stride], dst [n]
// Grid      x = rows; a workgroup takes one, its lanes the columns
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { pick_params p; };

const uint AHEAD = 8; // columns that a lane loads at once

void main() {
    const uint row = gl_WorkGroupID.x * p.x_stride, lane = gl_LocalInvocationID.x;
    float best = uintBitsToFloat(0xff800000u);
    uint at = 0, largest = 0; // magnitude, as bits: those of infinity and of NaN are the largest
    for (uint c = lane; c < p.width; c += AHEAD * WG) {
        [[unroll]] for (uint u = 0; u < AHEAD; u++) {
            const uint column = min(c + u * WG, p.width - 1);
            const float x = p.x.at[row + column];
            largest = max(largest, floatBitsToUint(x) & 0x7fffffffu);
            if (x > best) {
                best = x;
                at = column;
            }
        }
    }
    const float top = workgroup_max(best),
                first = workgroup_max(best == top ? -float(at) : -16777216.0),
                bad = workgroup_max(largest >= 0x7f800000u ? 1.0 : 0.0);
    const bool look = bad > 0.0 || abs(p.x.at[row] - p.empty) <= p.near;
    if (lane == 0)
        p.dst.at[gl_WorkGroupID.x] = look ? -1.0 : -first;
}
