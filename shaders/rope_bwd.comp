// Backward of rope.comp, in place on rows [dq | dk | dv]: the rotation is undone by its transpose,
// and then comes the backward of the norm of each head (norm_bwd_params gives the equations).
// Buffers   dqkv and qkv [T, stride], angles and q_angles [rows, d_rot/2, (cos, sin)], q_gain and
//           k_gain [dh]
// Grid      x = tokens; the subgroups of a workgroup share the heads of its token
// Order     lane l sums columns l, l + SG, ... in one fma chain; the subgroup then adds its lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { rope_bwd_params p; };

void head_rotate_back(uint base, FloatsIn angles, uint row) {
    const uint n_pairs = p.d_rot / 2;
    const bool interleaved = (p.flags & ROPE_INTERLEAVED) != 0;
    const uint step = interleaved ? 2 : 1, apart = interleaved ? 1 : n_pairs;
    for (uint i = gl_SubgroupInvocationID; i < n_pairs; i += SG) {
        float c = angles.at[(row * n_pairs + i) * 2], s = angles.at[(row * n_pairs + i) * 2 + 1];
        uint first = base + i * step, second = first + apart;
        float a = p.dqkv.at[first], b = p.dqkv.at[second];
        p.dqkv.at[first] = a * c + b * s;
        p.dqkv.at[second] = b * c - a * s;
    }
}

void head_norm_back(uint base, FloatsIn gain) {
    float squares = 0.0, along = 0.0;
    for (uint i = gl_SubgroupInvocationID; i < p.d_head; i += SG) {
        float x = p.qkv.at[base + i];
        squares = fma(x, x, squares);
        along = fma(p.dqkv.at[base + i] * gain.at[i], x, along);
    }
    float inverse = 1.0 / sqrt(subgroupAdd(squares) / float(p.d_head) + p.eps);
    float shrink = subgroupAdd(along) * inverse * inverse / float(p.d_head);
    for (uint i = gl_SubgroupInvocationID; i < p.d_head; i += SG)
        p.dqkv.at[base + i] = (p.dqkv.at[base + i] * gain.at[i] - p.qkv.at[base + i] * shrink) *
                              inverse;
}

void main() {
    uint t = gl_WorkGroupID.x, angle = p.tokens.at[t].angle;
    for (uint first = 0; first < p.n_heads + p.n_kv_heads; first += WG / SG) {
        const uint h = first + gl_SubgroupID, base = t * p.stride + h * p.d_head;
        // every subgroup reaches the barrier, for the reason given in rope.comp
        const bool mine = h < p.n_heads + p.n_kv_heads;
        if ((p.flags & ROPE_ROTATE) != 0) {
            if (h < p.n_heads)
                head_rotate_back(base, p.q_angles, angle);
            else if (mine)
                head_rotate_back(base, p.angles, angle);
            subgroupMemoryBarrierBuffer();
            subgroupBarrier();
        }
        if ((p.flags & ROPE_QK_NORM) != 0 && mine) {
            if (h < p.n_heads)
                head_norm_back(base, p.q_gain);
            else
                head_norm_back(base, p.k_gain);
        }
    }
}
