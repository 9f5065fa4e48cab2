// In place: g[v, t, :] = gain * g[v, t, :] - sum over steps k of steps[t, k, v] xs[t, k, :], the
// gradient of input v (a query, key or value head) of sample token t before the norm. Before a
// LayerNorm, gain * g[v, t, :] loses its mean over the columns.
//
// Define    LAYER   (optional) the norm is a LayerNorm
// Buffers   g [inputs, n_sample_tokens, d_stride], gain [width], steps [n_sample_tokens, n_steps,
//           inputs], xs [n_sample_tokens, n_steps, d_stride]
// Grid      x = sample tokens, y = ceil(inputs / 8). A workgroup takes one token and 8 inputs, so
//           that xs is read once for all of them; lanes lie along columns
// Order     gain * g, then one fma for each step, in ascending order. For the mean, lane l sums
//           columns l, l + WG, ... in one fma chain and workgroup_sum adds the lanes
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"
#ifdef LAYER
#include "reduce.glsl"
#endif

layout(push_constant, scalar) uniform Params { head_gradients_params p; };

const uint R = 8;

void main() {
    const uint t = gl_WorkGroupID.x, v0 = gl_WorkGroupID.y * R;
    uint at[R], step_at[R]; // inputs past the end repeat the last one and are not written
    [[unroll]] for (uint r = 0; r < R; r++) {
        uint v = min(v0 + r, p.n_inputs - 1);
        at[r] = (v * p.n_sample_tokens + t) * p.d_stride;
        step_at[r] = t * p.n_steps * p.n_inputs + v;
    }
#ifdef LAYER
    float mean[R];
    [[unroll]] for (uint r = 0; r < R; r++)
        mean[r] = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float gain = p.gain.at[i];
        [[unroll]] for (uint r = 0; r < R; r++)
            mean[r] = fma(p.g.at[at[r] + i], gain, mean[r]);
    }
    [[unroll]] for (uint r = 0; r < R; r++)
        mean[r] = workgroup_sum(mean[r]) / float(p.width);
#endif
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float gain = p.gain.at[i], g[R];
        [[unroll]] for (uint r = 0; r < R; r++)
            g[r] = p.g.at[at[r] + i] * gain;
#ifdef LAYER
        [[unroll]] for (uint r = 0; r < R; r++)
            g[r] -= mean[r];
#endif
        for (uint k = 0; k < p.n_steps; k++) {
            float x = p.xs.at[(t * p.n_steps + k) * p.d_stride + i];
            [[unroll]] for (uint r = 0; r < R; r++)
                g[r] = fma(-p.steps.at[step_at[r] + k * p.n_inputs], x, g[r]);
        }
        [[unroll]] for (uint r = 0; r < R; r++)
            if (v0 + r < p.n_inputs)
                p.g.at[at[r] + i] = g[r];
    }
}
