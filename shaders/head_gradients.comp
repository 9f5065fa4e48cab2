// Gradients of a layer's query, key and value inputs before the norm, in place; a workgroup a (slot, input). See head_gradients_params.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { head_gradients_params p; };

void main()
{
    uint t = gl_WorkGroupID.x, v = gl_WorkGroupID.y, at = (v * p.n_slots + t) * p.d_stride;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float g = p.g.at[at + i] * p.gain.at[i];
        for (uint k = 0; k < p.n_steps; k++)
            g = fma(-p.steps.at[(t * p.n_steps + k) * p.n_inputs + v], p.xs.at[(t * p.n_steps + k) * p.d_stride + i], g);
        p.g.at[at + i] = g;
    }
}
