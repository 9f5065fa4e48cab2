#include "reduce.glsl"

// In place: softmax of the scores that begin at float `row`, over the keys [start, pos] that a
// query at position `pos` sees; start is pos + 1 - window, or 0 without a window. The keys before
// start become 0, and so do the up to 7 keys after pos that a tile of 8 queries computes. All lanes
// of the workgroup call it. Order: lane l sums the keys start + l, start + l + WG, ... and
// workgroup_sum adds the lanes.
void softmax_row(FloatsInOut scores, uint row, uint pos, uint window, uint key_stride) {
    uint start = window != 0 && pos + 1 > window ? pos + 1 - window : 0;
    uint lane = gl_LocalInvocationID.x;
    float top = -3.402823466e38;
    for (uint j = start + lane; j <= pos; j += WG)
        top = max(top, scores.at[row + j]);
    top = workgroup_max(top);
    float sum = 0.0;
    for (uint j = start + lane; j <= pos; j += WG) {
        // `precise`, so that every kernel that includes this gives bit-identical results
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
    for (uint j = pos + 1 + lane; j < min(pos + OP_TILE, key_stride); j += WG)
        scores.at[row + j] = 0.0;
}
