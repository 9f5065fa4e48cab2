#include "reduce.glsl"

void softmax_row(FloatsInOut scores, uint row, uint pos, uint window, uint key_stride) {
    uint start = window != 0 && pos + 1 > window ? pos + 1 - window : 0;
    uint lane = gl_LocalInvocationID.x;
    float top = -3.402823466e38;
    for (uint j = start + lane; j <= pos; j += WG)
        top = max(top, scores.at[row + j]);
    top = workgroup_max(top);
    float sum = 0.0;
    for (uint j = start + lane; j <= pos; j += WG) {
        // the same bits in every kernel that this is part of
        precise float below = scores.at[row + j] - top;
        float e = exp(below);
        scores.at[row + j] = e;
        sum += e;
    }
    float inverse = 1.0 / workgroup_sum(sum);
    for (uint j = start + lane; j <= pos; j += WG)
        scores.at[row + j] *= inverse;
    for (uint j = lane; j < start; j += WG)
        scores.at[row + j] = 0.0;
    for (uint j = pos + 1 + lane; j < min(pos + 8, key_stride); j += WG)
        scores.at[row + j] = 0.0;
}
