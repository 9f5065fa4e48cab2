// x[token, :] *= 1 + coefficient (w . x[token, :]), for every entry.
// Buffers   x [tokens, stride], entries [n], operand (w of an entry begins at its operand)
// Grid      x = entries; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { scale_dynamic_params p; };

void main() {
    const edit_entry entry = p.entries.at[gl_WorkGroupID.x];
    const uint base = entry.token * p.stride, lane = gl_LocalInvocationID.x;
    float sum = 0.0;
    for (uint i = lane; i < p.width; i += WG)
        sum = fma(p.x.at[base + i], p.operand.at[entry.operand + i], sum);
    const float factor = fma(entry.coefficient, workgroup_sum(sum), 1.0);
    for (uint i = lane; i < p.width; i += WG)
        p.x.at[base + i] *= factor;
}
