// sums[j, g, :] (+)= sum over queries t of j's row and heads h of group g of a[t, h, j] y[t, h, :]: a subgroup takes a tile of up to 8 keys of a row and
// RN * SG columns of the head; lanes lie along columns. Order: one fma chain over ascending (t, h) for every output; cutting the queries into
// pieces (`add`) goes on with the same chain. Grid: x = column blocks, y = tiles, z = key/value heads.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { mix_bwd_params p; };

const uint RK = 8, RN = 2;

void main()
{
    query_tile tile = p.tiles.at[gl_WorkGroupID.y];
    const uint g = gl_WorkGroupID.z, lane = gl_SubgroupInvocationID, group = p.n_heads / p.n_kv_heads;
    const uint d0 = (gl_WorkGroupID.x * (WG / SG) + gl_SubgroupID) * SG * RN;
    if (d0 >= p.d_head)
        return;
    const uint j0 = p.tokens.at[tile.first].pos;
    uint first = max(tile.first, p.first_token), last = min(p.tokens.at[tile.first].row_end, p.last_token);
    if (p.window != 0) // queries that still see the tile's last key
        last = min(last, tile.first + tile.count - 1 + p.window);
    uint column[RN];
    [[unroll]] for (uint r = 0; r < RN; r++)
        column[r] = min(d0 + r * SG + lane, p.d_head - 1);

    float acc[RK][RN];
    [[unroll]] for (uint i = 0; i < RK; i++)
        [[unroll]] for (uint r = 0; r < RN; r++)
            acc[i][r] = p.add != 0 && i < tile.count ? p.sums.at[(tile.first + i) * p.out_stride + g * p.d_head + column[r]] : 0.0;
    for (uint t = first; t < last; t++) {
        uint pos = p.tokens.at[t].pos;
        for (uint h = g * group; h < (g + 1) * group; h++) {
            uint a_at = ((t - p.first_token) * p.n_heads + h) * p.key_stride + j0;
            float y[RN];
            [[unroll]] for (uint r = 0; r < RN; r++)
                y[r] = p.y.at[t * p.y_stride + h * p.d_head + column[r]];
            float a[RK / 4];
            [[unroll]] for (uint q = 0; q < (RK + SG - 1) / SG; q++) // keys after the query, and after the row, count nothing
                a[q] = lane + q * SG < RK && j0 + lane + q * SG <= pos ? p.a.at[a_at + lane + q * SG] : 0.0;
            [[unroll]] for (uint i = 0; i < RK; i++) {
                float value = subgroupBroadcast(a[i / SG], i % SG);
                [[unroll]] for (uint r = 0; r < RN; r++)
                    acc[i][r] = fma(value, y[r], acc[i][r]);
            }
        }
    }
    [[unroll]] for (uint i = 0; i < RK; i++)
        if (i < tile.count)
            [[unroll]] for (uint r = 0; r < RN; r++)
                if (d0 + r * SG + lane < p.d_head)
                    p.sums.at[(tile.first + i) * p.out_stride + g * p.d_head + d0 + r * SG + lane] = acc[i][r];
}
