// Weights in panels. A cell is 16 bytes: 4 (float32) or 8 (bfloat16, float16) consecutive k of one
// column. linear.comp says where it lies.
#if WEIGHT == 0
#define CELL 4
#else
#define CELL 8
#endif

#ifdef TEXELS
// The same memory as a texel buffer. Software drivers fetch a texel of a lane with one load, where
// 16 bytes of a buffer take four gathers.
layout(set = 0, binding = 0) uniform usamplerBuffer weight_texels;
#define LOAD_CELL(i) texelFetch(weight_texels, int(i))
#else
#define LOAD_CELL(i) p.weights.at[i]
#endif

// Values 4 * quad to 4 * quad + 3 of a cell, as float32.
vec4 cell_values(uvec4 cell, uint quad) {
#if WEIGHT == 0
    return uintBitsToFloat(cell);
#else
    uvec2 v = quad == 0 ? cell.xy : cell.zw;
#if WEIGHT == 1
    return uintBitsToFloat(uvec4(v.x << 16, v.x & 0xffff0000u, v.y << 16, v.y & 0xffff0000u));
#else
    return vec4(unpackHalf2x16(v.x), unpackHalf2x16(v.y));
#endif
#endif
}
