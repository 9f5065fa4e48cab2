// dst[s, :] = f(a) x[a, :] - f(b) x[b, :] for (a, b) = pairs[s], where f(token) is 1, or 1 /
// rms(raw[token, :]) where `raw` is given. Equal inputs give exact zeros.
// Buffers   x [tokens, stride], raw [tokens, raw_stride], pairs [n, 2], dst [n, stride]; n sample
//           tokens
// Grid      x = sample tokens; a workgroup takes one, its lanes the columns
// Order     for the RMS, lane l sums columns l, l + WG, ... in one fma chain and workgroup_sum adds
//           the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { difference_params p; };

float factor(uint token) {
    float sum = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < p.raw_width; i += WG) {
        float x = p.raw.at[token * p.raw_stride + i];
        sum = fma(x, x, sum);
    }
    return p.raw_width == 0 ? 1.0 : 1.0 / sqrt(workgroup_sum(sum) / float(p.raw_width) + p.eps);
}

void main() {
    uint s = gl_WorkGroupID.x, a = p.pairs.at[2 * s], b = p.pairs.at[2 * s + 1];
    float fa = factor(a), fb = factor(b);
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        // `precise` forbids contraction, so that equal runs give a difference of exactly 0
        precise float xa = fa * p.x.at[a * p.stride + i], xb = fb * p.x.at[b * p.stride + i];
        p.dst.at[s * p.stride + i] = xa - xb;
    }
}
