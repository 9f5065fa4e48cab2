// A product of attention in prefill on matrix units (VK_KHR_cooperative_matrix):
//     scores[t, h, j] = cap(scale * q[t, h, :] . k[j, g, :])
//     OUTPUT: z[t, h, :] = sum_j pattern[t, h, j] v[j, g, :]
// with g the key/value head of query head h. Units multiply float16 and add in float32, so both
// sides are split into float16 parts h and l as the tiles are loaded. A span of SPAN values of the
// sum is read twice: first for the largest magnitudes, which give powers of two, then for the
// product. The power of a key's values is the same for all queries, so it is multiplied into the
// pattern before that is split.
//
// Defines   OUTPUT  see above
//           FAST    h alone: one product in float16
// Buffers   see attn_matrix_params
// Grid      x = keys or (OUTPUT) columns of the head / BN, y = tiles / TILES, z = query heads. A
//           workgroup takes TILES tiles; those of one row together, row by row
// Order     for each result: in each step of TK values h h, l h and h l; a partial sum for every
//           SPAN values, counted from position 0, and these in ascending order. Inside a step the
//           device decides. Zeros of the pattern change nothing, so the order depends on neither
//           the tiles nor the other rows
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#define MATRIX_UNITS
#define MATRIX_WORKGROUP 5
#include "types.glsl"
layout(push_constant, scalar) uniform Params { attn_matrix_params p; };

#include "matrix_scale.glsl"

// Subgroups of a workgroup along m and n, and tiles of each of them.
const uint SM = 2, SN = 2, FM = 2, FN = 2;
#ifdef FAST
const uint PARTS = 1;
#else
const uint PARTS = 2;
#endif
const uint BM = SM * FM * TM, BN = SN * FN * TN, BK = MATRIX_BLOCK, THREADS = SM * SN * SG;
const uint TILES = BM / OP_TILE, SPAN = 8 * BK, EACH = TM * TN / SG;

// Tiles in shared memory, in cells of 8 float16, a row padded by one so that rows begin in
// different banks: a [part, m, k], b [part, n, k]. Results use the same memory.
const uint CELLS = BK / 8, ROW = CELLS + 1, A_PART = BM * ROW, B_TILE = PARTS * A_PART,
           B_PART = BN * ROW;
shared uvec4 tile[B_TILE + PARTS * B_PART];
// Of row m, of which a tile has OP_TILE and the last ones may be empty: where its values of a and
// of the result begin, the cache slot of its first key, the last key that it reads (OUTPUT) or
// that its tile computes.
const uint NO_SLOT = 0xffffffffu; // of an empty row
shared uint row_at[BM], row_dst[BM], row_slot[BM], row_last[BM];
// Largest magnitudes; of b for each n, or (OUTPUT) for each k of a span, with its power of two.
#ifdef OUTPUT
const uint B_RANGES = SPAN;
shared vec4 power[SPAN / 4];
#else
const uint B_RANGES = BN;
#endif
shared uint a_range[BM], b_range[B_RANGES];

// Cells that an invocation fetches of a block.
const uint A_LOADS = BM * CELLS, B_LOADS = BN * CELLS;
const uint A_EACH = (A_LOADS + THREADS - 1) / THREADS, B_EACH = (B_LOADS + THREADS - 1) / THREADS;
#define IN_A(e) (A_LOADS % THREADS == 0 || e < A_LOADS)
#define IN_B(e) (B_LOADS % THREADS == 0 || e < B_LOADS)
vec4 a_next[A_EACH][2], b_next[B_EACH][2];

// What is multiplied now: rows [first, end), which read the keys from a slot on, whose values of
// this head begin at kv_at; last_key: the last that one of them reads; n0: the first result of a
// row.
uint first, end, kv_at, kv_stride, last_key, n0;

void a_fetch(uint id, uint k0) {
    [[unroll]] for (uint r = 0; r < A_EACH; r++) {
        const uint e = min(r * THREADS + id, A_LOADS - 1), m = e / CELLS, at = row_at[m];
#ifdef OUTPUT
        const uint seen = m >= first ? m < end ? row_last[m] + 1 : 0 : 0;
#endif
        [[unroll]] for (uint quad = 0; quad < 2; quad++) {
            const uint k = k0 + e % CELLS * 8 + quad * 4;
#ifdef OUTPUT
            const vec4 x = p.a.at[(at + min(k, p.a_stride - 4)) / 4];
            a_next[r][quad] = mix(vec4(0), x, lessThan(uvec4(k, k + 1, k + 2, k + 3), uvec4(seen)));
#else
            const vec4 x = p.a.at[(at + min(k, p.d_head - 4)) / 4];
            a_next[r][quad] = k < p.d_head ? x : vec4(0);
#endif
        }
    }
}

