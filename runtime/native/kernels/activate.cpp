// See activate.h. The choice of the function stands outside the loop over vectors.
#include "kernels/activate.h"

#include "kernels/table.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

template <int VL>
void activate(const Activation& activation, Vector<VL>* values, int count) {
  const auto each = [&](const auto& function) {
    for (int i = 0; i < count; ++i) values[i] = function(values[i]);
  };
  using V = Vector<VL>;
  switch (activation.function) {
    case Function::none:
      return;
    case Function::relu:
      return each([](V x) { return relu<VL>(x); });
    case Function::relu6:
      return each([](V x) { return relu6_of<VL>(x); });
    case Function::leaky_relu:
      return each([slope = activation.slope](V x) { return x > V{} ? x : x * slope; });
    case Function::hardsigmoid:
      return each([](V x) { return hardsigmoid_of<VL>(x); });
    case Function::sigmoid:
      return each([](V x) { return Sigmoids<VL>(x).of; });
    case Function::tanh:
      return each([](V x) { return tanh_of<VL>(x); });
    case Function::hardswish:
      return each([](V x) { return hardswish_of<VL>(x); });
    case Function::silu:
      return each([](V x) { return times<VL>(x, Sigmoids<VL>(x).of); });
    case Function::gelu:
      return each([](V x) { return times<VL>(x, Normal<VL>(x).distribution); });
    case Function::gelu_tanh:
      return each([](V x) { return times<VL>(x, Sigmoids<VL>(TanhForm<VL>(x).inner).of); });
  }
}

template <int VL>
void pass_back(const Activation& activation, const Vector<VL>* kept, Vector<VL>* gradients, int count) {
  const auto each = [&](const auto& function) {
    for (int i = 0; i < count; ++i) gradients[i] = function(kept[i], gradients[i]);
  };
  using V = Vector<VL>;
  switch (activation.function) {
    case Function::none:
      return;
    case Function::relu:
      return each([](V y, V g) { return where_positive<VL>(y, g); });
    case Function::relu6:
      return each([](V y, V g) { return where_positive<VL>(openness<VL>(Function::relu6, y), g); });
    case Function::leaky_relu:
      return each([slope = activation.slope](V y, V g) { return y > V{} ? g : g * slope; });
    case Function::hardsigmoid:
      return each([](V y, V g) {
        const V below = y < broadcast<VL>(1) ? y : V{};
        return where_positive<VL>(below, g * (1.0f / 6));
      });
    case Function::sigmoid:
      return each([](V y, V g) { return g * (y * (1.0f - y)); });
    case Function::tanh:
      return each([](V y, V g) { return g * ((1.0f - y) * (1.0f + y)); });
    case Function::hardswish:
      return each([](V x, V g) {
        const V three = broadcast<VL>(3), between = g * (x * (1.0f / 3) + 0.5f);
        return x <= -three ? V{} : (x >= three ? g : between);
      });
    case Function::silu:
      return each([](V x, V g) {
        const Sigmoids<VL> s(x);
        return g * times<VL>(times<VL>(x, s.of_negative) + 1.0f, s.of);
      });
    case Function::gelu:
      return each([](V x, V g) {
        const Normal<VL> normal(x);
        return g * (normal.distribution + times<VL>(x, normal.exponential) * 0.398942280f);
      });
    case Function::gelu_tanh:
      return each([](V x, V g) {
        const TanhForm<VL> form(x);
        const Sigmoids<VL> s(form.inner);
        return g * times<VL>(times<VL>(x * form.slope, s.of_negative) + 1.0f, s.of);
      });
  }
}

#define EDGE_BCS_INSTANTIATE(VL)                                   \
  template void activate<VL>(const Activation&, Vector<VL>*, int); \
  template void pass_back<VL>(const Activation&, const Vector<VL>*, Vector<VL>*, int);
EDGE_BCS_INSTANTIATE(1)
#if !EDGE_BCS_SCALAR
EDGE_BCS_INSTANTIATE(4)
#if defined(__AVX2__)
EDGE_BCS_INSTANTIATE(8)
#endif
#if defined(__AVX512F__)
EDGE_BCS_INSTANTIATE(16)
#endif
#endif

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
