// Attention of single tokens (decoding) on real GPUs in one dispatch: norm and rotation of the
// queries and of the present key, key and value into the cache, and
//     z[t, h, :] = sum_j softmax_j(cap(scale * q[t, h, :] . k[j, g, :])) v[j, g, :]
// with g = h / (H / G), over the keys j <= pos(t) inside the window. STEP_* says which of these
// steps are done; attn_step_params gives the shapes of the buffers.
//
// Define    HEADS   query heads of a workgroup, which share its loads of keys and values
// Grid      x = tokens, y = key/value heads * ceil((H / G) / HEADS). A workgroup of 256 takes up to
//           HEADS of the query heads that share a key/value head. The present key and value are
//           read from qkv, because another workgroup may be writing them into the cache
//
// Order: norms, rotation, scores and softmax as in norm.comp and attn_softmax.comp with DECODE, in
// rope.comp and in attn_scores.comp. For z, 256 / (dh / 4) groups of lanes take keys in turn (key j
// belongs to group j % groups), each in one fma chain over ascending j; then the groups are added
// in order. So it depends on the row's own length alone, and capturing a pattern changes nothing.
#version 450
#extension GL_GOOGLE_include_directive : require
#define FIXED_WORKGROUP 256
#include "types.glsl"
#include "softmax.glsl"

layout(push_constant, scalar) uniform Params { attn_step_params p; };

const uint ROWS = HEADS + 1; // the queries of the workgroup, then the present key
shared float rows[ROWS * STEP_D_HEAD_MAX];
shared vec4 parts[HEADS * WG];

uint head_row(uint r) { return r * STEP_D_HEAD_MAX; }

// RMS norm of each row by a subgroup, as in rope.comp.
void rows_norm_head(uint lane) {
    for (uint first = 0; first < ROWS; first += WG / SG) {
        const uint r = first + gl_SubgroupID, base = head_row(min(r, ROWS - 1));
        if (r >= ROWS)
            continue;
        float sum = 0.0;
        for (uint i = gl_SubgroupInvocationID; i < p.d_head; i += SG) {
            float x = rows[base + i];
            sum = fma(x, x, sum);
        }
        float inverse = 1.0 / sqrt(subgroupAdd(sum) / float(p.d_head) + p.eps);
        for (uint i = gl_SubgroupInvocationID; i < p.d_head; i += SG)
            rows[base + i] = rows[base + i] * inverse *
                             (r < HEADS ? p.q_gain.at[i] : p.k_gain.at[i]);
    }
    barrier();
}

// 1 / scale of a norm with this sum of squares, in two steps as in norm.comp.
float inverse_of(float sum, uint width) {
    float scale = sqrt(sum / float(width) + p.eps);
    return 1.0 / uintBitsToFloat(floatBitsToUint(scale) | (p.flags & 0x80000000u));
}

// LayerNorm of each row. h, last: the first query head, and the last one counted from it.
void rows_norm_layer(uint lane, uint h, uint last, uint g) {
    for (uint r = 0; r < ROWS; r++) {
        const uint base = head_row(r), gain = (r < HEADS ? h + min(r, last) : g) * p.d_head;
        precise float mean = 0.0;
        for (uint i = lane; i < p.d_head; i += WG)
            mean += rows[base + i];
        mean = workgroup_sum(mean);
        mean /= float(p.d_head);
        float sum = 0.0;
        for (uint i = lane; i < p.d_head; i += WG) {
            float x = rows[base + i] - mean;
            sum = fma(x, x, sum);
        }
        const float inverse = inverse_of(workgroup_sum(sum), p.d_head);
        for (uint i = lane; i < p.d_head; i += WG) {
            precise float x = rows[base + i];
            x = x - mean;
            x *= inverse;
            x *= r < HEADS ? p.q_gain.at[gain + i] : p.k_gain.at[gain + i];
            if ((p.flags & STEP_NORM_BIAS) != 0)
                x += r < HEADS ? p.q_gain.at[p.n_heads * p.d_head + gain + i]
                               : p.k_gain.at[p.n_kv_heads * p.d_head + gain + i];
            rows[base + i] = x;
        }
    }
    barrier();
}

