// dst[r, :] = sum over a range of rows t of weights[t] x[t, :]
// Buffers   x [T, stride], weights [T], ranges [n, 2], dst [n, width]
// Grid      x = ranges; a workgroup takes one, its lanes the columns
// Order     one fma chain over ascending t
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { row_sums_params p; };

void main() {
    const uint r = gl_WorkGroupID.x, first = p.ranges.at[2 * r], end = p.ranges.at[2 * r + 1];
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float sum = 0.0;
        for (uint t = first; t < end; t++)
            sum = fma(p.weights.at[t], p.x.at[t * p.stride + i], sum);
        p.dst.at[r * p.width + i] = sum;
    }
}
