// In place: g[v, t, :] = gain * g[v, t, :] - sum over steps k of steps[t, k, v] xs[t, k, :], the
// gradient of input v (a query, key or value head) of sample token t before the norm.
// Buffers   g [inputs, n_sample_tokens, d_stride], gain [width], steps [n_sample_tokens, n_steps,
//           inputs], xs [n_sample_tokens, n_steps, d_stride]
// Grid      x = sample tokens, y = ceil(inputs / 8). A workgroup takes one token and 8 inputs, so
//           that xs is read once for all of them; lanes lie along columns
// Order     gain * g, then one fma for each step, in ascending order
#version 450
#extension GL_GOOGLE_include_directive : require
#include "types.glsl"

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
    for (uint i = gl_LocalInvocationID.x; i < p.width; i += WG) {
        float gain = p.gain.at[i], g[R];
        [[unroll]] for (uint r = 0; r < R; r++)
            g[r] = p.g.at[at[r] + i] * gain;
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
