// RMS norm of one token's row a workgroup; see norm_params for the optional outputs and inputs.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { norm_params p; };

void main() {
    uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x;
    uint from = ((p.flags & NORM_ROWS) != 0 ? p.rows.at[r] : r) * p.stride, to = r * p.stride;
    float inverse = 1.0;
    if ((p.flags & NORM_READ_SCALE) != 0) {
        inverse = 1.0 / p.scale.at[r];
    } else if ((p.flags & NORM_READ_NORMALIZED) == 0) {
        float sum = 0.0;
        for (uint i = lane; i < p.width; i += WG) {
            float x = p.x.at[from + i];
            sum = fma(x, x, sum);
        }
        float scale = sqrt(workgroup_sum(sum) / float(p.width) + p.eps);
        if ((p.flags & NORM_WRITE_SCALE) != 0 && lane == 0)
            p.scale.at[r] = scale;
        // 1 / sqrt must stay two steps, as it is where the scale is read back: to the compiler
        // these bits might still change.
        inverse = 1.0 / uintBitsToFloat(floatBitsToUint(scale) | (p.flags & 0x80000000u));
    }
    for (uint i = lane; i < p.width; i += WG) {
        // no contraction: the separate steps must give the same bits
        precise float x = p.x.at[from + i];
        if ((p.flags & NORM_READ_NORMALIZED) == 0)
            x *= inverse;
        if ((p.flags & NORM_WRITE_NORMALIZED) != 0)
            p.normalized.at[to + i] = x;
        x *= p.gain.at[i];
        if ((p.flags & NORM_ADD) != 0)
            x += p.add.at[to + i];
        if ((p.flags & NORM_NO_OUT) == 0)
            p.dst.at[to + i] = x;
    }
}
