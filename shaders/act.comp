// dst[t, i] = act(gate[t, i]) * up[t, i].
//
// Define    PLAIN   (optional) an MLP without a gate: dst[t, i] = act(up[t, i])
// Buffers   gate_up [T, in_stride], gate at column 0 and up at column `width`, or up alone; dst [T,
//           out_stride]
// Grid      x = tokens, y = workgroups that share the columns of a token
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "act.glsl"

layout(push_constant, scalar) uniform Params { act_params p; };

void main() {
    uint t = gl_WorkGroupID.x;
    for (uint i = gl_WorkGroupID.y * WG + gl_LocalInvocationID.x; i < p.width;
         i += WG * gl_NumWorkGroups.y)
#ifdef PLAIN
        p.dst.at[t * p.out_stride + i] = activate(p.act, p.gate_up.at[t * p.in_stride + i]);
#else
        p.dst.at[t * p.out_stride + i] = activate(p.act, p.gate_up.at[t * p.in_stride + i]) *
                                         p.gate_up.at[t * p.in_stride + p.width + i];
#endif
}
