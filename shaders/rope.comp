// In place on rows [q | k | v]: RMS norm of each head (ROPE_QK_NORM), rotation of its first d_rot
// channels (ROPE_ROTATE), and a copy of k and v into the cache (ROPE_STORE). Pair i of a rotated
// head is (x[i], x[i + d_rot/2]), or with ROPE_INTERLEAVED (x[2i], x[2i + 1]):
//     (a, b) becomes (a c - b s, b c + a s), (c, s) = angles[angle of the token, i].
// Buffers   qkv [T, stride], angles and q_angles [rows, d_rot/2, (cos, sin)], k_cache and v_cache
//           [slots, G * dh]
// Grid      x = tokens; the subgroups of a workgroup share the heads of its token
// Order     for the RMS, lane l sums columns l, l + SG, ... in one fma chain; the subgroup then
//           adds its lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { rope_params p; };

void head_norm(uint base, FloatsIn gain) {
    float sum = 0.0;
    for (uint i = gl_SubgroupInvocationID; i < p.d_head; i += SG) {
        float x = p.qkv.at[base + i];
        sum = fma(x, x, sum);
    }
    float inverse = 1.0 / sqrt(subgroupAdd(sum) / float(p.d_head) + p.eps);
    for (uint i = gl_SubgroupInvocationID; i < p.d_head; i += SG)
        p.qkv.at[base + i] = p.qkv.at[base + i] * inverse * gain.at[i];
}

void head_rotate(uint base, FloatsIn angles, uint row) {
    const uint n_pairs = p.d_rot / 2;
    const bool interleaved = (p.flags & ROPE_INTERLEAVED) != 0;
    const uint step = interleaved ? 2 : 1, apart = interleaved ? 1 : n_pairs;
    for (uint i = gl_SubgroupInvocationID; i < n_pairs; i += SG) {
        float c = angles.at[(row * n_pairs + i) * 2], s = angles.at[(row * n_pairs + i) * 2 + 1];
        uint first = base + i * step, second = first + apart;
        float a = p.qkv.at[first], b = p.qkv.at[second];
        // `precise` forbids contraction: attn_step.comp rotates to the same bits
        precise float rotated = a * c - b * s, other = b * c + a * s;
        p.qkv.at[first] = rotated;
        p.qkv.at[second] = other;
    }
}

void main() {
    uint t = gl_WorkGroupID.x;
    uint angle = p.tokens.at[t].angle, slot = p.tokens.at[t].slot;
    uint kv_width = p.n_kv_heads * p.d_head;
    const uint n_all = p.n_heads + 2 * p.n_kv_heads;
    for (uint first = 0; first < n_all; first += WG / SG) {
        const uint h = first + gl_SubgroupID, base = t * p.stride + h * p.d_head;
        bool is_q = h < p.n_heads, is_k = !is_q && h < p.n_heads + p.n_kv_heads,
             is_v = !is_q && !is_k && h < n_all;
        // Subgroups without a head reach the barriers, too: on lavapipe the whole workgroup waits
        // in a subgroup barrier, and a subgroup that does not reach it is lost.
        if ((p.flags & ROPE_QK_NORM) != 0) {
            if (is_q)
                head_norm(base, p.q_gain);
            else if (is_k)
                head_norm(base, p.k_gain);
            subgroupMemoryBarrierBuffer();
            subgroupBarrier();
        }
        if ((p.flags & ROPE_ROTATE) != 0) {
            if (is_q)
                head_rotate(base, p.q_angles, angle);
            else if (is_k)
                head_rotate(base, p.angles, angle);
            subgroupMemoryBarrierBuffer();
            subgroupBarrier();
        }
        if ((p.flags & ROPE_STORE) != 0 && (is_k || is_v))
            for (uint i = gl_SubgroupInvocationID; i < p.d_head; i += SG) {
                float x = p.qkv.at[base + i];
                if (is_k)
                    p.k_cache.at[slot * kv_width + (h - p.n_heads) * p.d_head + i] = x;
                else
                    p.v_cache.at[slot * kv_width + (h - p.n_heads - p.n_kv_heads) * p.d_head + i] =
                        x;
            }
    }
}
