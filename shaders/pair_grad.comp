// dnormed[r, :] = weight * (a' W[a, :] - b' W[b, :]) and logits[r] = (a, b): the gradient of a
// difference of two logits of row r with respect to the normalised final stream. a' and b' are the
// slopes of the soft cap.
// Buffers   normed and dnormed [n, stride], rows [2n, stride], weights [n], logits [n, 2], bias
// [V],
//           ids [2n]
// Grid      x = rows; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { pair_grad_params p; };

void main() {
    uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, at = r * p.stride,
         a_at = 2 * r * p.stride, b_at = a_at + p.stride;
    float a = 0.0, b = 0.0;
    for (uint i = lane; i < p.width; i += WG) {
        float x = p.normed.at[at + i];
        a = fma(x, p.rows.at[a_at + i], a);
        b = fma(x, p.rows.at[b_at + i], b);
    }
    a = workgroup_sum(a);
    b = workgroup_sum(b);
    if (p.has_bias != 0) {
        a += p.bias.at[p.ids.at[2 * r].id];
        b += p.bias.at[p.ids.at[2 * r + 1].id];
    }
    float a_slope = 1.0, b_slope = 1.0;
    if (p.softcap != 0.0) {
        float ta = tanh(clamp(a / p.softcap, -15.0, 15.0)),
              tb = tanh(clamp(b / p.softcap, -15.0, 15.0));
        a = p.softcap * ta;
        b = p.softcap * tb;
        a_slope = 1.0 - ta * ta;
        b_slope = 1.0 - tb * tb;
    }
    if (lane == 0) {
        p.logits.at[2 * r] = a;
        p.logits.at[2 * r + 1] = b;
    }
    float weight = p.weights.at[r];
    for (uint i = lane; i < p.width; i += WG)
        p.dnormed.at[at + i] = weight *
                               (a_slope * p.rows.at[a_at + i] - b_slope * p.rows.at[b_at + i]);
}
