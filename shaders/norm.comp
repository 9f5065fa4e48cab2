// RMS norm: scale = sqrt(mean x^2 + eps), normalized = x / scale, dst = normalized * gain. The
// flags NORM_* say which of these are written, read instead of computed, or added to.
// Buffers   x, dst, normalized and add [rows, stride], gain [width], scale and rows [rows]
// Grid      x = rows; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes
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
        // sqrt and division must stay two steps, as they are where the scale is read back. OR-ing
        // in a flag that is never set hides from the compiler that the value is a square root.
        inverse = 1.0 / uintBitsToFloat(floatBitsToUint(scale) | (p.flags & 0x80000000u));
    }
    for (uint i = lane; i < p.width; i += WG) {
        // `precise` forbids contraction: the separate steps must give bit-identical results
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
