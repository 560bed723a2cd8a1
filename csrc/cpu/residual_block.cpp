#include "cpu/bn_rk_sum.h"

namespace rkfast {
namespace {

struct NormOf {
  const Optional &weight, &bias, &mean, &var;

  NormOf(const std::vector<Optional>& norms, size_t i)
      : weight(norms[4 * i]), bias(norms[4 * i + 1]), mean(norms[4 * i + 2]), var(norms[4 * i + 3]) {}
};

void check(const std::vector<Tensor>& convs, const std::vector<Optional>& norms, const std::vector<double>& eps) {
  TORCH_CHECK_VALUE(!convs.empty() && norms.size() == 4 * convs.size() && eps.size() == convs.size(),
                    "convs, norms, eps: expected four vectors and a number for each convolution");
}

}  // namespace

std::vector<Tensor> residual_block(const Tensor& x, const Optional& shortcut, const std::vector<Tensor>& convs,
                                   const std::vector<Optional>& norms, const Optional& step, const std::vector<double>& eps,
                                   bool channels_last, bool keep) {
  WithinOp within;
  check(convs, norms, eps);
  const size_t last = convs.size() - 1;
  std::vector<Tensor> outs, moments;
  // A result, and its moments where the norm behind it takes the batch's.
  auto take = [&](std::vector<Tensor> made) {
    outs.push_back(made[0]);
    moments.insert(moments.end(), made.begin() + 1, made.end());
  };
  auto statistics = [&](size_t i, bool var) {
    const NormOf norm(norms, i);
    return norm.mean ? *(var ? norm.var : norm.mean) : moments[moments.size() - 2 + var];
  };
  auto asks = [&](size_t i) { return !NormOf(norms, i).mean.has_value(); };
  take(conv(x, convs[0], {}, {}, channels_last, false, asks(0)));
  for (size_t i = 1; i <= last; ++i) {
    const NormOf norm(norms, i - 1);
    take(bn_relu_conv(outs.back(), convs[i], norm.weight, norm.bias, statistics(i - 1, false), statistics(i - 1, true),
                      channels_last, eps[i - 1], asks(i)));
  }
  const NormOf norm(norms, last);
  std::vector<Tensor> result = bn_rk_sum(outs.back(), norm.weight, norm.bias, statistics(last, false), statistics(last, true),
                                         {shortcut ? *shortcut : x}, {1.0}, step, channels_last, true, eps[last], false, keep, {});
  if (keep) result.insert(result.end(), outs.begin(), outs.end());
  result.insert(result.end(), moments.begin(), moments.end());
  return result;
}

std::vector<Tensor> residual_block_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& outs,
                                            const Tensor& mask, const std::vector<Tensor>& convs,
                                            const std::vector<Optional>& norms, const Optional& step,
                                            const std::vector<double>& eps, const std::vector<bool>& batch,
                                            bool channels_last, bool own, bool need_x, bool need_shortcut, bool need_convs,
                                            bool need_step) {
  WithinOp within;
  check(convs, norms, eps);
  TORCH_CHECK_VALUE(outs.size() == convs.size() && batch.size() == convs.size(), "outs, batch: expected one for each convolution");
  const int last = static_cast<int>(convs.size()) - 1;
  const bool shared = need_shortcut || (own && need_x);
  const NormOf norm(norms, last);
  // Where the last convolution reads its gradient row by row, this is made of the block's there.
  const bool by_rows = last > 0 && convs[last].size(2) == 1 && channels_last;
  BnRkSumBackward sum(grad, outs[last], norm.weight, norm.bias, norm.mean.value(), norm.var.value(), step, mask,
                      shared ? std::vector<double>{1.0} : std::vector<double>{}, channels_last, true, batch[last], eps[last], true,
                      true, need_step, by_rows);
  std::vector<Tensor> joined = by_rows ? sum.results() : sum.finish();
  Tensor d;
  if (!by_rows) {
    d = joined[0];
    joined.erase(joined.begin());
  }
  std::vector<std::vector<Tensor>> parameters(convs.size());  // [dconv], dweight, dbias
  parameters[last] = {joined[0], joined[1]};
  for (int i = last; i > 0; --i) {
    const NormOf before(norms, i - 1);
    std::vector<Tensor> made;
    if (i == last && by_rows) {
      made = bn_relu_conv_backward([&](int64_t first, int64_t n, float* out) { sum.rows(first, n, out); }, outs[i - 1], convs[i],
                                   before.weight, before.bias, before.mean.value(), before.var.value(), batch[i - 1], eps[i - 1],
                                   need_convs);
    } else {
      made = bn_relu_conv_backward(d, outs[i - 1], convs[i], before.weight, before.bias, before.mean.value(), before.var.value(),
                                   channels_last, batch[i - 1], eps[i - 1], true, need_convs, true);
    }
    d = made[0];
    if (need_convs) parameters[i].insert(parameters[i].begin(), made[1]);
    parameters[i - 1] = {made[made.size() - 2], made[made.size() - 1]};
  }
  const Optional dshortcut = shared ? Optional(joined.back()) : std::nullopt;
  std::vector<Tensor> result;
  if (need_x || need_convs) {
    std::vector<Tensor> made = conv_backward(d, x, convs[0], own ? dshortcut : std::nullopt, channels_last, need_x, need_convs);
    if (need_convs) parameters[0].insert(parameters[0].begin(), made.back());
    if (need_x) result.push_back(made[0]);
  }
  if (need_shortcut) result.push_back(*dshortcut);
  if (need_step) result.push_back(joined[2]);
  for (const auto& some : parameters) result.insert(result.end(), some.begin(), some.end());
  return result;
}

}  // namespace rkfast
