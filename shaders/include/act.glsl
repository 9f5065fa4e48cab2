// The activation `act` (ACT_*) at x. For a very negative x, SiLU's exp(-x) is inf and the quotient
// is 0, as it should be.
float activate(uint act, float x) {
    if (act == ACT_SILU)
        return x / (1.0 + exp(-x));
    if (act == ACT_GELU_TANH) {
        // Some drivers compute tanh from exponentials, which overflow for large arguments; beyond
        // 15 it rounds to 1 anyway.
        float inner = clamp(0.7978845608028654 * (x + 0.044715 * x * x * x), -15.0, 15.0);
        return 0.5 * x * (1.0 + tanh(inner));
    }
    if (act == ACT_RELU || act == ACT_RELU2) {
        float rectified = x < 0.0 ? 0.0 : x; // NaN stays NaN, which max() does not promise
        return act == ACT_RELU ? rectified : rectified * rectified;
    }
    // erf by formula 7.1.26 of Abramowitz and Stegun, with |error| < 1.5e-7
    float y = abs(x) * 0.7071067811865476;
    float t = 1.0 / (1.0 + 0.3275911 * y);
    float erf = 1.0 - ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t +
                       0.254829592) *
                          t * exp(-y * y);
    return 0.5 * x * (1.0 + (x < 0 ? -erf : erf));
}

// The derivative of the activation at x.
float activate_slope(uint act, float x) {
    if (act == ACT_SILU) {
        float s = 1.0 / (1.0 + exp(-x));
        return s * (1.0 + x * (1.0 - s));
    }
    if (act == ACT_GELU_TANH) {
        float inner = 0.7978845608028654 * (x + 0.044715 * x * x * x),
              t = tanh(clamp(inner, -15.0, 15.0));
        float e = exp(-2.0 * abs(inner)); // 1 - t^2 = 4 e / (1 + e)^2, which does not cancel
        float rise = abs(inner) < 15.0 ? 4.0 * e / ((1.0 + e) * (1.0 + e)) * 0.7978845608028654 *
                                             (1.0 + 3.0 * 0.044715 * x * x)
                                       : 0.0;
        return 0.5 * (1.0 + t) + 0.5 * x * rise;
    }
    if (act == ACT_RELU) // 0 at 0, as PyTorch has it
        return x > 0.0 ? 1.0 : 0.0;
    if (act == ACT_RELU2)
        return 2.0 * max(x, 0.0);
    // the normal distribution function at x
    float half_ = abs(x) < 1e-30 ? 0.5 : activate(act, x) / x;
    return half_ + x * 0.3989422804014327 * exp(-0.5 * x * x);
}
