// Backward of the norms of norm.comp; norm_bwd_params gives the equations.
//
// Define    LAYER   (optional) of LayerNorm, of n_groups parts of a row
// Buffers   x, dy, dx, add and dnormalized [rows, stride], gain [n_groups * width], dscale [rows,
//           n_groups], rows [rows]
// Grid      x = rows, y = parts of a row (1 without LAYER); a workgroup takes one, its lanes the
//           columns
// Order     lane l sums columns l, l + WG, ... in one fma chain; workgroup_sum adds the lanes. The
//           means come first
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { norm_bwd_params p; };

#ifdef LAYER
#define GROUP gl_WorkGroupID.y
#define GROUPS gl_NumWorkGroups.y
#define CENTRED(x, mean) ((x) - (mean))
#else
#define GROUP 0
#define GROUPS 1
#define CENTRED(x, mean) (x)
#endif

void main() {
    uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, first = GROUP * p.width,
         at = r * p.stride + first;
    uint from = ((p.flags & NORM_BWD_ROWS) != 0 ? p.rows.at[r] : r) * p.stride + first;
    bool has_gain = (p.flags & NORM_BWD_NORMALIZED) == 0;
#ifdef LAYER
    precise float x_mean = 0.0, dn_mean = 0.0;
    for (uint i = lane; i < p.width; i += WG) {
        float dn = p.dy.at[at + i];
        x_mean += p.x.at[from + i];
        dn_mean += has_gain ? dn * p.gain.at[first + i] : dn;
    }
    x_mean = workgroup_sum(x_mean);
    x_mean /= float(p.width);
    dn_mean = workgroup_sum(dn_mean);
    dn_mean /= float(p.width);
#endif
    float squares = 0.0, along = 0.0;
    for (uint i = lane; i < p.width; i += WG) {
        float x = CENTRED(p.x.at[from + i], x_mean), dn = p.dy.at[at + i];
        if (has_gain)
            dn *= p.gain.at[first + i];
        squares = fma(x, x, squares);
        along = fma(dn, x, along);
        if ((p.flags & NORM_BWD_WRITE_NORMALIZED) != 0)
            p.dnormalized.at[at + i] = dn;
    }
    float scale = sqrt(workgroup_sum(squares) / float(p.width) + p.eps), inverse = 1.0 / scale;
    along = workgroup_sum(along) * inverse; // dn . n
    if ((p.flags & NORM_BWD_WRITE_SCALE) != 0 && lane == 0)
        p.dscale.at[r * GROUPS + GROUP] = -along * inverse;
    if ((p.flags & NORM_BWD_NO_OUT) != 0)
        return;
    float shrink = along * inverse / float(p.width);
    for (uint i = lane; i < p.width; i += WG) {
        float dn = p.dy.at[at + i];
        if (has_gain)
            dn *= p.gain.at[first + i];
        precise float dx = (CENTRED(dn, dn_mean) - CENTRED(p.x.at[from + i], x_mean) * shrink) *
                           inverse;
        if ((p.flags & NORM_BWD_ADD) != 0)
            dx = p.add.at[at + i] + dx;
        p.dx.at[at + i] = dx;
    }
}
