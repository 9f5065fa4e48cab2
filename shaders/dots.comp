// dst[i, j] = sum_k a[i, k] b[j, k], for few long rows.
// Buffers   a [n_a, n_k], b [n_b, n_k], dst [n_a, n_b]
// Grid      x = ceil(n_a / 8), y = ceil(n_b / (8 * WG / SG)). A subgroup takes 8 x 8 results; lanes
//           lie along k
// Order     lane l sums k = l, l + SG, ... in one fma chain; the subgroup then adds its lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { dots_params p; };

const uint R = 8;

void main() {
    const uint lane = gl_SubgroupInvocationID, i0 = gl_WorkGroupID.x * R,
               j0 = (gl_WorkGroupID.y * (WG / SG) + gl_SubgroupID) * R;
    if (j0 >= p.n_b)
        return;
    uint a_at[R], b_at[R]; // rows past the end read the last one and are not written
    [[unroll]] for (uint r = 0; r < R; r++) {
        a_at[r] = min(i0 + r, p.n_a - 1) * p.n_k;
        b_at[r] = min(j0 + r, p.n_b - 1) * p.n_k;
    }
    float acc[R][R];
    [[unroll]] for (uint i = 0; i < R; i++) {
        [[unroll]] for (uint j = 0; j < R; j++)
            acc[i][j] = 0;
    }
    for (uint k = lane; k < p.n_k; k += SG) {
        float a[R], b[R];
        [[unroll]] for (uint r = 0; r < R; r++) {
            a[r] = p.a.at[a_at[r] + k];
            b[r] = p.b.at[b_at[r] + k];
        }
        [[unroll]] for (uint i = 0; i < R; i++) {
            [[unroll]] for (uint j = 0; j < R; j++)
                acc[i][j] = fma(a[i], b[j], acc[i][j]);
        }
    }
    [[unroll]] for (uint i = 0; i < R; i++) {
        [[unroll]] for (uint j = 0; j < R; j++) {
            float sum = subgroupAdd(acc[i][j]);
            if (lane == 0 && i0 + i < p.n_a && j0 + j < p.n_b)
                p.dst.at[(i0 + i) * p.n_b + j0 + j] = sum;
        }
    }
}
