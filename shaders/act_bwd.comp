// Backward of act.comp: dgate = dpost * up * act'(gate), dup = dpost * act(gate).
//
// Define    PLAIN   (optional) an MLP without a gate: dup = dpost * act'(up)
// Buffers   gate_up and dgate_up [T, in_stride], gate at column 0 and up at column `width`, or up
//           alone; dpost [T, out_stride]
// Grid      x = tokens; a workgroup takes one, its lanes the columns
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "act.glsl"

layout(push_constant, scalar) uniform Params { act_bwd_params p; };

void main() {
    uint t = gl_WorkGroupID.x;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float gate = p.gate_up.at[t * p.in_stride + i], d = p.dpost.at[t * p.out_stride + i];
#ifdef PLAIN
        p.dgate_up.at[t * p.in_stride + i] = d * activate_slope(p.act, gate);
#else
        float up = p.gate_up.at[t * p.in_stride + p.width + i];
        p.dgate_up.at[t * p.in_stride + i] = d * up * activate_slope(p.act, gate);
        p.dgate_up.at[t * p.in_stride + p.width + i] = d * activate(p.act, gate);
#endif
    }
}
