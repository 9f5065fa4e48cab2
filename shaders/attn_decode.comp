// Attention of single tokens (decoding) in one step: a workgroup takes a (token, head) through scores, softmax and mix. Every value is computed
// by the same chain as in the three separate kernels, so that looking at a pattern changes no bit.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "softmax.glsl"

layout(push_constant, scalar) uniform Params { decode_params p; };

void main()
{
    const uint t = gl_WorkGroupID.x, h = gl_WorkGroupID.y, lane = gl_LocalInvocationID.x;
    const token_meta token = p.tokens.at[p.first_token + t];
    const uint kv_stride = p.n_kv_heads * p.d_head, head_at = h / (p.n_heads / p.n_kv_heads) * p.d_head;
    const uint row = (t * p.n_heads + h) * p.key_stride;
    const uint q_at = token.q_token * p.stride + h * p.d_head;

    for (uint j0 = 0; j0 <= token.pos; j0 += WG) {
        uint j = min(j0 + lane, token.pos);
        uint k_at = (token.k_slot + j) * kv_stride + head_at;
        float acc = 0.0;
        for (uint d = 0; d < p.d_head; d += SG) {
            uint n = min(SG, p.d_head - d);
            float q = p.qkv.at[q_at + d + min(gl_SubgroupInvocationID, n - 1)];
            FOR_STEPS(n, acc = fma(subgroupBroadcast(q, s), p.k_cache.at[k_at + d + s], acc);)
        }
        float score = acc * p.scale;
        if (p.softcap != 0.0)
            score = p.softcap * tanh(clamp(score / p.softcap, -15.0, 15.0));
        if (j0 + lane <= token.pos)
            p.scores.at[row + j] = score;
    }
    memoryBarrierBuffer();
    barrier();
    softmax_row(p.scores, row, token.pos, p.window, p.key_stride);
    memoryBarrierBuffer();
    barrier();

    const uint start = p.window != 0 && token.pos + 1 > p.window ? token.pos + 1 - p.window : 0;
    for (uint d0 = 0; d0 < p.d_head; d0 += WG) {
        uint v_at = token.v_slot * kv_stride + head_at + min(d0 + lane, p.d_head - 1);
        float acc = 0.0;
        for (uint j = start; j <= token.pos; j += SG) {
            uint n = min(SG, token.pos + 1 - j);
            float w = p.scores.at[row + j + min(gl_SubgroupInvocationID, n - 1)];
            FOR_STEPS(n, acc = fma(subgroupBroadcast(w, s), p.v_cache.at[v_at + (j + s) * kv_stride], acc);)
        }
        if (d0 + lane < p.d_head)
            p.z.at[(p.first_token + t) * p.z_stride + h * p.d_head + d0 + lane] = acc;
    }
}