// 4 values of a key, from column d of the head on. What lies past the end is another value of the
// head or another key: it meets zeros of a, or is not written.
vec4 quad_of(uint key, uint d) {
    return p.b.at[(kv_at + min(key, last_key) * kv_stride + min(d, p.d_head - 4)) / 4];
}

void b_fetch(uint id, uint k0) {
    [[unroll]] for (uint r = 0; r < B_EACH; r++) {
        const uint e = min(r * THREADS + id, B_LOADS - 1);
#ifdef OUTPUT // neighbours read neighbouring columns of 8 keys
        const uint from = kv_at + min(n0 + e % BN, p.d_head - 1), last = last_key * kv_stride,
                   key = (k0 + e / BN * 8) * kv_stride;
        [[unroll]] for (uint i = 0; i < 8; i++)
            b_next[r][i / 4][i % 4] = FloatsIn(p.b).at[from + min(key + i * kv_stride, last)];
#else // neighbours read one key
        [[unroll]] for (uint quad = 0; quad < 2; quad++)
            b_next[r][quad] = quad_of(n0 + e / CELLS, k0 + e % CELLS * 8 + quad * 4);
#endif
    }
}

uint largest(vec4 x, vec4 y) {
    const vec4 m = max(abs(x), abs(y));
    return floatBitsToUint(max(max(m.x, m.y), max(m.z, m.w)));
}

void a_measure(uint id) {
    [[unroll]] for (uint r = 0; r < A_EACH; r++)
        if (IN_A(r * THREADS + id))
            atomicMax(a_range[(r * THREADS + id) / CELLS], largest(a_next[r][0], a_next[r][1]));
}

#ifdef OUTPUT
// The largest magnitude of each key's values among the columns of this workgroup.
void keys_measure(uint id, uint k0) {
    const uint row_cells = BN / 8, loads = BK * row_cells;
    [[unroll]] for (uint r = 0; r < (loads + THREADS - 1) / THREADS; r++) {
        const uint e = min(r * THREADS + id, loads - 1), key = k0 + e / row_cells,
                   d = n0 + e % row_cells * 8;
        atomicMax(b_range[key % SPAN], largest(quad_of(key, d), quad_of(key, d + 4)));
    }
}

// The pattern times the powers of two of the keys' values, and the values divided by them.
void a_weigh(uint id, uint k0) {
    [[unroll]] for (uint r = 0; r < A_EACH; r++) {
        const uint k = k0 % SPAN + (r * THREADS + id) % CELLS * 8;
        [[unroll]] for (uint quad = 0; quad < 2; quad++)
            a_next[r][quad] *= power[k / 4 + quad];
    }
}
void b_weigh(uint id, uint k0) {
    [[unroll]] for (uint r = 0; r < B_EACH; r++) {
        const uint k = k0 % SPAN + min(r * THREADS + id, B_LOADS - 1) / BN * 8;
        [[unroll]] for (uint quad = 0; quad < 2; quad++)
            b_next[r][quad] *= uintBitsToFloat((254u << 23) - floatBitsToUint(power[k / 4 + quad]));
    }
}
#else
void keys_measure(uint id, uint k0) {
    b_fetch(id, k0);
    [[unroll]] for (uint r = 0; r < B_EACH; r++)
        if (IN_B(r * THREADS + id))
            atomicMax(b_range[(r * THREADS + id) / CELLS], largest(b_next[r][0], b_next[r][1]));
}
void a_weigh(uint id, uint k0) {}
void b_weigh(uint id, uint k0) {}
#endif

// The largest magnitudes of a span.
void span_measure(uint id, uint k0, uint k1) {
    for (uint i = id; i < BM; i += THREADS)
        a_range[i] = 0;
    for (uint i = id; i < B_RANGES; i += THREADS)
        b_range[i] = 0;
    barrier();
    for (uint k = k0; k < k1; k += BK)
        keys_measure(id, k);
#ifdef OUTPUT
    barrier();
    for (uint i = id; i < SPAN; i += THREADS)
        power[i / 4][i % 4] = matrix_inverse(matrix_exponent(b_range[i]));
    barrier();
#endif
    for (uint k = k0; k < k1; k += BK) {
        a_fetch(id, k);
        a_weigh(id, k);
        a_measure(id);
    }
    barrier();
}

