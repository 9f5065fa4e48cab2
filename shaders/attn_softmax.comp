// In place: scores[t, h, :] -> softmax over the keys in the query's window. A workgroup a (token,
// head). Keys before the window and the few after pos that its tile computed become 0, so that the
// next kernel may run over the whole tile.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "softmax.glsl"

layout(push_constant, scalar) uniform Params { softmax_params p; };

void main() {
    uint t = gl_WorkGroupID.x, h = gl_WorkGroupID.y;
    uint pos = p.tokens.at[p.first_token + t].pos;
    softmax_row(p.scores, (t * p.n_heads + h) * p.key_stride, pos, p.window, p.key_stride);
}
