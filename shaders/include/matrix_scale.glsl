// The power of two that brings a largest magnitude, given as the bits of a float, to between 2^14
// and 2^15, where float16 has its whole precision for values down to 2^-29 of it; and its inverse.
// Magnitudes below 2^-110 keep the power of 2^-110, so that both are normal numbers.
uint matrix_exponent(uint largest) { return clamp(largest >> 23, 17u, 254u); }
float matrix_factor(uint exponent) { return uintBitsToFloat((268u - exponent) << 23); }
float matrix_inverse(uint exponent) { return uintBitsToFloat((exponent - 14u) << 23); }
