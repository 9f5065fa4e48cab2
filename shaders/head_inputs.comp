// Adds up the gradients of a layer's query, key and value inputs in the heads' own columns,
// together with what the norm's backward needs later: the terms `steps` and the stream `xs`.
// head_inputs_params gives the equations.
//
// Define    LAYER   (optional) the norm is a LayerNorm
// Buffers   dqkv and qkv [T, stride], x [T, d_stride], sources [n, n_sources], heads [n, stride],
//           steps [n, n_steps, n_inputs], xs [n, n_steps, d_stride]; n sample tokens
// Grid      x = sample tokens; a workgroup takes one, its lanes the columns
// Order     heads: one fma for each source, in ascending order. For the norm's mean and scale and
//           the dot products, lane l sums columns l, l + WG, ... in one fma chain and workgroup_sum
//           adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { head_inputs_params p; };

#ifdef LAYER
#define CENTRED(x) ((x) - mean)
#else
#define CENTRED(x) (x)
#endif

void main() {
    const uint s = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, n = p.n_inputs * p.d_head;
    const bool normed = (p.flags & HEAD_INPUTS_NORMED) != 0;
    for (uint k = 0; k < p.n_sources; k++) {
        uint t = p.sources.at[s * p.n_sources + k];
        if (t == NO_SOURCE)
            continue;
        float inverse = 1.0;
        if (!normed) {
            uint step_at = s * p.n_steps + p.first_step + k;
            float sum = 0.0;
#ifdef LAYER
            for (uint i = lane; i < p.width; i += WG)
                sum += p.x.at[t * p.d_stride + i];
            float mean = workgroup_sum(sum) / float(p.width);
            sum = 0.0;
#endif
            for (uint i = lane; i < p.width; i += WG) {
                float x = CENTRED(p.x.at[t * p.d_stride + i]);
                p.xs.at[step_at * p.d_stride + i] = x;
                sum = fma(x, x, sum);
            }
            inverse = 1.0 / sqrt(workgroup_sum(sum) / float(p.width) + p.eps);
            float factor = p.weight * inverse * inverse / float(p.width);
            for (uint v = 0; v < p.n_inputs; v++) {
                float dot = 0.0;
                for (uint i = lane; i < p.d_head; i += WG) {
                    uint at = v * p.d_head + i;
                    float q = p.qkv.at[t * p.stride + at];
                    if (p.has_bias != 0)
                        q -= p.bias.at[at];
                    dot = fma(q, p.dqkv.at[t * p.stride + at], dot);
                }
                dot = workgroup_sum(dot);
                if (lane == 0)
                    p.steps.at[step_at * p.n_inputs + v] = factor * dot;
            }
        }
        for (uint i = lane; i < n; i += WG)
            p.heads.at[s * p.stride + i] = fma(p.weight * inverse, p.dqkv.at[t * p.stride + i],
                                               p.heads.at[s * p.stride + i]);
    }
}
