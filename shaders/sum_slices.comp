// dst[i] = src[i] + src[i + n] + ... of n_slices slices.
// Grid      x = ceil(n / WG)
// Order     one chain over ascending slices
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
layout(push_constant, scalar) uniform Params { sum_slices_params p; };

void main() {
    const uint i = gl_GlobalInvocationID.x;
    if (i >= p.n)
        return;
    float sum = p.src.at[i];
    for (uint slice = 1; slice < p.n_slices; slice++)
        sum += p.src.at[slice * p.n + i];
    p.dst.at[i] = sum;
}
