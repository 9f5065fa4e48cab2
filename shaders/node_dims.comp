// dims[u, :] = sum over sample tokens t of du[u, t, :] g[groups[u], t, :].
// Buffers   du [nodes, n_sample_tokens, d_stride], g [groups, n_sample_tokens, d_stride], groups
//           [nodes], dims [nodes, width]
// Grid      x = nodes; a workgroup takes one, its lanes the columns
// Order     one fma chain for each element, over ascending t
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { node_dims_params p; };

void main() {
    uint u = gl_WorkGroupID.x, from = u * p.n_sample_tokens * p.d_stride,
         g_from = p.groups.at[u] * p.n_sample_tokens * p.d_stride;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float sum = 0.0;
        for (uint t = 0; t < p.n_sample_tokens; t++)
            sum = fma(p.du.at[from + t * p.d_stride + i], p.g.at[g_from + t * p.d_stride + i], sum);
        p.dims.at[u * p.width + i] = sum;
    }
}
