// What MLPs add (after a post-norm where there is one) minus what they add in the base run; a
// workgroup a row. See circuit_outputs_params.
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
        precise float x = p.x.at[at + i]; // no contraction: equal rows cancel
        if ((p.flags & OUTPUTS_NORM) != 0) {
            x *= inverse;
            x *= p.gain.at[i];
        }
        x -= p.base.at[base + i];
        p.dst.at[at + i] = x;
    }
}