// Writes 8 values times a factor as float16 parts: a cell of part 0 and, `next` later, of part 1.
void split(vec4 x, vec4 y, float factor, uint at, uint next) {
    x *= factor;
    y *= factor;
    const uvec4 high = uvec4(packHalf2x16(x.xy), packHalf2x16(x.zw), packHalf2x16(y.xy),
                             packHalf2x16(y.zw));
    tile[at] = high;
#ifndef FAST
    tile[at + next] = uvec4(
        packHalf2x16(x.xy - unpackHalf2x16(high.x)), packHalf2x16(x.zw - unpackHalf2x16(high.y)),
        packHalf2x16(y.xy - unpackHalf2x16(high.z)), packHalf2x16(y.zw - unpackHalf2x16(high.w)));
#endif
}

void store(uint id, uint k0) {
    a_weigh(id, k0);
    b_weigh(id, k0);
    [[unroll]] for (uint r = 0; r < A_EACH; r++) {
        const uint e = r * THREADS + id;
        if (IN_A(e))
            split(a_next[r][0], a_next[r][1], matrix_factor(matrix_exponent(a_range[e / CELLS])),
                  e / CELLS * ROW + e % CELLS, A_PART);
    }
    [[unroll]] for (uint r = 0; r < B_EACH; r++) {
        const uint e = r * THREADS + id;
        if (IN_B(e))
#ifdef OUTPUT
            split(b_next[r][0], b_next[r][1], 1.0, B_TILE + e % BN * ROW + e / BN, B_PART);
#else
            split(b_next[r][0], b_next[r][1], matrix_factor(matrix_exponent(b_range[e / CELLS])),
                  B_TILE + e / CELLS * ROW + e % CELLS, B_PART);
#endif
    }
}

coopmat<float, gl_ScopeSubgroup, TM, TN, gl_MatrixUseAccumulator> part[FM][FN];
coopmat<float16_t, gl_ScopeSubgroup, TM, TK, gl_MatrixUseA> a[FM];
coopmat<float16_t, gl_ScopeSubgroup, TK, TN, gl_MatrixUseB> b[FN];
float sums[FM * FN * EACH];

#define ZERO coopmat<float, gl_ScopeSubgroup, TM, TN, gl_MatrixUseAccumulator>(0.0)
#define FOR_TILES \
    [[unroll]] for (uint i = 0; i < FM; i++) [[unroll]] \
        for (uint j = 0; j < FN; j++)

// sm, sn: the subgroup's first row of a and of b.
void block_multiply(uint sm, uint sn) {
    [[unroll]] for (uint k = 0; k < BK; k += TK) {
        [[unroll]] for (uint product = 0; product < 2 * PARTS - 1; product++) {
            // h h, l h, h l; not l l, which is below float32's rounding
            const uint a_part = product & 1, b_part = product >> 1;
            [[unroll]] for (uint j = 0; j < FN && a_part == 0; j++)
                coopMatLoad(b[j], tile, B_TILE + b_part * B_PART + (sn + j * TN) * ROW + k / 8, ROW,
                            gl_CooperativeMatrixLayoutColumnMajor);
            [[unroll]] for (uint i = 0; i < FM; i++)
                coopMatLoad(a[i], tile, a_part * A_PART + (sm + i * TM) * ROW + k / 8, ROW,
                            gl_CooperativeMatrixLayoutRowMajor);
            FOR_TILES part[i][j] = coopMatMulAdd(a[i], b[j], part[i][j]);
        }
    }
}

// Adds the partial sums to those of the invocation, tile by tile through shared memory that no
// other subgroup uses.
void span_add(uint sm, uint sn) {
    const uint own = gl_SubgroupID * (TM * TN / 4);
    FOR_TILES {
        coopMatStore(part[i][j], tile, own, TN / 4, gl_CooperativeMatrixLayoutRowMajor);
        subgroupBarrier();
        [[unroll]] for (uint r = 0; r < EACH; r++) {
            const uint e = r * SG + gl_SubgroupInvocationID, m = sm + i * TM + e / TN;
            float x = uintBitsToFloat(tile[own + e / 4][e % 4]);
            x *= matrix_inverse(matrix_exponent(a_range[m]));
#ifndef OUTPUT
            x *= matrix_inverse(matrix_exponent(b_range[sn + j * TN + e % TN]));
#endif
            sums[(i * FN + j) * EACH + r] += x;
        }
        subgroupBarrier();
    }
    barrier();
}

