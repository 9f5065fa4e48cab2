// scores[t, h, j] = cap(scale * q[t, h, :] . k[j, g, :]), with g the key/value head of query head h
// and cap the soft cap.
// Buffers   qkv [T, stride], k_cache [slots, G * dh], scores [T', H, key_stride] with T' counted
//           from token first_token
// Grid      x = key spans, y = tiles, z = query heads. A subgroup takes one tile, which is up to
//           OP_TILE queries of a row, and RN * SG keys; lanes lie along keys
// Order     one fma chain for each score, over ascending columns of the head
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { scores_params p; };

const uint RQ = OP_TILE, RN = 2;

void main() {
    query_tile tile = p.tiles.at[gl_WorkGroupID.y];
    const uint h = gl_WorkGroupID.z, lane = gl_SubgroupInvocationID;
    const uint j0 = (gl_WorkGroupID.x * (WG / SG) + gl_SubgroupID) * SG * RN;
    const uint last_pos = p.tokens.at[tile.first + tile.count - 1].pos;
    if (j0 > last_pos)
        return;
    const uint kv_stride = p.n_kv_heads * p.d_head;
    const uint k_slot = p.tokens.at[tile.first].k_slot;
    uint k_at[RN];
    // keys past the end read the last one and are not written
    [[unroll]] for (uint r = 0; r < RN; r++)
        k_at[r] = (k_slot + min(j0 + r * SG + lane, last_pos)) * kv_stride +
                  h / (p.n_heads / p.n_kv_heads) * p.d_head;
    uint q_at[RQ];
    [[unroll]] for (uint i = 0; i < RQ; i++)
        q_at[i] = p.tokens.at[tile.first + min(i, tile.count - 1)].q_token * p.stride +
                  h * p.d_head;

    float acc[RQ][RN];
    [[unroll]] for (uint i = 0; i < RQ; i++) {
        [[unroll]] for (uint r = 0; r < RN; r++)
            acc[i][r] = 0;
    }
    for (uint d = 0; d < p.d_head; d += SG) {
        uint n = min(SG, p.d_head - d);
        float q[RQ];
        [[unroll]] for (uint i = 0; i < RQ; i++)
            q[i] = p.qkv.at[q_at[i] + d + min(lane, n - 1)];
#define STEP \
    { \
        float k[RN]; \
        [[unroll]] for (uint r = 0; r < RN; r++) \
            k[r] = p.k_cache.at[k_at[r] + d + s]; \
        [[unroll]] for (uint i = 0; i < RQ; i++) { \
            float value = subgroupBroadcast(q[i], s); \
            [[unroll]] for (uint r = 0; r < RN; r++) \
                acc[i][r] = fma(value, k[r], acc[i][r]); \
        } \
    }
        FOR_STEPS(n, STEP)
    }
    [[unroll]] for (uint i = 0; i < RQ; i++)
        if (i < tile.count) {
            [[unroll]] for (uint r = 0; r < RN; r++) {
                uint j = j0 + r * SG + lane;
                float score = acc[i][r] * p.scale;
                if (p.softcap != 0.0)
                    score = p.softcap * tanh(clamp(score / p.softcap, -15.0, 15.0));
                if (j <= last_pos)
                    p.scores.at[((tile.first + i - p.first_token) * p.n_heads + h) * p.key_stride +
                                j] = score;
            }
        }
}
