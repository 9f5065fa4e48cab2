// One edit at one site: a workgroup for each (token, head).
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
    // neither the future nor what lies before the window can be opened
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
