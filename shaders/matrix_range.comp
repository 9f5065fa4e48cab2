// range[0] = max(range[0], the largest finite magnitude of a matrix), as the bits of a float.
// Buffers   weights: panels, range [1]
// Grid      x = workgroups, which take cells in turn
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
layout(push_constant, scalar) uniform Params { matrix_range_params p; };

uint finite(uint bits) { return bits < 0x7f800000u ? bits : 0; }

void main() {
    uint largest = 0;
    for (uint i = gl_GlobalInvocationID.x; i < p.n_cells; i += p.n_invocations) {
        const uvec4 cell = p.weights.at[i];
        [[unroll]] for (uint j = 0; j < 4; j++) {
            largest = max(largest, finite(cell[j] & (p.weight_type == WEIGHT_F32 ? 0x7fffffffu
                                                                                 : 0x7fff0000u)));
            if (p.weight_type == WEIGHT_BF16)
                largest = max(largest, finite((cell[j] & 0x7fffu) << 16));
        }
    }
    largest = subgroupMax(largest);
    if (subgroupElect())
        atomicMax(p.range.at[0], largest);
}