void sums_write(uint slot, uint sm, uint sn) {
    FOR_TILES [[unroll]] for (uint r = 0; r < EACH; r++) {
        const uint e = r * SG + gl_SubgroupInvocationID, m = sm + i * TM + e / TN,
                   n = n0 + sn + j * TN + e % TN;
        float x = sums[(i * FN + j) * EACH + r];
#ifdef OUTPUT
        const bool in_row = n < p.d_head;
#else
        const bool in_row = n <= row_last[m];
        x *= p.scale;
        if (p.softcap != 0.0)
            x = p.softcap * tanh(clamp(x / p.softcap, -15.0, 15.0));
#endif
        if (m >= first && m < end && row_slot[m] == slot && in_row)
            p.dst.at[row_dst[m] + n] = x;
    }
}

void rows_read(uint id, uint n_tiles) {
    const uint h = gl_WorkGroupID.z;
    for (uint m = id; m < BM; m += THREADS) {
        const query_tile t = p.tiles.at[gl_WorkGroupID.y * TILES + min(m / OP_TILE, n_tiles - 1)];
        const bool empty = m % OP_TILE >= t.count;
        const uint token = t.first + min(m % OP_TILE, t.count - 1);
        const token_meta meta = p.tokens.at[token];
        const uint in_span = (token - p.first_token) * p.n_heads + h;
#ifdef OUTPUT
        row_at[m] = in_span * p.a_stride;
        row_dst[m] = token * p.dst_stride + h * p.d_head;
        row_slot[m] = empty ? NO_SLOT : meta.v_slot;
        row_last[m] = meta.pos;
#else
        row_at[m] = meta.q_token * p.a_stride + h * p.d_head;
        row_dst[m] = in_span * p.dst_stride;
        row_slot[m] = empty ? NO_SLOT : meta.k_slot;
        row_last[m] = p.tokens.at[t.first + t.count - 1].pos;
#endif
    }
    barrier();
}

// k: the first value of the sum that is not zero for all rows, rounded down to a block.
void rows_multiply(uint id, uint slot, uint k, uint n_sum) {
    const uint sm = gl_SubgroupID / SN * FM * TM, sn = gl_SubgroupID % SN * FN * TN;
    [[unroll]] for (uint i = 0; i < FM * FN * EACH; i++)
        sums[i] = 0;
    while (k < n_sum) {
        const uint stop = min(k / SPAN * SPAN + SPAN, n_sum);
        FOR_TILES part[i][j] = ZERO;
        span_measure(id, k, stop);
        a_fetch(id, k);
        b_fetch(id, k);
        for (; k < stop; k += BK) {
            store(id, k);
            barrier();
            if (k + BK < stop) {
                a_fetch(id, k + BK);
                b_fetch(id, k + BK);
            }
            block_multiply(sm, sn);
            barrier();
        }
        k = stop;
        span_add(sm, sn);
    }
    sums_write(slot, sm, sn);
}

void main() {
    const uint n_tiles = min(p.n_tiles - gl_WorkGroupID.y * TILES, TILES);
    n0 = gl_WorkGroupID.x * BN;
    kv_stride = p.n_kv_heads * p.d_head;
    rows_read(gl_LocalInvocationID.x, n_tiles);
    // the tiles of each row of the batch in turn
    for (uint tile_ = 0; tile_ < n_tiles;) {
        const uint slot = row_slot[tile_ * OP_TILE];
        first = tile_ * OP_TILE;
        uint first_key = NO_SLOT;
        last_key = 0;
        for (; tile_ < n_tiles && row_slot[tile_ * OP_TILE] == slot; tile_++) {
            first_key = min(first_key, row_last[tile_ * OP_TILE]);
            last_key = max(last_key, row_last[tile_ * OP_TILE + OP_TILE - 1]);
        }
        end = tile_ * OP_TILE;
        kv_at = slot * kv_stride + gl_WorkGroupID.z / (p.n_heads / p.n_kv_heads) * p.d_head;
#ifdef OUTPUT
        first_key = p.window != 0 && first_key + 1 > p.window ? first_key + 1 - p.window : 0;
        rows_multiply(gl_LocalInvocationID.x, slot, first_key / BK * BK, last_key + 1);
#else
        if (n0 <= last_key)
            rows_multiply(gl_LocalInvocationID.x, slot, 0, p.d_head);
#endif
    }
}
