// dst[r, :] = x[r, :] (COPY_ROWS: x[rows[r], :]) (COPY_ADD: + add[r, :]).
// Buffers   x [any, x_stride], rows [n_rows], add and dst [n_rows, out_stride]
// Grid      x * y >= rows; a workgroup takes one row, its lanes the columns
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { copy_params p; };

void main() {
    // Rows beyond the limit of one grid dimension continue in y.
    uint r = gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x;
    if (r >= p.n_rows)
        return;
    uint from = ((p.flags & COPY_ROWS) != 0 ? p.rows.at[r] : r) * p.x_stride;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float x = p.x.at[from + i];
        if ((p.flags & COPY_ADD) != 0)
            x = p.add.at[r * p.out_stride + i] + x;
        p.dst.at[r * p.out_stride + i] = x;
    }
}
