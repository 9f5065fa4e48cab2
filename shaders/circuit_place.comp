// Writes queries, keys and values of single heads to where the attention kernels read them. Queries
// and keys are RMS-normalised (PLACE_QK_NORM) and rotated on the way; what comes from the base
// run's rows (PLACE_BASE) is finished already and only copied.
// Buffers   x [arrays, T, x_stride], base [T, base_stride], entries [n, 4], q
//           [arrays, T, q_stride], k_cache and v_cache [arrays, n_slots, dh]; circuit_place_params
//           describes an entry
// Grid      x = tokens, y = entries; a workgroup takes one of each, its lanes pairs of columns
// Order     for the RMS, lane l sums columns l, l + WG, ... in one fma chain and workgroup_sum adds
//           the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { circuit_place_params p; };

float source(uint entry, uint from, uint i) {
    return (entry & PLACE_BASE) != 0 ? p.base.at[from + i] : p.x.at[from + i];
}

void main() {
    const uint t = gl_WorkGroupID.x, e = 4 * gl_WorkGroupID.y, lane = gl_LocalInvocationID.x,
               half_ = p.d_head / 2;
    const uint entry = p.entries.at[e], kind = entry & 3, pos = p.tokens.at[t].pos,
               to_array = p.entries.at[e + 3];
    const bool is_base = (entry & PLACE_BASE) != 0;
    const uint from = (is_base ? t * p.base_stride
                               : (p.entries.at[e + 1] * p.n_tokens + t) * p.x_stride) +
                      p.entries.at[e + 2];
    const uint to = kind == PLACE_Q ? (to_array * p.n_tokens + t) * p.q_stride
                                    : (to_array * p.n_slots + p.tokens.at[t].slot) * p.d_head;
    const bool turned = !is_base && kind != PLACE_V,
               normed = turned && (p.flags & PLACE_QK_NORM) != 0;
    float inverse = 1.0;
    if (normed) {
        float sum = 0.0;
        for (uint i = lane; i < p.d_head; i += WG) {
            float x = p.x.at[from + i];
            sum = fma(x, x, sum);
        }
        inverse = 1.0 / sqrt(workgroup_sum(sum) / float(p.d_head) + p.eps);
    }
    for (uint i = lane; i < half_; i += WG) {
        float a = source(entry, from, i), b = source(entry, from, half_ + i);
        if (normed) {
            a *= inverse * (kind == PLACE_Q ? p.q_gain.at[i] : p.k_gain.at[i]);
            b *= inverse * (kind == PLACE_Q ? p.q_gain.at[half_ + i] : p.k_gain.at[half_ + i]);
        }
        if (turned) {
            float c = p.angles.at[(pos * half_ + i) * 2],
                  s = p.angles.at[(pos * half_ + i) * 2 + 1], old = a;
            a = old * c - b * s;
            b = b * c + old * s;
        }
        if (kind == PLACE_Q) {
            p.q.at[to + i] = a;
            p.q.at[to + half_ + i] = b;
        } else if (kind == PLACE_K) {
            p.k_cache.at[to + i] = a;
            p.k_cache.at[to + half_ + i] = b;
        } else {
            p.v_cache.at[to + i] = a;
            p.v_cache.at[to + half_ + i] = b;
        }
    }
}
