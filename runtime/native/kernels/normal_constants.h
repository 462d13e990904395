// Constants of the standard normal quantile: Wichura, Algorithm AS 241 (PPND16), Applied Statistics 37 (1988), and of
// the logarithm that it needs. Nothing but constants, so that code for any instruction set may share them.
#pragma once

namespace edge_bcs::normal_constants {
// clang-format off: the tables as they are printed

// log m = 2 artanh s = 2s · (1 + s²/3 + s⁴/5 + …), s = (m − 1)/(m + 1).
inline constexpr double series[12] = {
    1.0, 1.0 / 3.0, 1.0 / 5.0, 1.0 / 7.0,
    1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0,
    1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0, 1.0 / 23.0};
inline constexpr double ln2_high = 6.93147180369123816490e-01;
inline constexpr double ln2_low = 1.90821492927058770002e-10;
inline constexpr double sqrt_half = 0.70710678118654752440;

// Numerators and denominators by r = 0.180625 − q² where |q| ≤ 0.425, q = u − ½ …
inline constexpr double centre = 0.425, centre_square = 0.180625;
inline constexpr double centre_above[8] = {
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3};
inline constexpr double centre_below[8] = {
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3};

// … else by the depth d = √(−log min(u, 1 − u)): by d − 1.6 up to 5 …
inline constexpr double middle_depth = 5.0, middle_shift = 1.6;
inline constexpr double middle_above[8] = {
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4};
inline constexpr double middle_below[8] = {
    1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9};

// … by d − 5 beyond.
inline constexpr double tail_above[8] = {
    6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
    2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7};
inline constexpr double tail_below[8] = {
    1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15};

// clang-format on
}  // namespace edge_bcs::normal_constants
