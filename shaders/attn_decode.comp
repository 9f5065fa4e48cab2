// Attention of single tokens (decoding) in one step: a workgroup takes one (token, key/value head)
// with its query heads through scores, softmax and output. Every value is computed by the same
// chain as in the three separate kernels, so capturing a pattern does not alter any value.
// Grid: x = tokens, y = key/value heads.
//
// Define    HEADS   query heads that share what is loaded of keys and values; a larger group takes
//                   several turns. Loads in a loop are what costs on software drivers: SmolLM2's 9
//                   heads in groups of 3 at 256 tokens took 700 us a layer one by one, two rows on
//                   two AVX2 cores
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "softmax.glsl"

layout(push_constant, scalar) uniform Params { decode_params p; };

void main() {
    const uint t = gl_WorkGroupID.x, g = gl_WorkGroupID.y, lane = gl_LocalInvocationID.x,
               group = p.n_heads / p.n_kv_heads;
    const token_meta token = p.tokens.at[p.first_token + t];
    const uint kv_stride = p.n_kv_heads * p.d_head, head_at = g * p.d_head;
    const uint start = p.window != 0 && token.pos + 1 > p.window ? token.pos + 1 - p.window : 0;

    for (uint first = 0; first < group; first += HEADS) {
        // heads past the end do the last one's work again and are not written
        const uint h = g * group + first, last = min(HEADS, group - first) - 1;
        const uint row = (t * p.n_heads + h) * p.key_stride;
        for (uint j0 = 0; j0 <= token.pos; j0 += WG) {
            uint j = min(j0 + lane, token.pos);
            uint k_at = (token.k_slot + j) * kv_stride + head_at;
            float acc[HEADS];
            [[unroll]] for (uint i = 0; i < HEADS; i++)
                acc[i] = 0.0;
            for (uint d = 0; d < p.d_head; d += SG) {
                uint n = min(SG, p.d_head - d);
                float q[HEADS];
                [[unroll]] for (uint i = 0; i < HEADS; i++)
                    q[i] = p.qkv.at[token.q_token * p.stride + (h + min(i, last)) * p.d_head + d +
                                    min(gl_SubgroupInvocationID, n - 1)];
#define SCORE_STEP \
    { \
        float k = p.k_cache.at[k_at + d + s]; \
        [[unroll]] for (uint i = 0; i < HEADS; i++) \
            acc[i] = fma(subgroupBroadcast(q[i], s), k, acc[i]); \
    }
                FOR_STEPS(n, SCORE_STEP)
            }
            [[unroll]] for (uint i = 0; i < HEADS; i++) {
                float score = acc[i] * p.scale;
                if (p.softcap != 0.0)
                    score = p.softcap * tanh(clamp(score / p.softcap, -15.0, 15.0));
                if (i <= last && j0 + lane <= token.pos)
                    p.scores.at[row + i * p.key_stride + j] = score;
            }
        }
        memoryBarrierBuffer();
        barrier();
        for (uint i = 0; i <= last; i++)
            softmax_row(p.scores, row + i * p.key_stride, token.pos, p.window, p.key_stride);
        memoryBarrierBuffer();
        barrier();

        for (uint d0 = 0; d0 < p.d_head; d0 += WG) {
            uint v_at = token.v_slot * kv_stride + head_at + min(d0 + lane, p.d_head - 1);
            float acc[HEADS];
            [[unroll]] for (uint i = 0; i < HEADS; i++)
                acc[i] = 0.0;
            for (uint j = start; j <= token.pos; j += SG) {
                uint n = min(SG, token.pos + 1 - j);
                float w[HEADS];
                [[unroll]] for (uint i = 0; i < HEADS; i++)
                    w[i] = p.scores.at[row + min(i, last) * p.key_stride + j +
                                       min(gl_SubgroupInvocationID, n - 1)];
#define MIX_STEP \
    { \
        float v = p.v_cache.at[v_at + (j + s) * kv_stride]; \
        [[unroll]] for (uint i = 0; i < HEADS; i++) \
            acc[i] = fma(subgroupBroadcast(w[i], s), v, acc[i]); \
    }
                FOR_STEPS(n, MIX_STEP)
            }
            [[unroll]] for (uint i = 0; i < HEADS; i++)
                if (i <= last && d0 + lane < p.d_head)
                    p.z.at[(p.first_token + t) * p.z_stride + (h + i) * p.d_head + d0 + lane] =
                        acc[i];
        }
    }
}
