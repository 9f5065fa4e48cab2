// Sums of columns over segments of tokens, added to what the sums hold.
// Buffers   x [T, x_stride], segments [n_segments, 3], sums [rows, out_stride]
// Grid      x = segments, y = blocks of FEATURE_COLUMNS columns; lanes are columns
//
// Each sum is one chain over ascending tokens, so a segment that arrives in several parts has the
// sum that it would have in one.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { feature_sums_params p; };

void main() {
    const uint segment = 3 * gl_WorkGroupID.x, from = p.segments.at[segment],
               n = p.segments.at[segment + 1], row = p.segments.at[segment + 2] * p.out_stride,
               first = gl_WorkGroupID.y * FEATURE_COLUMNS,
               end = min(first + FEATURE_COLUMNS, p.width);
    for (uint i = first + gl_LocalInvocationID.x; i < end; i += WG) {
        float sum = p.sums.at[row + i];
        for (uint t = from; t < from + n; t++)
            sum += p.x.at[t * p.x_stride + i];
        p.sums.at[row + i] = sum;
    }
}
