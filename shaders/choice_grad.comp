// In place: a row of logits becomes the gradient of max(0, margin - sign D) + faith K, where D is
// the difference of the logits of tokens a and b, and K the KL divergence of the distribution over
// all other tokens from the reference's; values[r] is (D, K).
// Buffers   logits and reference [n, stride], a, b and signs [n], values [n, 2]
// Grid      x = rows; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in ascending order; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { choice_grad_params p; };

float cap(float x, float softcap) {
    // `precise`: computed alike at every call, so that equal rows give a divergence of exactly 0
    precise float y = softcap != 0.0 ? softcap * tanh(clamp(x / softcap, -15.0, 15.0)) : x;
    return y;
}

float slope(float capped) {
    const float t = p.softcap != 0.0 ? capped / p.softcap : 0.0;
    return 1.0 - t * t;
}

// The largest logit and log sum exp(logit - largest) of all tokens but a and b. This is a macro
// because SwiftShader crashes where a buffer reference is a function's argument.
#define LOG_SUM(array, softcap, top, log_sum) \
    { \
        float sum = 0.0; \
        for (uint i = lane; i < p.width; i += WG) \
            if (i != a && i != b) \
                top = max(top, cap(array.at[row + i], softcap)); \
        top = workgroup_max(top); \
        for (uint i = lane; i < p.width; i += WG) { \
            precise float below = cap(array.at[row + i], softcap) - top; \
            if (i != a && i != b) \
                sum += exp(below); \
        } \
        log_sum = log(workgroup_sum(sum)); \
    }

void main() {
    const uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, row = r * p.stride,
               a = p.a.at[r], b = p.b.at[r];
    const float least = -3.402823466e38, side = p.signs.at[r],
                at_a = cap(p.logits.at[row + a], p.softcap),
                at_b = cap(p.logits.at[row + b], p.softcap), difference = at_a - at_b;
    // of the hinge, with respect to the difference
    const float pull = p.margin - side * difference > 0.0 ? -side : 0.0;
    float top = least, reference_top = least, log_sum, reference_sum, value = 0.0;
    LOG_SUM(p.logits, p.softcap, top, log_sum)
    LOG_SUM(p.reference, p.reference_softcap, reference_top, reference_sum)
    for (uint i = lane; i < p.width; i += WG) {
        float capped = cap(p.logits.at[row + i], p.softcap), d;
        precise float log_p = capped - top - log_sum;
        precise float log_reference = cap(p.reference.at[row + i], p.reference_softcap) -
                                      reference_top - reference_sum;
        if (i == a || i == b) {
            d = i == a ? pull : -pull;
        } else {
            const float reference = exp(log_reference);
            d = p.faith * (exp(log_p) - reference);
            value = fma(reference, log_reference - log_p, value);
        }
        p.logits.at[row + i] = d * slope(capped);
    }
    for (uint i = p.width + lane; i < p.stride; i += WG)
        p.logits.at[row + i] = 0.0;
    value = workgroup_sum(value);
    if (lane == 0) {
        p.values.at[2 * r] = difference;
        p.values.at[2 * r + 1] = value;
    }
}
