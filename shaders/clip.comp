// A clamp to +-limit, in place.
// Buffers   x [T, stride]
// Grid      x = tokens; a workgroup takes one, its lanes the columns
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { clip_params p; };

void main() {
    const uint row = gl_WorkGroupID.x * p.stride;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG)
        p.x.at[row + i] = clamp(p.x.at[row + i], -p.limit, p.limit);
}
