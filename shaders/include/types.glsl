// The buffer references that the kernel arguments of params.h name, and the sizes that kernels
// are specialised with.
#ifndef TYPES_GLSL
#define TYPES_GLSL

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#extension GL_KHR_shader_subgroup_ballot : require
#extension GL_KHR_shader_subgroup_shuffle : require

#ifdef TEXELS
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#endif

#define VKSTEER_GLSL
#ifdef TEXELS
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Inputs {
    uint64_t at[];
};
#else
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Inputs { float at[]; };
#endif
layout(buffer_reference) buffer Tokens;
layout(buffer_reference) buffer Tiles;
layout(buffer_reference) buffer EditEntries;
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer FloatsIn {
    float at[];
};
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer FloatsOut { float at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer FloatsInOut { float at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Words { uint at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer WordsInOut { uint at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Panels {
    uvec4 at[];
};
layout(buffer_reference, scalar, buffer_reference_align = 16) writeonly buffer CellsOut {
    uvec4 at[];
};
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Vec4sIn {
    vec4 at[];
};
layout(buffer_reference, scalar, buffer_reference_align = 16) buffer Vec4s { vec4 at[]; };
#include "params.h"
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Tokens {
    token_meta at[];
};
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Tiles {
    query_tile at[];
};
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer EditEntries {
    edit_entry at[];
};

layout(constant_id = 0) const uint SG = 8; // subgroup size
#ifdef FIXED_WORKGROUP
const uint WG = FIXED_WORKGROUP;
#else
layout(constant_id = 1) const uint WG = 8; // workgroup size, a multiple of SG
#endif
#ifdef MATRIX_UNITS
// the shape of a tile of the device's matrix units: [TM, TK] times [TK, TN]
layout(constant_id = 2) const uint TM = 16;
layout(constant_id = 3) const uint TN = 16;
layout(constant_id = 4) const uint TK = 16;
#endif

// STEP for s = 0 .. n - 1, n <= SG, unrolled. There are no bounds checks when n == SG, so the loads
// of all steps pipeline on GPUs.
#define FOR_STEPS(n, STEP) \
    if (n == SG) { \
        [[unroll]] for (uint s = 0; s < SG; s++) \
            STEP \
    } else { \
        [[unroll]] for (uint s = 0; s < SG; s++) \
            if (s < n) \
                STEP \
    }

#ifdef FIXED_WORKGROUP
layout(local_size_x = FIXED_WORKGROUP) in;
#elif defined(MATRIX_UNITS)
layout(local_size_x_id = MATRIX_WORKGROUP) in;
#else
layout(local_size_x_id = 1) in;
#endif
#endif
