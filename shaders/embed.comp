// dst[t, :] = scale * E[id(t), :], for the tokens whose id lies in this segment of the vocabulary.
//
// Define    POSITIONS   (optional) the row of a token's position instead, added to another row
//                       where EMBED_ADD says so
//           PICKED      (optional) ids from a list that a kernel wrote
// Buffers   tokens [T], weights: panels of E [V, D] (often tied to the unembedding; linear.comp
//           gives the layout), dst and add [T, stride]
// Grid      x = tokens; a workgroup takes one, its lanes the columns
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { embed_params p; };

float weight(uint n, uint k) {
    uint per_cell = p.weight_type == WEIGHT_F32 ? 4 : 8;
    uint word_at = (((n >> 5) * p.k_cells + k / per_cell) * 32 + (n & 31)) * 4;
    if (p.weight_type == WEIGHT_F32)
        return uintBitsToFloat(p.weights.at[word_at + k % 4]);
    uint word = p.weights.at[word_at + k % 8 / 2];
    if (p.weight_type == WEIGHT_BF16)
        return uintBitsToFloat((k & 1) == 0 ? word << 16 : word & 0xffff0000u);
    vec2 pair = unpackHalf2x16(word);
    return (k & 1) == 0 ? pair.x : pair.y;
}

void main() {
    uint t = gl_WorkGroupID.x;
#ifdef POSITIONS
    uint id = p.tokens.at[t].pos;
#elif defined(PICKED)
    uint id = uint(max(p.picked.at[t - t % p.share], 0.0));
#else
    uint id = p.tokens.at[t].id;
#endif
    if (id < p.first_id || id - p.first_id >= p.n_ids)
        return;
    for (uint k = gl_LocalInvocationID.x; k < p.width; k += WG) {
        // `precise` forbids contraction: a row that is added later must give the same bits
        precise float row = p.scale * weight(id - p.first_id, k);
#ifdef POSITIONS
        if ((p.flags & EMBED_ADD) != 0)
            row = p.add.at[t * p.stride + k] + row;
#endif
        p.dst.at[t * p.stride + k] = row;
    }
}
