// dst[e, j, :] = norm(v), where v = x[t, :] + the differences that entry e lists: the residual
// stream as one input of the circuit reads it. NORM_KIND is the norm: gain * v / rms(v); the
// LayerNorm gain * (v - mean) / sqrt(var + eps) [+ bias]; or none.
// Buffers   x [T, stride], d [differences, T, stride], refs and first [entries + 1] (entry e lists
//           refs[first[e]] to refs[first[e + 1] - 1]), dst [entries, n_tokens, stride]
// Grid      x = tokens, y = entries; a workgroup takes one of each, its lanes the columns
// Order     the differences are added in the order of the list. For the RMS, mean and variance,
//           lane l sums columns l, l + WG, ... in one chain and workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#if NORM_KIND != NORM_KIND_NONE
#include "reduce.glsl"
#endif

layout(push_constant, scalar) uniform Params { circuit_inputs_params p; };

void main() {
    const uint j = gl_WorkGroupID.x, e = gl_WorkGroupID.y, lane = gl_LocalInvocationID.x;
    uint t = j;
    if (p.all_tokens == 0)
        t = p.tokens.at[j];
    const uint begin = p.first.at[e], end = p.first.at[e + 1], from = t * p.stride,
               to = (e * p.n_tokens + j) * p.stride;
    float sum = 0.0;
    for (uint i = lane; i < p.width; i += WG) {
        float v = p.x.at[from + i];
        for (uint k = begin; k < end; k++)
            v += p.d.at[p.refs.at[k] * p.n_chunk * p.stride + from + i];
        p.dst.at[to + i] = v;
#if NORM_KIND == NORM_KIND_RMS
        sum = fma(v, v, sum);
#elif NORM_KIND == NORM_KIND_LAYER
        sum += v;
#endif
    }
#if NORM_KIND == NORM_KIND_RMS
    float inverse = 1.0 / sqrt(workgroup_sum(sum) / float(p.width) + p.eps);
    for (uint i = lane; i < p.width; i += WG)
        p.dst.at[to + i] = p.dst.at[to + i] * inverse * p.gain.at[i];
#elif NORM_KIND == NORM_KIND_LAYER
    float mean = workgroup_sum(sum) / float(p.width), squares = 0.0;
    for (uint i = lane; i < p.width; i += WG) {
        float v = p.dst.at[to + i] - mean;
        squares = fma(v, v, squares);
    }
    float inverse = 1.0 / sqrt(workgroup_sum(squares) / float(p.width) + p.eps);
    for (uint i = lane; i < p.width; i += WG) {
        float v = (p.dst.at[to + i] - mean) * inverse * p.gain.at[i];
        if ((p.flags & INPUTS_BIAS) != 0)
            v += p.bias.at[i];
        p.dst.at[to + i] = v;
    }
#endif
}
