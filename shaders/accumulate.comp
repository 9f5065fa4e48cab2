// dst[s, :] += weight * sum over k of src[sources[s, k], :], where NO_SOURCE adds nothing.
// Buffers   src [tokens, stride], sources [n, n_sources], dst [n, stride]; n sample tokens
// Grid      x = sample tokens; a workgroup takes one, its lanes the columns
// Order     one fma chain for each element, from dst on over ascending k
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { accumulate_params p; };

void main() {
    uint s = gl_WorkGroupID.x;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float sum = p.dst.at[s * p.stride + i];
        for (uint k = 0; k < p.n_sources; k++) {
            uint t = p.sources.at[s * p.n_sources + k];
            if (t != NO_SOURCE)
                sum = fma(p.weight, p.src.at[t * p.stride + i], sum);
        }
        p.dst.at[s * p.stride + i] = sum;
    }
}
