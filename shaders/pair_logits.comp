// logits[e, j] = cap(normed[e, j, :] . rows[2j, :] (+ bias)), cap(normed[e, j, :] . rows[2j + 1, :]
// (+ bias)), with cap the soft cap.
// Buffers   normed [entries, n, stride], rows [2n, stride], logits [entries, n, 2], bias [V], ids
//           [2n]
// Grid      x = rows j, y = entries; a workgroup takes one of each, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { pair_logits_params p; };

void main() {
    const uint j = gl_WorkGroupID.x, e = gl_WorkGroupID.y, lane = gl_LocalInvocationID.x;
    const uint at = (e * p.n + j) * p.stride, a_at = 2 * j * p.stride, b_at = a_at + p.stride;
    float a = 0.0, b = 0.0;
    for (uint i = lane; i < p.width; i += WG) {
        float x = p.normed.at[at + i];
        a = fma(x, p.rows.at[a_at + i], a);
        b = fma(x, p.rows.at[b_at + i], b);
    }
    a = workgroup_sum(a);
    b = workgroup_sum(b);
    if (p.has_bias != 0) {
        a += p.bias.at[p.ids.at[2 * j].id];
        b += p.bias.at[p.ids.at[2 * j + 1].id];
    }
    if (p.softcap != 0.0) {
        a = p.softcap * tanh(clamp(a / p.softcap, -15.0, 15.0));
        b = p.softcap * tanh(clamp(b / p.softcap, -15.0, 15.0));
    }
    if (lane == 0) {
        p.logits.at[2 * (e * p.n + j)] = a;
        p.logits.at[2 * (e * p.n + j) + 1] = b;
    }
}
