// Reads memory once and does nothing else: the ceiling that a kernel bound by reading is measured against. Each subgroup runs through its own stretch,
// lanes side by side, four loads in flight.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { read_params p; };

void main()
{
    uint group = gl_WorkGroupID.x * (WG / SG) + gl_SubgroupID, first = group * p.quads_each, sum = 0;
    uint last = min(first + p.quads_each, p.n_quads);
    for (uint i = first + gl_SubgroupInvocationID; i + 3 * SG < last; i += 4 * SG)
        [[unroll]] for (uint u = 0; u < 4; u++) {
            uvec2 v = p.x.at[i + u * SG];
            sum += v.x ^ v.y;
        }
    if (sum == 0x9e3779b9u)
        p.dst.at[0] = 1.0; // hardly ever; keeps the reads alive
}
