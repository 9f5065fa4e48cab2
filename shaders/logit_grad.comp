// In place: a row of logits becomes the gradient of a scalar of its distribution (LOGIT_GRAD_*)
// with respect to them, times the row's weight; values[r] is the scalar.
// Buffers   logits, reference and other [n, stride], targets, weights and values [n]
// Grid      x = rows; a workgroup takes one, its lanes the columns
// Order     lane l sums columns l, l + WG, ... in ascending order; workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#include "reduce.glsl"

layout(push_constant, scalar) uniform Params { logit_grad_params p; };

float cap(float x, float softcap) {
    // `precise`: computed alike at every call, so that equal rows give a difference of exactly 0
    precise float y = softcap != 0.0 ? softcap * tanh(clamp(x / softcap, -15.0, 15.0)) : x;
    return y;
}

// The row's largest logit and log sum exp(logit - largest). They stay apart, so that large logits
// lose no precision. This is a macro because SwiftShader crashes where a buffer reference is a
// function's argument.
#define LOG_SUM(array, softcap, top, log_sum) \
    { \
        float sum = 0.0; \
        for (uint i = lane; i < p.width; i += WG) \
            top = max(top, cap(array.at[row + i], softcap)); \
        top = workgroup_max(top); \
        for (uint i = lane; i < p.width; i += WG) { \
            precise float below = cap(array.at[row + i], softcap) - top; \
            sum += exp(below); \
        } \
        log_sum = log(workgroup_sum(sum)); \
    }

void main() {
    const uint r = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, row = r * p.stride;
    const float weight = p.weights.at[r], least = -3.402823466e38;
    float top = least, reference_top = least, other_top = least, log_sum, reference_sum = 0.0,
          other_sum = 0.0, value = 0.0;
    LOG_SUM(p.logits, p.softcap, top, log_sum)
    if (p.kind != LOGIT_GRAD_LOG_PROB)
        LOG_SUM(p.reference, p.reference_softcap, reference_top, reference_sum)
    if (p.kind == LOGIT_GRAD_DIRECTIONAL_KL)
        LOG_SUM(p.other, p.reference_softcap, other_top, other_sum)
    const uint target = p.kind == LOGIT_GRAD_LOG_PROB ? p.targets.at[r] : 0;
    for (uint i = lane; i < p.width; i += WG) {
        float raw = p.logits.at[row + i], capped = cap(raw, p.softcap), d;
        precise float log_p = capped - top - log_sum;
        if (p.kind == LOGIT_GRAD_LOG_PROB) {
            d = (i == target ? 1.0 : 0.0) - exp(log_p);
            value += i == target ? log_p : 0.0;
        } else {
            precise float log_reference = cap(p.reference.at[row + i], p.reference_softcap) -
                                          reference_top - reference_sum;
            float reference = exp(log_reference);
            if (p.kind == LOGIT_GRAD_KL) {
                d = exp(log_p) - reference;
                value = fma(reference, log_reference - log_p, value);
            } else {
                precise float log_other = cap(p.other.at[row + i], p.reference_softcap) -
                                          other_top - other_sum;
                float other = exp(log_other);
                d = reference - other;
                value += other * (log_other - log_p) - reference * (log_reference - log_p);
            }
        }
        if (p.softcap != 0.0) {
            float t = capped / p.softcap;
            d *= 1.0 - t * t;
        }
        p.logits.at[row + i] = weight * d;
    }
    for (uint i = p.width + lane; i < p.stride; i += WG)
        p.logits.at[row + i] = 0.0;
    value = workgroup_sum(value);
    if (lane == 0)
        p.values.at[r] = value;
}
