// In place: dpattern[t, h, :] becomes dscores[t, h, :], with softmax_bwd_params giving the
// equation.
// Buffers   pattern, dpattern and scores [T', H, key_stride], T' counted from token first_token
// Grid      x = tokens, y = heads; a workgroup takes one row, its lanes the keys
// Order     lane l sums the keys l, l + WG, ... in one fma chain; workgroup_sum adds the lanes
//
// Zeros are written where attn_softmax.comp writes them.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { softmax_bwd_params p; };

void main() {
    const uint t = gl_WorkGroupID.x, h = gl_WorkGroupID.y, lane = gl_LocalInvocationID.x;
    const uint pos = p.tokens.at[p.first_token + t].pos, row = (t * p.n_heads + h) * p.key_stride;
    const uint start = p.window != 0 && pos + 1 > p.window ? pos + 1 - p.window : 0;
    float sum = 0.0;
    for (uint j = start + lane; j <= pos; j += WG)
        sum = fma(p.pattern.at[row + j], p.dpattern.at[row + j], sum);
    sum = workgroup_sum(sum);
    for (uint j = start + lane; j <= pos; j += WG) {
        float d = p.pattern.at[row + j] * (p.dpattern.at[row + j] - sum) * p.scale;
        if (p.softcap != 0.0) {
            float capped = p.scores.at[row + j] / p.softcap;
            d *= 1.0 - capped * capped;
        }
        p.dpattern.at[row + j] = d;
    }
    for (uint j = lane; j < start; j += WG)
        p.dpattern.at[row + j] = 0.0;
    for (uint j = pos + 1 + lane; j < min(pos + OP_TILE, p.key_stride); j += WG)
        p.dpattern.at[row + j] = 0.0;
}
