// dst[n] = 1 / |W[n, :]|, or 0 for a row of zeros: the factor that turns logits into cosines. It
// runs once for each model.
// Buffers   weights: panels of W (linear.comp gives the layout), dst [N]
// Grid      x = ceil(N / WG); an invocation takes one row
// Order     one fma chain for each row, over ascending k
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

layout(push_constant, scalar) uniform Params { row_norms_params p; };

#include "weights.glsl"

void main() {
    uint n = gl_GlobalInvocationID.x;
    if (n >= p.n_out)
        return;
    float sum = 0.0;
    for (uint cell = 0; cell < p.panel_cells; cell++) { // the pad of k is zero
        uvec4 raw = LOAD_CELL((n / 32 * p.panel_cells + cell) * 32 + n % 32);
        [[unroll]] for (uint quad = 0; quad < CELL / 4; quad++) {
            vec4 w = cell_values(raw, quad);
            [[unroll]] for (uint c = 0; c < 4; c++)
                sum = fma(w[c], w[c], sum);
        }
    }
    p.dst.at[n] = sum > 0.0 ? 1.0 / sqrt(sum) : 0.0;
}
