// dst[r] = x[r, :] . y[r, :]
// Buffers   x [n, x_stride], y [n, y_stride], dst [n]
// Grid      x = rows; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { row_dots_params p; };

void main() {
    const uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x;
    float sum = 0.0;
    for (uint i = lane; i < p.width; i += WG)
        sum = fma(p.x.at[r * p.x_stride + i], p.y.at[r * p.y_stride + i], sum);
    sum = workgroup_sum(sum);
    if (lane == 0)
        p.dst.at[r] = sum;
}
