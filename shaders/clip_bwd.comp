// Backward of a clamp to +-limit, in place on d: 0 where the clamp moved x, which is the value
// before it.
// Buffers   d and x [T, stride]
// Grid      x = tokens; a workgroup takes one, its lanes the columns
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { clip_bwd_params p; };

void main() {
    const uint row = gl_WorkGroupID.x * p.stride;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG)
        if (abs(p.x.at[row + i]) > p.limit)
            p.d.at[row + i] = 0.0;
}