// RMS norm of all queries together, and of all keys together.
void rows_norm_wide(uint lane, uint token, uint h, uint last, uint g) {
    const uint q_width = p.n_heads * p.d_head, k_width = p.n_kv_heads * p.d_head,
               q_at = token * p.stride, k_at = q_at + q_width;
    float q_sum = 0.0, k_sum = 0.0;
    for (uint i = lane; i < q_width; i += WG) {
        float x = p.qkv.at[q_at + i];
        q_sum = fma(x, x, q_sum);
    }
    for (uint i = lane; i < k_width; i += WG) {
        float x = p.qkv.at[k_at + i];
        k_sum = fma(x, x, k_sum);
    }
    const float q_inverse = inverse_of(workgroup_sum(q_sum), q_width),
                k_inverse = inverse_of(workgroup_sum(k_sum), k_width);
    for (uint e = lane; e < ROWS * p.d_head; e += WG) {
        const uint r = e / p.d_head, i = e % p.d_head;
        precise float x = rows[head_row(r) + i];
        x *= r < HEADS ? q_inverse : k_inverse;
        x *= r < HEADS ? p.q_gain.at[(h + min(r, last)) * p.d_head + i]
                       : p.k_gain.at[g * p.d_head + i];
        rows[head_row(r) + i] = x;
    }
    barrier();
}

void rows_rotate(uint lane, uint angle) {
    const uint n_pairs = p.d_rot / 2;
    const bool interleaved = (p.flags & STEP_INTERLEAVED) != 0;
    const uint step = interleaved ? 2 : 1, apart = interleaved ? 1 : n_pairs;
    for (uint e = lane; e < ROWS * n_pairs; e += WG) {
        const uint r = e / n_pairs, i = e % n_pairs, at = (angle * n_pairs + i) * 2;
        float c, s;
        if (r < HEADS) {
            c = p.q_angles.at[at];
            s = p.q_angles.at[at + 1];
        } else {
            c = p.angles.at[at];
            s = p.angles.at[at + 1];
        }
        const uint first = head_row(r) + i * step, second = first + apart;
        float a = rows[first], b = rows[second];
        precise float rotated = a * c - b * s, other = b * c + a * s; // as in rope.comp
        rows[first] = rotated;
        rows[second] = other;
    }
    barrier();
}

// The queries and the present key, as the scores need them, and the key and value in the cache.
void rows_make(uint lane, token_meta token, uint h, uint last, uint g) {
    const bool store = (p.flags & STEP_STORE) != 0;
    const uint kv_width = p.n_kv_heads * p.d_head, q_at = token.q_token * p.stride,
               k_at = q_at + (p.n_heads + g) * p.d_head,
               cached = (token.k_slot + token.pos) * kv_width + g * p.d_head;
    for (uint e = lane; e < ROWS * p.d_head; e += WG) {
        const uint r = e / p.d_head, i = e % p.d_head;
        float x;
        if (r < HEADS)
            x = p.qkv.at[q_at + (h + min(r, last)) * p.d_head + i];
        else if (store)
            x = p.qkv.at[k_at + i];
        else
            x = p.k_cache.at[(cached + i) / 4][i % 4];
        rows[head_row(r) + i] = x;
    }
    barrier();
    if ((p.flags & STEP_NORM_HEAD) != 0)
        rows_norm_head(lane);
    if ((p.flags & STEP_NORM_LAYER) != 0)
        rows_norm_layer(lane, h, last, g);
    if ((p.flags & STEP_NORM_WIDE) != 0)
        rows_norm_wide(lane, token.q_token, h, last, g);
    if ((p.flags & STEP_ROTATE) != 0)
        rows_rotate(lane, token.angle);
    // of the workgroups of a key/value head the first one writes
    if (store && h % (p.n_heads / p.n_kv_heads) == 0)
        for (uint i = lane; i < p.d_head / 4; i += WG) {
            const uint to = (token.slot * kv_width + g * p.d_head) / 4 + i,
                       key = head_row(HEADS) + 4 * i, v_at = k_at + kv_width + 4 * i;
            p.k_cache.at[to] = vec4(rows[key], rows[key + 1], rows[key + 2], rows[key + 3]);
            p.v_cache.at[to] = vec4(p.qkv.at[v_at], p.qkv.at[v_at + 1], p.qkv.at[v_at + 2],
                                    p.qkv.at[v_at + 3]);
        }
}

float capped(float acc) {
    float score = acc * p.scale;
    if (p.softcap != 0.0)
        score = p.softcap * tanh(clamp(score / p.softcap, -15.0, 15.0));
    return score;
}

