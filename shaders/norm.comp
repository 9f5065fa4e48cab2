// RMS norm or LayerNorm of rows; norm_params gives the equations. The flags NORM_* say which values
// are written, read instead of computed, or added to.
//
// Define    LAYER   (optional) LayerNorm, of n_groups parts of a row
// Buffers   x, dst, normalized and add [rows, stride], gain and bias [n_groups * width], scale
//           [rows, n_groups], rows [rows]
// Grid      x = rows, y = parts of a row (1 without LAYER); a workgroup takes one, its lanes the
//           columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes. The
//           mean comes first, and the squares are those of x - mean
#version 450
#extension GL_GOOGLE_include_directive : require
#ifdef DECODE
#define FIXED_WORKGROUP 256
#endif
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { norm_params p; };

#ifdef LAYER
#define GROUP gl_WorkGroupID.y
#define GROUPS gl_NumWorkGroups.y
#define CENTRED(x) ((x) - mean)
// The mean of the part of x that begins at float `from`.
float mean_of(uint from, uint lane) {
    precise float sum = 0.0;
    for (uint i = lane; i < p.width; i += WG)
        sum += p.x.at[from + i];
    sum = workgroup_sum(sum);
    sum /= float(p.width);
    return sum;
}
#else
#define GROUP 0
#define GROUPS 1
#define CENTRED(x) (x)
#endif

void main() {
    uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, first = GROUP * p.width;
    uint from = ((p.flags & NORM_ROWS) != 0 ? p.rows.at[r] : r) * p.stride + first,
         to = r * p.stride + first, scale_at = r * GROUPS + GROUP;
    float inverse = 1.0;
#ifdef LAYER
    precise float mean = 0.0;
    if ((p.flags & NORM_READ_NORMALIZED) == 0)
        mean = mean_of(from, lane);
#endif
    if ((p.flags & NORM_READ_SCALE) != 0) {
        inverse = 1.0 / p.scale.at[scale_at];
    } else if ((p.flags & NORM_READ_NORMALIZED) == 0) {
        float sum = 0.0;
        for (uint i = lane; i < p.width; i += WG) {
            float x = CENTRED(p.x.at[from + i]);
            sum = fma(x, x, sum);
        }
        float scale = sqrt(workgroup_sum(sum) / float(p.width) + p.eps);
        if ((p.flags & NORM_WRITE_SCALE) != 0 && lane == 0)
            p.scale.at[scale_at] = scale;
        // sqrt and division must stay two steps, as they are where the scale is read back. OR-ing
        // in a flag that is never set hides from the compiler that the value is a square root.
        inverse = 1.0 / uintBitsToFloat(floatBitsToUint(scale) | (p.flags & 0x80000000u));
    }
    for (uint i = lane; i < p.width; i += WG) {
        // `precise` forbids contraction: the separate steps must give bit-identical results
        precise float x = p.x.at[from + i];
        if ((p.flags & NORM_READ_NORMALIZED) == 0) {
            x = CENTRED(x);
            x *= inverse;
        }
        if ((p.flags & NORM_WRITE_NORMALIZED) != 0)
            p.normalized.at[to + i] = x;
        x *= p.gain.at[first + i];
#ifdef LAYER
        if ((p.flags & NORM_BIAS) != 0)
            x += p.bias.at[first + i];
#endif
        if ((p.flags & NORM_ADD) != 0)
            x += p.add.at[to + i];
        if ((p.flags & NORM_NO_OUT) == 0)
            p.dst.at[to + i] = x;
    }
}
