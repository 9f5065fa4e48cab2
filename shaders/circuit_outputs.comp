// dst[r, :] = f(x[r, :]) - base[(first + r) % T, :]: what an MLP adds to the residual stream minus
// what it adds in the base run. f is the post-norm where the model has one (OUTPUTS_NORM).
// Buffers   x and dst [rows, stride], base [T, stride], gain [width]
// Grid      x = rows; a workgroup takes one, its lanes the columns
// Order     for the RMS, lane l sums columns l, l + WG, ... in one fma chain and workgroup_sum adds
//           the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { circuit_outputs_params p; };

void main() {
    const uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, at = r * p.stride,
               base = (p.first + r) % p.n_tokens * p.stride;
    float inverse = 1.0;
    if ((p.flags & OUTPUTS_NORM) != 0) {
        float sum = 0.0;
        for (uint i = lane; i < p.width; i += WG) {
            float x = p.x.at[at + i];
            sum = fma(x, x, sum);
        }
        inverse = 1.0 / sqrt(workgroup_sum(sum) / float(p.width) + p.eps);
    }
    for (uint i = lane; i < p.width; i += WG) {
        // `precise` forbids contraction, so that equal rows give a difference of exactly 0
        precise float x = p.x.at[at + i];
        if ((p.flags & OUTPUTS_NORM) != 0) {
            x *= inverse;
            x *= p.gain.at[i];
        }
        x -= p.base.at[base + i];
        p.dst.at[at + i] = x;
    }
}
