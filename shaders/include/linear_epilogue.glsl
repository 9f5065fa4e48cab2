// What follows a finished sum before it is written: factor, bias, clamp, soft cap, residual. Every
// matrix kernel uses it, so that kernels are interchangeable. A macro reads the numbers because
// SwiftShader crashes where a struct with buffer references is a function's argument.
#define linear_epilogue(p, acc, m, n) \
    linear_finish(acc, p.flags, p.scale, (p.flags & LINEAR_BIAS) != 0 ? p.bias.at[n] : 0.0, \
                  p.clip, p.softcap, \
                  (p.flags & LINEAR_ADD) != 0 ? p.add.at[(m) * p.out_stride + (n)] : 0.0)

float linear_finish(float acc, uint flags, float scale, float bias, float clip, float softcap,
                    float add) {
    // `precise` forbids contraction with the bias or the residual: all kernels must agree
    precise float scaled = acc * scale;
    if ((flags & LINEAR_SCALE) != 0)
        acc = scaled;
    if ((flags & LINEAR_BIAS) != 0)
        acc += bias;
    if ((flags & LINEAR_CLIP) != 0)
        acc = clamp(acc, -clip, clip);
    // beyond 15 tanh rounds to 1, and some drivers overflow there
    if ((flags & LINEAR_SOFTCAP) != 0)
        acc = softcap * tanh(clamp(acc / softcap, -15.0, 15.0));
    if ((flags & LINEAR_ADD) != 0)
        acc = add + acc;
    return acc;
}
