// Backward of the RMS norm; norm_bwd_params gives the equations.
// Buffers   x, dy, dx, add and dnormalized [rows, stride], gain [width], dscale and rows [rows]
// Grid      x = rows; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { norm_bwd_params p; };

void main() {
    uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, at = r * p.stride;
    uint from = ((p.flags & NORM_BWD_ROWS) != 0 ? p.rows.at[r] : r) * p.stride;
    bool has_gain = (p.flags & NORM_BWD_NORMALIZED) == 0;
    float squares = 0.0, along = 0.0;
    for (uint i = lane; i < p.width; i += WG) {
        float x = p.x.at[from + i], dn = p.dy.at[at + i];
        if (has_gain)
            dn *= p.gain.at[i];
        squares = fma(x, x, squares);
        along = fma(dn, x, along);
        if ((p.flags & NORM_BWD_WRITE_NORMALIZED) != 0)
            p.dnormalized.at[at + i] = dn;
    }
    float scale = sqrt(workgroup_sum(squares) / float(p.width) + p.eps), inverse = 1.0 / scale;
    along = workgroup_sum(along) * inverse; // dn . n
    if ((p.flags & NORM_BWD_WRITE_SCALE) != 0 && lane == 0)
        p.dscale.at[r] = -along * inverse;
    if ((p.flags & NORM_BWD_NO_OUT) != 0)
        return;
    float shrink = along * inverse / float(p.width);
    for (uint i = lane; i < p.width; i += WG) {
        float dn = p.dy.at[at + i];
        if (has_gain)
            dn *= p.gain.at[i];
        precise float dx = (dn - p.x.at[from + i] * shrink) * inverse;
        if ((p.flags & NORM_BWD_ADD) != 0)
            dx = p.add.at[at + i] + dx;
        p.dx.at[at + i] = dx;
    }
}
