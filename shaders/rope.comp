// In place on rows [q | k | v]: RMS norm of each head (ROPE_QK_NORM), rotation of its halves
// (ROPE_ROTATE), and a copy of k and v into the cache (ROPE_STORE):
//     (x[i], x[i + dh/2]) = (a c - b s, b c + a s), (a, b) the old values, (c, s) = angles[pos, i].
// Buffers   qkv [T, stride], angles [positions, dh/2, (cos, sin)], k_cache and v_cache
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

void head_rotate(uint base, uint pos) {
    uint half_ = p.d_head / 2;
    for (uint i = gl_SubgroupInvocationID; i < half_; i += SG) {
        float c = p.angles.at[(pos * half_ + i) * 2], s = p.angles.at[(pos * half_ + i) * 2 + 1];
        float a = p.qkv.at[base + i], b = p.qkv.at[base + half_ + i];
        p.qkv.at[base + i] = a * c - b * s;
        p.qkv.at[base + half_ + i] = b * c + a * s;
    }
}

void main() {
    uint t = gl_WorkGroupID.x;
    uint pos = p.tokens.at[t].pos, slot = p.tokens.at[t].slot;
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
            if (is_q || is_k)
                head_rotate(base, pos);
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
