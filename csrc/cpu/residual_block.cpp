#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>

#include <numeric>

#include "cpu/bn_rk_sum.h"

namespace rkfast {
namespace {

struct NormOf {
  const Optional &weight, &bias, &mean, &var;

  NormOf(const std::vector<Optional>& norms, size_t i)
      : weight(norms[4 * i]), bias(norms[4 * i + 1]), mean(norms[4 * i + 2]), var(norms[4 * i + 3]) {}
};

// Whether one more of the convolutions than of the strides is a projection.
bool checked(const Tensor& x, const std::vector<Tensor>& convs, const std::vector<Optional>& norms, const std::vector<int64_t>& strides,
             const std::vector<double>& eps) {
  const size_t count = strides.size(), all = convs.size();
  TORCH_CHECK_VALUE(count > 0 && (all == count || all == count + 1) && norms.size() == 4 * all && eps.size() == all,
                    "convs, norms, strides, eps: expected four vectors and a number for each convolution");
  for (int64_t stride : strides) TORCH_CHECK_VALUE(stride > 0, "strides: expected numbers from 1 on, got ", stride);
  TORCH_CHECK_VALUE(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  for (const Tensor& w : convs)
    TORCH_CHECK_VALUE(w.dim() == 4 && w.size(2) == w.size(3) && w.size(2) % 2 == 1, "convs: expected [K, C, n, n], n odd, got ", w.sizes());
  TORCH_CHECK_VALUE(all == count || convs[count].size(2) == 1, "convs: expected a projection of 1x1, got ", convs[count].sizes());
  for (size_t i = 0; i < all; ++i)
    TORCH_CHECK_VALUE(norms[4 * i + 2].has_value() == norms[4 * i + 3].has_value(), "norms: give mean and var, or neither");
  return all > count;
}

// Of all strides, or one that no image is as large as.
int64_t product(const std::vector<int64_t>& strides) {
  static constexpr int64_t kMost = int64_t{1} << 31;
  return std::accumulate(strides.begin(), strides.end(), int64_t{1},
                         [](int64_t all, int64_t stride) { return std::min(kMost, all * std::min(kMost, stride)); });
}

// The pixels that a 1x1 convolution of this stride reads.
Tensor pixels(const Tensor& x, int64_t stride) { return stride == 1 ? x : x.slice(2, 0, {}, stride).slice(3, 0, {}, stride); }

// conv(act) and, where asked for, its moments.
std::vector<Tensor> strided(const Tensor& act, const Tensor& weight, int64_t stride, bool channels_last, bool moments) {
  if (stride == 1 || weight.size(2) == 1)
    return conv(laid(pixels(act, stride), channels_last), weight, {}, {}, channels_last, false, moments);
  const int64_t made = act.numel() / (act.size(1) * stride * stride) * weight.size(0);  // but for what is cut off
  const bool in_rows = channels_last && !follows(weight, act.numel() + made);
  const Tensor out = laid(at::conv2d(laid(act, in_rows), weight, {}, stride, weight.size(2) / 2), channels_last);
  if (!moments) return {out};
  const auto [mean, var] = channel_moments(out, channels_last);
  return {out, mean, var};
}

// The gradients of act and of the weight, each where needed, else undefined.
std::pair<Tensor, Tensor> strided_backward(const Tensor& grad, const Tensor& act, const Tensor& weight, int64_t stride,
                                           bool channels_last, bool need_act, bool need_weight) {
  const int64_t pad = weight.size(2) / 2;
  const bool in_rows = channels_last && !follows(weight, act.numel() + grad.numel());
  auto [dact, dweight, dbias] =
      at::convolution_backward(laid(grad, in_rows), laid(act, in_rows), weight, std::nullopt, {stride, stride}, {pad, pad}, {1, 1}, false,
                               {0, 0}, 1, {need_act, need_weight, false});
  return {need_act ? laid(dact, channels_last) : Tensor(), need_weight ? lying_like(dweight, weight) : Tensor()};
}

}  // namespace

std::vector<Tensor> residual_block(const Tensor& x, const Optional& shortcut, const std::vector<Tensor>& convs,
                                   const std::vector<Optional>& norms, const Optional& step, const std::vector<int64_t>& strides,
                                   const std::vector<double>& eps, bool channels_last, bool keep) {
  WithinOp within;
  const bool projects = checked(x, convs, norms, strides, eps);
  TORCH_CHECK_VALUE(!(projects && shortcut), "shortcut: a projection takes its place");
  const size_t last = strides.size() - 1;
  std::vector<Tensor> outs;
  std::vector<std::vector<Tensor>> moments(convs.size());
  // A result, and its moments where the norm behind it takes the batch's.
  auto take = [&](size_t i, std::vector<Tensor> made) {
    outs.push_back(made[0]);
    moments[i].assign(made.begin() + 1, made.end());
  };
  auto mean = [&](size_t i) { return moments[i].empty() ? *NormOf(norms, i).mean : moments[i][0]; };
  auto var = [&](size_t i) { return moments[i].empty() ? *NormOf(norms, i).var : moments[i][1]; };
  auto asks = [&](size_t i) { return !NormOf(norms, i).mean.has_value(); };
  take(0, strided(x, convs[0], strides[0], channels_last, asks(0)));
  for (size_t i = 1; i <= last; ++i) {
    const NormOf norm(norms, i - 1);
    if (strides[i] == 1) {
      take(i, bn_relu_conv(outs.back(), convs[i], norm.weight, norm.bias, mean(i - 1), var(i - 1), channels_last, eps[i - 1], asks(i)));
    } else {
      const Tensor act = bn_rk_sum(outs.back(), norm.weight, norm.bias, mean(i - 1), var(i - 1), {}, {}, {}, channels_last, true,
                                   eps[i - 1], false, false, {})[0];
      take(i, strided(act, convs[i], strides[i], channels_last, asks(i)));
    }
  }
  const NormOf norm(norms, last);
  std::vector<Tensor> result;
  if (projects) {
    take(last + 1, strided(x, convs[last + 1], product(strides), channels_last, asks(last + 1)));
    const NormOf other(norms, last + 1);
    const Tensor other_mean = mean(last + 1), other_var = var(last + 1);
    result = bn_rk_sum(outs[last], norm.weight, norm.bias, mean(last), var(last),
                       {outs[last + 1], other.weight, other.bias, other_mean, other_var, eps[last + 1]}, step, channels_last,
                       eps[last], keep);
  } else {
    result = bn_rk_sum(outs[last], norm.weight, norm.bias, mean(last), var(last), {shortcut ? *shortcut : x}, {1.0}, step,
                       channels_last, true, eps[last], false, keep, {});
  }
  if (keep) result.insert(result.end(), outs.begin(), outs.end());
  for (const auto& some : moments) result.insert(result.end(), some.begin(), some.end());
  return result;
}

std::vector<Tensor> residual_block_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& outs,
                                            const Tensor& mask, const std::vector<Tensor>& convs,
                                            const std::vector<Optional>& norms, const Optional& step,
                                            const std::vector<int64_t>& strides, const std::vector<double>& eps,
                                            const std::vector<bool>& batch, bool channels_last, bool own, bool need_x,
                                            bool need_shortcut, bool need_convs, bool need_step) {
  WithinOp within;
  const bool projects = checked(x, convs, norms, strides, eps);
  TORCH_CHECK_VALUE(!(projects && (own || need_shortcut)), "own, need_shortcut: a projection takes the shortcut's place");
  TORCH_CHECK_VALUE(outs.size() == convs.size() && batch.size() == convs.size(), "outs, batch: expected one for each convolution");
  const int last = static_cast<int>(strides.size()) - 1;
  const bool shared = need_shortcut || (own && need_x);
  const NormOf norm(norms, last);
  // Where the last convolution reads its gradient row by row, this is made of the block's there.
  const bool by_rows = last > 0 && convs[last].size(2) == 1 && strides[last] == 1 && channels_last;
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
    const Tensor &mean = before.mean.value(), &var = before.var.value();
    std::vector<Tensor> made;  // d, [dconv], dweight and dbias of the norm before
    if (i == last && by_rows) {
      made = bn_relu_conv_backward([&](int64_t first, int64_t n, float* out) { sum.rows(first, n, out); }, outs[i - 1], convs[i],
                                   before.weight, before.bias, mean, var, batch[i - 1], eps[i - 1], need_convs);
    } else if (strides[i] == 1) {
      made = bn_relu_conv_backward(d, outs[i - 1], convs[i], before.weight, before.bias, mean, var, channels_last, batch[i - 1],
                                   eps[i - 1], true, need_convs, true);
    } else {
      const Tensor act = bn_rk_sum(outs[i - 1], before.weight, before.bias, mean, var, {}, {}, {}, channels_last, true, eps[i - 1],
                                   false, false, {})[0];
      const auto [dact, dconv] = strided_backward(d, act, convs[i], strides[i], channels_last, true, need_convs);
      made = bn_rk_sum_backward(dact, outs[i - 1], before.weight, before.bias, mean, var, {}, {}, {}, channels_last, true,
                                batch[i - 1], eps[i - 1], true, true, false);
      if (need_convs) made.insert(made.begin() + 1, dconv);
    }
    d = made[0];
    if (need_convs) parameters[i].insert(parameters[i].begin(), made[1]);
    parameters[i - 1] = {made[made.size() - 2], made[made.size() - 1]};
  }
  const Optional dshortcut = shared ? Optional(joined.back()) : std::nullopt;
  // What else the gradient of x takes in: the shortcut's, or of every so manieth pixel the projection's.
  Optional other = own ? dshortcut : std::nullopt;
  const int64_t apart = product(strides);
  if (projects) {
    const Tensor &p = outs[last + 1], &weight = convs[last + 1], read = laid(pixels(x, apart), channels_last);
    const NormOf of(norms, last + 1);
    BnRkSumBackward through(grad, p, of.weight, of.bias, of.mean.value(), of.var.value(), {}, mask, {}, channels_last, true,
                            batch[last + 1], eps[last + 1], true, true, false, channels_last);
    std::vector<Tensor> found = channels_last ? through.results() : through.finish();
    std::vector<Tensor> made;
    if (need_x || need_convs)
      made = channels_last ? conv_backward([&](int64_t first, int64_t n, float* out) { through.rows(first, n, out); }, read, weight,
                                           need_x, need_convs)
                           : conv_backward(found[0], read, weight, {}, channels_last, need_x, need_convs);
    if (need_x) other = made[0];
    if (need_convs) parameters[last + 1] = {made.back()};
    parameters[last + 1].insert(parameters[last + 1].end(), found.end() - 2, found.end());
  }
  std::vector<Tensor> result;
  if (need_x || need_convs) {
    Tensor dx, dconv;
    const bool sparse = convs[0].size(2) == 1 && strides[0] > 1;  // reads some of the pixels
    if (strides[0] == 1 || sparse) {
      const bool adds = other && apart == strides[0];
      std::vector<Tensor> made = conv_backward(d, laid(pixels(x, strides[0]), channels_last), convs[0], adds ? other : std::nullopt,
                                               channels_last, need_x, need_convs);
      dx = made[0];
      dconv = made.back();
      if (adds) other.reset();
      if (sparse && need_x) {
        const Tensor some = dx;
        dx = empty_rows(x, channels_last).zero_();
        pixels(dx, strides[0]).copy_(some);
      }
    } else {
      std::tie(dx, dconv) = strided_backward(d, x, convs[0], strides[0], channels_last, need_x, need_convs);
    }
    if (need_x && other) pixels(dx, apart).add_(*other);
    if (need_convs) parameters[0].insert(parameters[0].begin(), dconv);
    if (need_x) result.push_back(dx);
  }
  if (need_shortcut) result.push_back(*dshortcut);
  if (need_step) result.push_back(joined[2]);
  for (const auto& some : parameters) result.insert(result.end(), some.begin(), some.end());
  return result;
}

}  // namespace rkfast
