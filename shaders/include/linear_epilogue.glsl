// What happens to a finished sum before it is written; the same in every matrix kernel, so that kernels can be exchanged.
float linear_epilogue(linear_params p, float acc, uint m, uint n)
{
    if ((p.flags & LINEAR_BIAS) != 0)
        acc += p.bias.at[n];
    if ((p.flags & LINEAR_SOFTCAP) != 0) // clamped: tanh beyond 15 is 1 to the last bit, and some drivers overflow there
        acc = p.softcap * tanh(clamp(acc / p.softcap, -15.0, 15.0));
    if ((p.flags & LINEAR_ADD) != 0)
        acc = p.add.at[m * p.out_stride + n] + acc;
    return acc;
}
