// Backward of scale_dynamic: d = d (1 + coefficient (w . x)) + coefficient (x . d) w, for every
// entry, where x is what the forward kernel scaled.
// Buffers   d [tokens, stride] in place, x [tokens, x_stride], entries [n], operand
// Grid      x = entries; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { scale_dynamic_bwd_params p; };

void main() {
    const edit_entry entry = p.entries.at[gl_WorkGroupID.x];
    const uint base = entry.token * p.stride, from = entry.token * p.x_stride,
               lane = gl_LocalInvocationID.x;
    float along = 0.0, across = 0.0;
    for (uint i = lane; i < p.width; i += WG) {
        const float x = p.x.at[from + i];
        along = fma(x, p.operand.at[entry.operand + i], along);
        across = fma(x, p.d.at[base + i], across);
    }
    const float factor = fma(entry.coefficient, workgroup_sum(along), 1.0),
                slope = entry.coefficient * workgroup_sum(across);
    for (uint i = lane; i < p.width; i += WG)
        p.d.at[base + i] = fma(slope, p.operand.at[entry.operand + i], factor * p.d.at[base + i]);
}
