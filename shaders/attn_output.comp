// z[t, h, :] = sum_j pattern[t, h, j] v[j, g, :], with g the key/value head of query head h.
// Buffers   pattern [T', H, key_stride], T' counted from token first_token; v_cache
//           [slots, G * dh]; z [T, z_stride]
// Grid      x = column spans, y = tiles, z = query heads. A subgroup takes one tile, which is up to
//           OP_TILE queries of a row, and RN * SG columns of the head; lanes lie along columns
// Order     one fma chain for each output, over ascending j. Zeros of the pattern change nothing
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { attn_output_params p; };

const uint RQ = OP_TILE, RN = 2;

void main() {
    query_tile tile = p.tiles.at[gl_WorkGroupID.y];
    const uint h = gl_WorkGroupID.z, lane = gl_SubgroupInvocationID;
    const uint d0 = (gl_WorkGroupID.x * (WG / SG) + gl_SubgroupID) * SG * RN;
    if (d0 >= p.d_head)
        return;
    const uint first_pos = p.tokens.at[tile.first].pos, last_pos = first_pos + tile.count - 1;
    const uint start = p.window != 0 && first_pos + 1 > p.window ? first_pos + 1 - p.window : 0;
    const uint kv_stride = p.n_kv_heads * p.d_head;
    uint v_at[RN];
    [[unroll]] for (uint r = 0; r < RN; r++)
        v_at[r] = p.tokens.at[tile.first].v_slot * kv_stride +
                  h / (p.n_heads / p.n_kv_heads) * p.d_head + min(d0 + r * SG + lane, p.d_head - 1);
    uint p_at[RQ];
    [[unroll]] for (uint i = 0; i < RQ; i++)
        p_at[i] = ((tile.first + min(i, tile.count - 1) - p.first_token) * p.n_heads + h) *
                  p.key_stride;

    float acc[RQ][RN];
    [[unroll]] for (uint i = 0; i < RQ; i++) {
        [[unroll]] for (uint r = 0; r < RN; r++)
            acc[i][r] = 0;
    }
    for (uint j = start; j <= last_pos; j += SG) {
        uint n = min(SG, last_pos + 1 - j);
        float w[RQ];
        [[unroll]] for (uint i = 0; i < RQ; i++)
            w[i] = p.pattern.at[p_at[i] + j + min(lane, n - 1)];
#define STEP \
    { \
        float v[RN]; \
        [[unroll]] for (uint r = 0; r < RN; r++) \
            v[r] = p.v_cache.at[v_at[r] + (j + s) * kv_stride]; \
        [[unroll]] for (uint i = 0; i < RQ; i++) { \
            float value = subgroupBroadcast(w[i], s); \
            [[unroll]] for (uint r = 0; r < RN; r++) \
                acc[i][r] = fma(value, v[r], acc[i][r]); \
        } \
    }
        FOR_STEPS(n, STEP)
    }
    [[unroll]] for (uint i = 0; i < RQ; i++)
        if (i < tile.count) {
            [[unroll]] for (uint r = 0; r < RN; r++) {
                uint d = d0 + r * SG + lane;
                if (d < p.d_head)
                    p.z.at[(tile.first + i) * p.z_stride + h * p.d_head + d] = acc[i][r];
            }
        }
}