// Writes the capped scores of the keys start .. pos: lanes lie along keys.
void write_scores(uint lane, token_meta token, uint last, uint g, uint row, uint start) {
    const uint quads = p.d_head / 4, kv_quads = p.n_kv_heads * quads;
    for (uint j = start + lane; j < token.pos; j += WG) {
        const uint k_at = (token.k_slot + j) * kv_quads + g * quads;
        float acc[HEADS];
        [[unroll]] for (uint i = 0; i < HEADS; i++)
            acc[i] = 0.0;
        for (uint first = 0; first < quads; first += 4) {
            vec4 k[4];
            [[unroll]] for (uint u = 0; u < 4; u++)
                k[u] = p.k_cache.at[k_at + min(first + u, quads - 1)];
            [[unroll]] for (uint u = 0; u < 4; u++)
                if (first + u < quads) {
                    [[unroll]] for (uint d = 0; d < 4; d++) {
                        [[unroll]] for (uint i = 0; i < HEADS; i++)
                            acc[i] = fma(rows[head_row(i) + 4 * (first + u) + d], k[u][d], acc[i]);
                    }
                }
        }
        [[unroll]] for (uint i = 0; i < HEADS; i++)
            if (i <= last)
                p.scores.at[row + i * p.key_stride + j] = capped(acc[i]);
    }
    if (lane <= last) { // the present key
        float acc = 0.0;
        for (uint d = 0; d < p.d_head; d++)
            acc = fma(rows[head_row(lane) + d], rows[head_row(HEADS) + d], acc);
        p.scores.at[row + lane * p.key_stride + token.pos] = capped(acc);
    }
}

// Columns 4 c to 4 c + 3 of the present value.
vec4 present_value(token_meta token, uint g, uint c) {
    if ((p.flags & STEP_STORE) == 0)
        return p.v_cache.at[(token.v_slot + token.pos) * (p.n_kv_heads * p.d_head / 4) +
                            g * (p.d_head / 4) + c];
    const uint at = token.q_token * p.stride + (p.n_heads + p.n_kv_heads + g) * p.d_head + 4 * c;
    return vec4(p.qkv.at[at], p.qkv.at[at + 1], p.qkv.at[at + 2], p.qkv.at[at + 3]);
}

// Writes z of token t, the sum of pattern times values: lanes lie along the head's columns, four
// each, and along keys.
void write_outputs(uint lane, uint t, token_meta token, uint h, uint last, uint g, uint row,
                   uint start) {
    const uint quads = p.d_head / 4, kv_quads = p.n_kv_heads * quads, groups = WG / quads,
               group = lane / quads, c = lane % quads;
    const uint v_at = token.v_slot * kv_quads + g * quads + c;
    vec4 acc[HEADS];
    [[unroll]] for (uint i = 0; i < HEADS; i++)
        acc[i] = vec4(0.0);
    if (group < groups) {
        uint j = start + (group + groups - start % groups) % groups;
        for (; j < token.pos; j += 4 * groups) {
            vec4 v[4];
            [[unroll]] for (uint u = 0; u < 4; u++)
                v[u] = p.v_cache.at[v_at + min(j + u * groups, token.pos - 1) * kv_quads];
            [[unroll]] for (uint u = 0; u < 4; u++)
                if (j + u * groups < token.pos) {
                    [[unroll]] for (uint i = 0; i < HEADS; i++)
                        acc[i] = fma(
                            vec4(p.scores.at[row + min(i, last) * p.key_stride + j + u * groups]),
                            v[u], acc[i]);
                }
        }
        if (token.pos % groups == group) {
            vec4 v = present_value(token, g, c);
            [[unroll]] for (uint i = 0; i < HEADS; i++)
                acc[i] = fma(vec4(p.scores.at[row + min(i, last) * p.key_stride + token.pos]), v,
                             acc[i]);
        }
    }
    [[unroll]] for (uint i = 0; i < HEADS; i++)
        parts[i * WG + lane] = acc[i];
    barrier();
    for (uint o = lane; o < (last + 1) * quads; o += WG) {
        const uint i = o / quads, column = o % quads;
        vec4 sum = parts[i * WG + column];
        for (uint s = 1; s < groups; s++)
            sum += parts[i * WG + s * quads + column];
        const uint to = t * p.z_stride + (h + i) * p.d_head + 4 * column;
        [[unroll]] for (uint d = 0; d < 4; d++)
            p.z.at[to + d] = sum[d];
    }
}

void main() {
    const uint lane = gl_LocalInvocationID.x, t = gl_WorkGroupID.x,
               group = p.n_heads / p.n_kv_heads, passes = (group + HEADS - 1) / HEADS,
               g = gl_WorkGroupID.y / passes, first = gl_WorkGroupID.y % passes * HEADS,
               h = g * group + first, last = min(HEADS, group - first) - 1;
    const token_meta token = p.tokens.at[t];
    const uint start = p.window != 0 && token.pos + 1 > p.window ? token.pos + 1 - p.window : 0;
    const uint row = (t * p.n_heads + h) * p.key_stride;
    if ((p.flags & STEP_PATTERN) == 0) {
        rows_make(lane, token, h, last, g);
        write_scores(lane, token, last, g, row, start);
        memoryBarrierBuffer();
        barrier();
        for (uint i = 0; i <= last; i++)
            softmax_row(p.scores, row + i * p.key_stride, token.pos, p.window, p.key_stride);
        memoryBarrierBuffer();
        barrier();
    }
    write_outputs(lane, t, token, h, last, g, row, start);
}
