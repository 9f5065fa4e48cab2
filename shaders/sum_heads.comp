// dst[t, :] = sum over heads h of x[t, h, :] (+ bias): the attention output where its parts for the
// heads were edited.
// Buffers   x [T, H, head_stride], bias [width], dst [T, out_stride]
// Grid      x = tokens; a workgroup takes one, its lanes the columns
// Order     heads are added in ascending order, then the bias
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { sum_heads_params p; };

void main() {
    uint t = gl_WorkGroupID.x;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float sum = 0.0;
        for (uint h = 0; h < p.n_heads; h++)
            sum += p.x.at[(t * p.n_heads + h) * p.head_stride + i];
        if (p.has_bias != 0)
            sum += p.bias.at[i];
        p.dst.at[t * p.out_stride + i] = sum;
    }
}
