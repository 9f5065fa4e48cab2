// dst[row, t, :] = f(z of a state of a head) [- f(z of that head in the base run)], for every entry
// (state, head, row, scale row). f divides by the run's own RMS where HEADS_SCALED is set. With
// HEADS_OFFSET the last word is the column of z at which the state begins.
// Buffers   z [states, T, z_stride], base [T, base_stride], entries [n, 4], scale [scale rows, T],
//           base_scale [T], dst [rows, T, out_stride]
// Grid      x = tokens, y = entries; a workgroup takes one of each, its lanes the head's columns
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { circuit_heads_params p; };

void main() {
    const uint t = gl_WorkGroupID.x, e = 4 * gl_WorkGroupID.y, lane = gl_LocalInvocationID.x;
    const uint state = p.entries.at[e], head = p.entries.at[e + 1],
               row = (p.entries.at[e + 2] * p.n_tokens + t) * p.out_stride;
    const uint base = t * p.base_stride + head * p.d_head;
    uint from = (state * p.n_tokens + t) * p.z_stride;
    if ((p.flags & HEADS_OFFSET) != 0)
        from += p.entries.at[e + 3];
    const uint column = (p.flags & HEADS_COLUMN) != 0 ? head * p.d_head : 0;
    float factor = 1.0, base_factor = 1.0;
    if ((p.flags & HEADS_SCALED) != 0) {
        factor = 1.0 / p.scale.at[p.entries.at[e + 3] * p.n_tokens + t];
        base_factor = 1.0 / p.base_scale.at[t];
    }
    if ((p.flags & HEADS_ZERO) != 0)
        for (uint i = lane; i < p.out_stride; i += WG)
            if (i < column || i >= column + p.d_head)
                p.dst.at[row + i] = 0.0;
    for (uint i = lane; i < p.d_head; i += WG) {
        // `precise` forbids contraction, so that equal states give a difference of exactly 0
        precise float there = p.base.at[base + i], here = there;
        if (state != NO_DIFFERENCE)
            here = p.z.at[from + i];
        here *= factor;
        there *= base_factor;
        if ((p.flags & HEADS_DIFFERENCE) != 0)
            here -= there;
        p.dst.at[row + column + i] = here;
    }
}
