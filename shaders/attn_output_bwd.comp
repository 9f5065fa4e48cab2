// sums[j, g, :] (+)= sum over queries t and heads h of group g of a[t, h, j] y[t, h, :], for the
// queries t of j's row that see key j. With a = pattern and y = dz these are the gradients of the
// values; with a = dscores and y = q, those of the keys.
// Buffers   a [T', H, key_stride], T' counted from token first_token; y [T, y_stride]; sums
//           [T, out_stride]
// Grid      x = column spans, y = tiles of keys, z = key/value heads. A subgroup takes up to RK
//           keys of a row and RN * SG columns of the head; lanes lie along columns
// Order     one fma chain for each output, over ascending (t, h). Where the queries are divided
//           among dispatches, `add` continues the same chain
//
// A tile has at most OP_TILE keys. A full tile with an even number also takes the keys of the next
// one, if that continues the row. Loads cost per element on software drivers, so each element of y
// serves RK keys, and the accumulators take STEPS pairs (t, h) at once, for the reason given in
// linear_bwd.comp. This is 3 times as fast as 8 keys and one pair at a time.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { attn_output_bwd_params p; };

const uint RK = 2 * OP_TILE, STEPS = 4;
const uint RN_MAX = 4, RN = ATTN_OUTPUT_BWD_RN(SG);
const uint A_REGS = (RK + SG - 1) / SG, A_MAX = RK / 4; // at the smallest SG, 4

// Is tile y full, and does tile y + 1 continue its row?
bool goes_on(uint y) {
    query_tile tile = p.tiles.at[y], next = p.tiles.at[y + 1];
    return tile.count == OP_TILE && next.first == tile.first + OP_TILE &&
           next.first < p.tokens.at[tile.first].row_end;
}

void main() {
    const uint y_tile = gl_WorkGroupID.y, g = gl_WorkGroupID.z, lane = gl_SubgroupInvocationID,
               group = p.n_heads / p.n_kv_heads;
    const uint d0 = (gl_WorkGroupID.x * (WG / SG) + gl_SubgroupID) * SG * RN;
    if (d0 >= p.d_head || (y_tile % 2 == 1 && goes_on(y_tile - 1)))
        return;
    // the first key, which is also the first query that sees it
    const uint j0 = p.tiles.at[y_tile].first;
    uint count = p.tiles.at[y_tile].count;
    if (y_tile % 2 == 0 && y_tile + 1 < gl_NumWorkGroups.y && goes_on(y_tile))
        count += p.tiles.at[y_tile + 1].count;
    const uint pos = p.tokens.at[j0].pos;
    uint t = max(j0, p.first_token), last = min(p.tokens.at[j0].row_end, p.last_token);
    if (p.window != 0) // only the queries that still see the last key
        last = min(last, j0 + count - 1 + p.window);
    uint column[RN_MAX];
    [[unroll]] for (uint r = 0; r < RN; r++)
        column[r] = min(d0 + r * SG + lane, p.d_head - 1);

    float acc[RK][RN_MAX];
    [[unroll]] for (uint i = 0; i < RK; i++) {
        [[unroll]] for (uint r = 0; r < RN; r++)
            acc[i][r] = p.add != 0 && i < count
                            ? p.sums.at[(j0 + i) * p.out_stride + g * p.d_head + column[r]]
                            : 0.0;
    }
    uint h = g * group;
    while (t < last) {
        float y[STEPS][RN_MAX], a[STEPS][A_MAX];
        [[unroll]] for (uint s = 0; s < STEPS; s++) {
            // past the end, the last query is read again and counts as zeros
            const uint at = min(t, last - 1), keys = at - j0;
            const uint a_at = ((at - p.first_token) * p.n_heads + h) * p.key_stride + pos;
            [[unroll]] for (uint r = 0; r < RN; r++)
                y[s][r] = p.y.at[at * p.y_stride + h * p.d_head + column[r]];
            [[unroll]] for (uint q = 0; q < A_REGS; q++) { // a key after the query counts as 0
                float value = p.a.at[a_at + min(lane + q * SG, keys)];
                a[s][q] = lane + q * SG <= keys && t < last ? value : 0.0;
            }
            bool next = ++h == (g + 1) * group;
            h = next ? g * group : h;
            t += next ? 1 : 0;
        }
        [[unroll]] for (uint i = 0; i < RK; i++) {
            [[unroll]] for (uint s = 0; s < STEPS; s++) {
                float value = subgroupBroadcast(a[s][i / SG], i % SG);
                [[unroll]] for (uint r = 0; r < RN; r++)
                    acc[i][r] = fma(value, y[s][r], acc[i][r]);
            }
        }
    }
    [[unroll]] for (uint i = 0; i < RK; i++)
        if (i < count) {
            [[unroll]] for (uint r = 0; r < RN; r++)
                if (d0 + r * SG + lane < p.d_head)
                    p.sums.at[(j0 + i) * p.out_stride + g * p.d_head + d0 + r * SG + lane] =
                        acc[i][r];
        }
}
