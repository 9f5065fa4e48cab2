// Reads n_cells cells of 16 bytes once and does nothing else. Its speed is the bound that kernels
// limited by reading are measured against.
// Define    TEXELS  (optional) reads through a texel buffer, as weights are read where that is
//                   faster
// Buffers   x [n_cells], dst: one float
// Grid      x = subgroups. A subgroup reads cells_each consecutive cells; lanes lie side by side,
//           with four loads in flight
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
        p.dst.at[0] = 1.0; // hardly ever true; it keeps the compiler from removing the reads
}
