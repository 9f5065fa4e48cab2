// Applies one edit at one site: x[token, head, :] is set to, added to, scaled by or ablated along
// an operand (EDIT_*), for every entry.
// Buffers   x [tokens, token_stride], entries [n], heads [heads to edit]; edit_params gives the
//           place of an operand
// Grid      x = entries, y = heads to edit; a workgroup takes one of each, its lanes the columns
// Order     for EDIT_ABLATE, lane l sums columns l, l + WG, ... in one fma chain and workgroup_sum
//           adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { edit_params p; };

void main() {
    edit_entry entry = p.entries.at[gl_WorkGroupID.x];
    uint token = entry.token, ordinal = gl_WorkGroupID.y;
    uint base = token * p.token_stride + p.heads.at[ordinal] * p.head_stride;
    uint operand = entry.operand + ordinal * p.head_step;
    uint start = 0, width = p.width;
    // an edit cannot unmask the keys after the query or before its window
    if ((p.flags & EDIT_KEYS) != 0) {
        width = min(p.width, p.tokens.at[token].pos + 1);
        start = p.window != 0 && width > p.window ? width - p.window : 0;
    }
    float factor = entry.coefficient;
    if (p.kind == EDIT_ABLATE) {
        float sum = 0.0;
        for (uint i = start + gl_LocalInvocationID.x; i < width; i += WG)
            sum = fma(p.x.at[base + i], p.operand.at[operand + i * p.step], sum);
        factor = -workgroup_sum(sum);
    } else if (p.kind == EDIT_ADD_SCALED) {
        factor /= p.scale.at[token];
    }
    for (uint i = start + gl_LocalInvocationID.x; i < width; i += WG) {
        float x = p.x.at[base + i], y = p.operand.at[operand + i * p.step];
        if (p.kind == EDIT_SET)
            x = y;
        else if (p.kind == EDIT_SCALE)
            x *= y;
        else
            x = fma(factor, y, x);
        p.x.at[base + i] = x;
    }
}
