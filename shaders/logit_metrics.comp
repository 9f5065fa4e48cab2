// values[r] = KL(reference || x), KL(other || x), log p(target) and the most probable token of row
// r of the logits x. Its reference is row (first + r) % n.
// Buffers   logits [rows, stride], reference and other [n, stride], targets [n], values [rows, 4]
// Grid      x = rows; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in ascending order; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { logit_metrics_params p; };

float cap(float x) {
    return p.softcap != 0.0 ? p.softcap * tanh(clamp(x / p.softcap, -15.0, 15.0)) : x;
}

// The row's largest logit and log sum exp(logit - largest). They stay apart, so that large logits
// lose no precision. This is a macro because SwiftShader crashes where a buffer reference is a
// function's argument.
#define LOG_SUM(array, row, top, log_sum) \
    { \
        float sum = 0.0; \
        for (uint i = lane; i < p.width; i += WG) \
            top = max(top, cap(array.at[row + i])); \
        top = workgroup_max(top); \
        for (uint i = lane; i < p.width; i += WG) \
            sum += exp(cap(array.at[row + i]) - top); \
        log_sum = log(workgroup_sum(sum)); \
    }

void main() {
    const uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, row = r * p.stride,
               j = (p.first + r) % p.n, other_row = j * p.stride;
    const float least = -3.402823466e38;
    float top = least, reference_top = least, other_top = least, log_sum, reference_sum, other_sum;
    LOG_SUM(p.logits, row, top, log_sum)
    LOG_SUM(p.reference, other_row, reference_top, reference_sum)
    LOG_SUM(p.other, other_row, other_top, other_sum)
    const uint target = p.targets.at[j];
    // greedy is the largest -index, so that of equal logits the first one counts
    float from_reference = 0.0, from_other = 0.0, target_log_p = 0.0, greedy = -float(p.width);
    for (uint i = lane; i < p.width; i += WG) {
        float capped = cap(p.logits.at[row + i]), log_p = capped - top - log_sum;
        float log_reference = cap(p.reference.at[other_row + i]) - reference_top - reference_sum;
        float log_other = cap(p.other.at[other_row + i]) - other_top - other_sum;
        from_reference = fma(exp(log_reference), log_reference - log_p, from_reference);
        from_other = fma(exp(log_other), log_other - log_p, from_other);
        target_log_p += i == target ? log_p : 0.0;
        if (capped == top)
            greedy = max(greedy, -float(i));
    }
    from_reference = workgroup_sum(from_reference);
    from_other = workgroup_sum(from_other);
    target_log_p = workgroup_sum(target_log_p);
    greedy = workgroup_max(greedy);
    if (lane == 0) {
        p.values.at[4 * r] = from_reference;
        p.values.at[4 * r + 1] = from_other;
        p.values.at[4 * r + 2] = target_log_p;
        p.values.at[4 * r + 3] = -greedy;
    }
}
