// Writes queries, keys and values of single heads to where the attention kernels read them. Queries
// and keys are RMS-normalised (PLACE_QK_NORM) and their first d_rot channels rotated on the way;
// what comes from the base run's rows (PLACE_BASE) is finished already and only copied.
//
// Define    INTERLEAVED   (optional) neighbouring channels are a pair, else (i, i + d_rot / 2)
// Buffers   x [arrays, T, x_stride], base [T, base_stride], entries [n, 4], q [arrays, T,
//           q_stride], k_cache and v_cache [arrays, n_slots, dh]; circuit_place_params describes an
//           entry
// Grid      x = tokens, y = entries; a workgroup takes one of each, its lanes pairs of columns and
//           then the columns that are in no pair
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

float normalized(uint kind, float inverse, float x, uint i) {
    return x * (inverse * (kind == PLACE_Q ? p.q_gain.at[i] : p.k_gain.at[i]));
}

void write(uint kind, uint i, float x) {
    if (kind == PLACE_Q)
        p.q.at[i] = x;
    else if (kind == PLACE_K)
        p.k_cache.at[i] = x;
    else
        p.v_cache.at[i] = x;
}

void main() {
    const uint t = gl_WorkGroupID.x, e = 4 * gl_WorkGroupID.y, lane = gl_LocalInvocationID.x,
               half_ = p.d_rot / 2;
    const uint entry = p.entries.at[e], kind = entry & 3, row = p.tokens.at[t].angle,
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
#ifdef INTERLEAVED
        const uint first = 2 * i, second = 2 * i + 1;
#else
        const uint first = i, second = half_ + i;
#endif
        float a = source(entry, from, first), b = source(entry, from, second);
        if (normed) {
            a = normalized(kind, inverse, a, first);
            b = normalized(kind, inverse, b, second);
        }
        if (turned) {
            const uint angle = (row * half_ + i) * 2;
            float c, s, old = a;
            if (kind == PLACE_Q) {
                c = p.q_angles.at[angle];
                s = p.q_angles.at[angle + 1];
            } else {
                c = p.angles.at[angle];
                s = p.angles.at[angle + 1];
            }
            a = old * c - b * s;
            b = b * c + old * s;
        }
        write(kind, to + first, a);
        write(kind, to + second, b);
    }
    for (uint i = p.d_rot + lane; i < p.d_head; i += WG) {
        float x = source(entry, from, i);
        write(kind, to + i, normed ? normalized(kind, inverse, x, i) : x);
    }
}
