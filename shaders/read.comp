// Reads memory once and does nothing else: the ceiling that a kernel bound by reading is measured
// against. Each subgroup runs through its own stretch, lanes side by side, four loads in flight.
// TEXELS: through a texel buffer, as weights are read where that is faster.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { read_params p; };
#ifdef TEXELS
layout(set = 0, binding = 0) uniform usamplerBuffer texels;
#define LOAD(i) texelFetch(texels, int(i))
#else
#define LOAD(i) p.x.at[i]
#endif

void main() {
    uint group = gl_WorkGroupID.x * (WG / SG) + gl_SubgroupID, first = group * p.cells_each;
    uint last = min(first + p.cells_each, p.n_cells);
    uvec4 sum = uvec4(0);
    for (uint i = first + gl_SubgroupInvocationID; i + 3 * SG < last; i += 4 * SG) {
        [[unroll]] for (uint u = 0; u < 4; u++)
            sum += LOAD(i + u * SG);
    }
    if (sum == uvec4(0x9e3779b9u))
        p.dst.at[0] = 1.0; // hardly ever; keeps the reads alive
}
