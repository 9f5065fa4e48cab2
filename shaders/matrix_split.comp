// Float16 parts h and l of slices of rows of x, and for each a power of two s, with x = s (h + l).
// Buffers   see matrix_split_params
// Grid      x = rows, y = slices: a workgroup for each slice of a row
// Order     s depends on the largest magnitude of the slice, so on nothing outside it; h is x / s
//           rounded to float16, l what is left of it
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
layout(push_constant, scalar) uniform Params { matrix_split_params p; };

#include "matrix_scale.glsl"
#include "reduce.glsl"

float value(uint row, uint k, uint end) { return k < end ? p.x.at[row * p.x_stride + k] : 0.0; }

void main() {
    const uint row = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x;
    const uint first = gl_WorkGroupID.y * p.slice_k, end = min(first + p.slice_k, p.n_k),
               to = gl_WorkGroupID.y * p.n_rows + row;
    float largest = 0;
    for (uint k = first + lane; k < end; k += WG)
        largest = max(largest, abs(p.x.at[row * p.x_stride + k]));
    const uint exponent = matrix_exponent(floatBitsToUint(workgroup_max(largest)));
    const float factor = matrix_factor(exponent);
    if (lane == 0)
        p.scales.at[to] = matrix_inverse(exponent);
    for (uint cell = lane; cell < p.part_cells; cell += WG) {
        uvec4 high, low;
        [[unroll]] for (uint i = 0; i < 4; i++) {
            const uint k = first + cell * 8 + 2 * i;
            const vec2 x = vec2(value(row, k, end), value(row, k + 1, end)) * factor;
            high[i] = packHalf2x16(x);
            low[i] = packHalf2x16(x - unpackHalf2x16(high[i]));
        }
        p.parts.at[to * p.n_parts * p.part_cells + cell] = high;
        if (p.n_parts == 2)
            p.parts.at[(to * 2 + 1) * p.part_cells + cell] = low;
    }
}
