// One element of a panel: 4 consecutive k of one column, as float32.

vec4 unpack_quad(uvec2 v)
{
#if WEIGHT == 1
    return uintBitsToFloat(uvec4(v.x << 16, v.x & 0xffff0000u, v.y << 16, v.y & 0xffff0000u));
#else
    return vec4(unpackHalf2x16(v.x), unpackHalf2x16(v.y));
#endif
}

vec4 load_weights(Panels panels, uint i)
{
#if defined(LOAD64) && WEIGHT == 0
    return vec4(uintBitsToFloat(unpack32(panels.at[2 * i])), uintBitsToFloat(unpack32(panels.at[2 * i + 1])));
#elif defined(LOAD64)
    return unpack_quad(unpack32(panels.at[i]));
#elif WEIGHT == 0
    return panels.at[i];
#else
    return unpack_quad(panels.at[i]);
#endif
}
