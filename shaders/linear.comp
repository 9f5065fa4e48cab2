// dst[m, n] = sum_k x[m, k] W[n, k] (+ bias) (+ add): the matrix kernel for drivers whose subgroups are vector registers (software).
//
// Defines   WEIGHT 0 float32, 1 bfloat16, 2 float16
//           RM    rows of x a subgroup       RN  columns a lane (a subgroup covers SG * RN columns)
//           LOAD64 (optional) 64-bit loads through uint64_t; needs shaderInt64; the bits do not change
// Grid      x = ceil(M / RM), y = ceil(N / (RN * WG)): rows fastest, so that a panel stays in cache meanwhile
//
// Panels: element e = 4 consecutive k of one n (uvec2: 4 halves; vec4: 4 floats) at e(n, k) = ((n / 32) * panel_quads + k / 4) * 32 + n % 32,
// N padded to 32 and K to 16 with zeros.
//
// Order: every output is one chain acc = fma(x, w, acc) over ascending k from zero. Tiles only choose which lane holds which chain, so all
// variants and all M give the same bits.
//
// Why this shape: on lavapipe a load in a loop is a gather and costs per element, not per byte, while a broadcast from a constant lane is one
// or two shuffles. So lanes lie along n, the tile of x is loaded once by lanes along k and broadcast, and tiles are large. Shared memory and
// uniform buffers are several times slower there (docs/decisions.md).
#version 450
#extension GL_GOOGLE_include_directive : require
#ifdef LOAD64
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#endif
#include "types.glsl"
#include "linear_epilogue.glsl"

const uint NB = 32; // columns in a panel
const uint KB = 16; // k a step; K is padded to it

layout(push_constant, scalar) uniform Params { linear_params p; };

vec4 unpack_quad(uvec2 v)
{
#if WEIGHT == 1
    return uintBitsToFloat(uvec4(v.x << 16, v.x & 0xffff0000u, v.y << 16, v.y & 0xffff0000u));
#else
    return vec4(unpackHalf2x16(v.x), unpackHalf2x16(v.y));
#endif
}

#if WEIGHT == 0
#define LOAD_W(i) p.weights.at[i]
#else
#define LOAD_W(i) unpack_quad(p.weights.at[i])
#endif

// Element e = row * KB + k of the tile of x lives in register e / SG of lane e % SG.
const uint X_REGS = (RM * KB + SG - 1) / SG;
const uint X_MAX = RM * KB / 4; // at the smallest SG, 4

void main()
{
    const uint lane = gl_SubgroupInvocationID;
    const uint m0 = gl_WorkGroupID.x * RM;
    const uint n0 = (gl_WorkGroupID.y * (WG / SG) + gl_SubgroupID) * SG * RN + lane;

    uint w_at[RN]; // columns past the end read the last one and are not written
    [[unroll]] for (int j = 0; j < RN; j++) {
        uint n = min(n0 + j * SG, p.n_out - 1);
        w_at[j] = (n / NB * p.panel_quads + p.first_quad) * NB + n % NB;
    }
    uint x_at[X_MAX]; // rows past the end read the last one and are not written
    [[unroll]] for (uint r = 0; r < X_REGS; r++) {
        uint e = r * SG + lane;
        x_at[r] = min(m0 + min(e / KB, RM - 1), p.n_rows - 1) * p.x_stride + e % KB;
    }

    float acc[RM][RN];
    [[unroll]] for (int i = 0; i < RM; i++)
        [[unroll]] for (int j = 0; j < RN; j++)
            acc[i][j] = 0;

    for (uint q = 0; q < p.k_quads; q += KB / 4) {
        float x[X_MAX];
        [[unroll]] for (uint r = 0; r < X_REGS; r++)
            x[r] = p.x.at[x_at[r] + q * 4];
        [[unroll]] for (uint s = 0; s < KB / 4; s++) {
            vec4 w[RN];
            [[unroll]] for (int j = 0; j < RN; j++)
                w[j] = LOAD_W(w_at[j] + (q + s) * NB);
            [[unroll]] for (int i = 0; i < RM; i++)
                [[unroll]] for (int c = 0; c < 4; c++) {
                    uint e = i * KB + s * 4 + c;
                    float value = subgroupBroadcast(x[e / SG], e % SG);
                    [[unroll]] for (int j = 0; j < RN; j++)
                        acc[i][j] = fma(value, w[j][c], acc[i][j]);
                }
        }
    }

    [[unroll]] for (int i = 0; i < RM; i++)
        if (m0 + i < p.n_rows)
            [[unroll]] for (int j = 0; j < RN; j++)
                if (n0 + j * SG < p.n_out)
                    p.dst.at[(m0 + i) * p.out_stride + n0 + j * SG] = linear_epilogue(p, acc[i][j], m0 + i, n0 + j * SG);
}
