// In place: scores[t, h, :] becomes its softmax over the keys that query t sees.
// Buffers   scores [T', H, key_stride], T' counted from token first_token
// Grid      x = tokens, y = heads; a workgroup takes one row, its lanes the keys
// Order     lane l sums the keys l, l + WG, ... in ascending order; workgroup_sum adds the lanes
//
// The keys before the window and the few keys after the query that its tile computed become 0, so
// that the next kernel may run over the whole tile.
#version 450
#extension GL_GOOGLE_include_directive : require
#ifdef DECODE
#define FIXED_WORKGROUP 256
#endif
#include "types.glsl"
#include "softmax.glsl"

layout(push_constant, scalar) uniform Params { softmax_params p; };

void main() {
    uint t = gl_WorkGroupID.x, h = gl_WorkGroupID.y;
    uint pos = p.tokens.at[p.first_token + t].pos;
    softmax_row(p.scores, (t * p.n_heads + h) * p.key_stride, pos, p.window, p.key_stride);
}
