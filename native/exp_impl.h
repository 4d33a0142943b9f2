// The exponential over sixteen lanes, included after simd_<isa>.h inside its namespace.

// exp for |x| of at most 88, with a relative error below 2e-7 (2^-127, what is left of e^-88, is 0): 2^n * p(r),
// r = x - n ln 2 in two parts, p of degree 6 (Cephes expf).
MIAOTUI_INLINE F16x exp_within(F16x x) {
  const F16x n = round(mul(x, splat(1.44269504088896341f)));
  F16x r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F16x p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, splat(1.0f)));
  return mul(p, pow2(to_int(n)));
}
