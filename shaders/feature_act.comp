// Activations of a sparse autoencoder's features, in place.
// Buffers   x [T, stride]; threshold, or gate, scale and bias [width]
// Grid      x = tokens, y = blocks of FEATURE_COLUMNS columns; lanes are columns
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { feature_act_params p; };

void main() {
    const uint row = gl_WorkGroupID.x * p.stride, first = gl_WorkGroupID.y * FEATURE_COLUMNS,
               end = min(first + FEATURE_COLUMNS, p.width);
    if (p.kind == FEATURE_GATE) {
        for (uint i = first + gl_LocalInvocationID.x; i < end; i += WG) {
            float u = p.x.at[row + i], z = max(u * p.scale.at[i] + p.bias.at[i], 0.0);
            p.x.at[row + i] = u + p.gate.at[i] > 0.0 ? z : 0.0;
        }
        return;
    }
    for (uint i = first + gl_LocalInvocationID.x; i < end; i += WG) {
        float u = p.x.at[row + i];
        p.x.at[row + i] = u > p.threshold.at[i] ? u : 0.0;
    }
}
