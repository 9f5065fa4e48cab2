// Attention of single tokens (decoding) in one dispatch:
//     z[t, h, :] = sum_j softmax_j(cap(scale * q[t, h, :] . k[j, g, :])) v[j, g, :]
// with g = h / (H / G), over the keys j <= pos(t) inside the window. decode_params gives the shapes
// of the buffers.
//
// Define    HEADS   query heads that one pass over the keys and values serves. A larger head group
//                   takes several passes. Loads in a loop dominate on software drivers: SmolLM2's
//                   9 heads in groups of 3 at 256 tokens took 700 us a layer with one head a pass,
//                   for two rows on two AVX2 cores.
// Grid      x = tokens, y = key/value heads. A workgroup takes one token and one key/value head,
//           with the query heads that share it.
//
// Order: every value is computed by the same chain of operations as in attn_scores.comp,
// attn_softmax.comp and attn_output.comp, so capturing a pattern does not change any value.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "softmax.glsl"

layout(push_constant, scalar) uniform Params { decode_params p; };

// In both functions below, `h` is the first head of the pass and h + `last` its last one; heads
// past it repeat the last one's work and write nothing. `row` is where h's scores begin.

// Writes the capped scores of the keys 0 .. token.pos: lanes lie along keys.
void write_scores(token_meta token, uint h, uint last, uint head_at, uint row) {
    const uint lane = gl_LocalInvocationID.x, kv_stride = p.n_kv_heads * p.d_head;
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
}

// Writes z of token t, the sum of pattern times values: lanes lie along the head's columns.
void write_outputs(uint t, token_meta token, uint h, uint last, uint head_at, uint row) {
    const uint lane = gl_LocalInvocationID.x, kv_stride = p.n_kv_heads * p.d_head;
    const uint start = p.window != 0 && token.pos + 1 > p.window ? token.pos + 1 - p.window : 0;
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
#define OUTPUT_STEP \
    { \
        float v = p.v_cache.at[v_at + (j + s) * kv_stride]; \
        [[unroll]] for (uint i = 0; i < HEADS; i++) \
            acc[i] = fma(subgroupBroadcast(w[i], s), v, acc[i]); \
    }
            FOR_STEPS(n, OUTPUT_STEP)
        }
        [[unroll]] for (uint i = 0; i < HEADS; i++)
            if (i <= last && d0 + lane < p.d_head)
                p.z.at[(p.first_token + t) * p.z_stride + (h + i) * p.d_head + d0 + lane] = acc[i];
    }
}

void main() {
    const uint t = gl_WorkGroupID.x, g = gl_WorkGroupID.y, group = p.n_heads / p.n_kv_heads;
    const token_meta token = p.tokens.at[p.first_token + t];
    const uint head_at = g * p.d_head;
    for (uint first = 0; first < group; first += HEADS) {
        const uint h = g * group + first, last = min(HEADS, group - first) - 1;
        const uint row = (t * p.n_heads + h) * p.key_stride;
        write_scores(token, h, last, head_at, row);
        memoryBarrierBuffer();
        barrier();
        for (uint i = 0; i <= last; i++)
            softmax_row(p.scores, row + i * p.key_stride, token.pos, p.window, p.key_stride);
        memoryBarrierBuffer();
        barrier();
        write_outputs(t, token, h, last, head_at, row);
    }
}
