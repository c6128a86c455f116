#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <lora/detail/graph_node.h>
#include <lora/detail/graph_section.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/parallel.h>
#include <lora/functional/cross_entropy_kernel.h>
#include <lora/methods/method.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <torch/arg.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/enum.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

LORA_NAMESPACE_BEGIN

/// Options of linear_cross_entropy.
///
///     lora::LinearCrossEntropyOptions().bias(head->bias).reduction(torch::kSum).label_smoothing(0.1)
struct LinearCrossEntropyOptions {
  /// torch::kMean over the rows that have a label, or torch::kSum.
  using Reduction = std::variant<torch::enumtype::kMean, torch::enumtype::kSum>;

  /// Of the head [vocab], frozen, trainable or adapted; undefined: none.
  TORCH_ARG(at::Tensor, bias);
  /// How the rows' losses become one number.
  TORCH_ARG(Reduction, reduction) = torch::kMean;
  /// The label of rows that have none.
  TORCH_ARG(int64_t, ignore_index) = -100;
  /// ε in [0, 1]: a row is to predict its label with 1 − ε and every class alike with ε (Szegedy et al. 2015, arXiv
  /// 1512.00567, section 7).
  TORCH_ARG(double, label_smoothing) = 0;
  /// How many rows have their logits in memory at a time; 0: as many as fit into 24 MiB.
  TORCH_ARG(int64_t, chunk_rows) = 0;
};

namespace detail {

/// The cross entropy of each row of `logits` [rows, classes], [rows] in float64; with `gradient` it overwrites the
/// logits by the gradient of their sum.
template <class T>
at::Tensor cross_entropy_of_rows(const at::Tensor& logits, const at::Tensor& labels, double smoothing, bool gradient) {
  constexpr int64_t kElementsOfTask = int64_t{1} << 15;
  const auto rows = logits.size(0), classes = logits.size(1);
  const auto losses = at::empty({rows}, labels.options().dtype(at::kDouble));
  auto* const data = logits.template mutable_data_ptr<T>();
  const auto* const label = labels.const_data_ptr<int64_t>();
  auto* const loss = losses.template mutable_data_ptr<double>();
  const auto rows_of_task = std::max<int64_t>(1, kElementsOfTask / classes);
  parallel_tasks((rows + rows_of_task - 1) / rows_of_task, [&](int64_t task) {
    const auto end = std::min(rows, (task + 1) * rows_of_task);
    for (auto row = task * rows_of_task; row < end; ++row) {
      loss[row] = run_register_kernel<CrossEntropyKernel>(
          instruction_set(), CrossEntropyRow<T>{data + row * classes, classes, label[row], smoothing, gradient});
    }
  });
  return losses;
}

/// The same by LibTorch's operators, for devices without a kernel of ours; losses in float32, float64 of float64.
inline at::Tensor cross_entropy_by_operators(const at::Tensor& logits, const at::Tensor& labels, double smoothing,
                                             bool gradient) {
  const auto log_p = at::log_softmax(logits, 1, accumulation_dtype(logits.scalar_type()));
  const auto column = labels.unsqueeze(1);
  const auto at_label = log_p.gather(1, column);
  auto losses = at_label.squeeze(1) * (smoothing - 1);
  if (smoothing > 0) losses.sub_(log_p.mean(1), smoothing);
  if (gradient) {
    const auto p = log_p.exp_();
    if (smoothing > 0) p.sub_(smoothing / static_cast<double>(logits.size(1)));
    p.scatter_add_(1, column, at::full_like(at_label, smoothing - 1));
    logits.detach().copy_(p);
  }
  return losses;
}

inline at::Tensor cross_entropy_of_rows(const at::Tensor& logits, const at::Tensor& labels, double smoothing,
                                        bool gradient) {
  if (!logits.device().is_cpu()) return cross_entropy_by_operators(logits, labels, smoothing, gradient);
  switch (logits.scalar_type()) {
    case at::kDouble:
      return cross_entropy_of_rows<double>(logits, labels, smoothing, gradient);
    case at::kFloat:
      return cross_entropy_of_rows<float>(logits, labels, smoothing, gradient);
    case at::kBFloat16:
      return cross_entropy_of_rows<c10::BFloat16>(logits, labels, smoothing, gradient);
    default:
      return cross_entropy_of_rows<c10::Half>(logits, labels, smoothing, gradient);
  }
}

/// The node of a scalar whose gradients are known when it is made; backward multiplies them by `factor` and by the
/// gradient that comes in.
struct LinearCrossEntropyBackward : torch::autograd::Node {
  using Tensors = torch::autograd::variable_list;

  LinearCrossEntropyBackward(Tensors gradients, double factor, torch::autograd::edge_list&& edges)
      : torch::autograd::Node(std::move(edges)), gradients_(std::move(gradients)), factor_(factor) {}

  std::string name() const override { return "LinearCrossEntropyBackward"; }

  Tensors apply(Tensors&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!gradients_.empty(),
                "[lora::linear_cross_entropy] found a second backward through the same loss, expected one; pass "
                "retain_graph to the first");
    Tensors result(gradients_.size());
    if (!incoming[0].defined()) return result;
    {
      const at::NoGradGuard no_grad;
      const auto factor = incoming[0] * factor_;
      for (size_t i = 0; i < gradients_.size(); ++i) {
        if (!gradients_[i].defined() || !task_should_compute_output(i)) continue;
        result[i] = last_ ? std::move(gradients_[i]).mul_(factor) : gradients_[i] * factor;
      }
    }
    refuse_double_backward("lora::linear_cross_entropy", *this, result);
    return result;
  }

  void will_release_variables() override { last_ = true; }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradients_.clear();
  }

 private:
  Tensors gradients_;
  double factor_;
  bool last_ = false;
};

inline bool is_supported_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline bool has_autocast(at::DeviceType device) {
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

/// A carrier announces the dtype and device of its base, which to() changes behind its back.
inline void synchronise(const at::Tensor& tensor) {
  if (auto* carrier = as_carrier(tensor)) carrier->synchronise();
}

/// Throws a c10::ValueError that names the first argument that does not fit.
inline void check_linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
                                       const LinearCrossEntropyOptions& options) {
  constexpr auto kName = "[lora::linear_cross_entropy] found ";
  TORCH_CHECK_VALUE(hidden.defined() && weight.defined() && labels.defined(), kName,
                    "an undefined tensor, expected hidden, head_weight and labels");
  const auto& bias = options.bias();
  synchronise(weight);
  if (bias.defined()) synchronise(bias);
  TORCH_CHECK_VALUE(hidden.dim() >= 1 && weight.dim() == 2 && hidden.size(-1) == weight.size(1), kName, "hidden ",
                    hidden.sizes(), " and head_weight ", weight.sizes(), ", expected [*, d] and [vocab, d]");
  TORCH_CHECK_VALUE(weight.size(0) > 0, kName, "a head without a row, expected head_weight [vocab, d]");
  TORCH_CHECK_VALUE(is_supported_float(hidden.scalar_type()), kName, "hidden of ", hidden.scalar_type(),
                    ", expected float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(weight.scalar_type() == hidden.scalar_type() || has_autocast(hidden.device().type()), kName,
                    "hidden of ", hidden.scalar_type(), " and head_weight of ", weight.scalar_type(),
                    ", expected one dtype; convert one of them or enable autocast");
  if (bias.defined()) {
    TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == weight.size(0), kName, "a bias ", bias.sizes(),
                      ", expected [vocab] = [", weight.size(0), "]");
    TORCH_CHECK_VALUE(bias.scalar_type() == weight.scalar_type(), kName, "a bias of ", bias.scalar_type(),
                      ", expected head_weight's dtype, ", weight.scalar_type());
  }
  TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong, kName, "labels of ", labels.scalar_type(), ", expected int64");
  TORCH_CHECK_VALUE(labels.sizes() == hidden.sizes().slice(0, static_cast<size_t>(hidden.dim()) - 1), kName, "labels ",
                    labels.sizes(), " for hidden ", hidden.sizes(), ", expected a label a row");
  for (const auto& tensor : {weight, labels, bias.defined() ? bias : weight}) {
    TORCH_CHECK_VALUE(tensor.device() == hidden.device(), kName, "tensors on ", hidden.device(), " and ",
                      tensor.device(), ", expected all on one device");
  }
  TORCH_CHECK_VALUE(options.label_smoothing() >= 0 && options.label_smoothing() <= 1, kName, "label_smoothing ",
                    options.label_smoothing(), ", expected 0 to 1");
  TORCH_CHECK_VALUE(options.chunk_rows() >= 0, kName, "chunk_rows ", options.chunk_rows(),
                    ", expected a number of rows, or 0 for one that fits");
}

/// The positions of the rows that have a label. Throws a c10::ValueError for a label that is no class.
inline at::Tensor labelled_rows(const at::Tensor& labels, int64_t classes, int64_t ignore_index) {
  const auto labelled = labels != ignore_index;
  const auto wrong = labelled.logical_and((labels < 0).logical_or(labels >= classes)).nonzero();
  if (wrong.size(0) > 0) {
    const auto row = wrong[0].item<int64_t>();
    TORCH_CHECK_VALUE(false, "[lora::linear_cross_entropy] found the label ", labels[row].item<int64_t>(), " in row ",
                      row, ", expected one of ", classes, " classes or ignore_index, ", ignore_index);
  }
  return labelled.nonzero().flatten();
}

/// One call. The rows go through the head in chunks, and each chunk leaves its part of the loss and of all gradients,
/// so that no more than its logits are in memory.
class LinearCrossEntropy {
 public:
  LinearCrossEntropy(const at::Tensor& hidden, const at::Tensor& weight, const LinearCrossEntropyOptions& options)
      : options_(options),
        hidden_(hidden),
        weight_(weight),
        differentiable_(at::GradMode::is_enabled()),
        trains_hidden_(differentiable_ && hidden.requires_grad()) {
    const auto device = hidden.device().type();
    if (has_autocast(device)) autocast_dtype_ = at::autocast::get_autocast_dtype(device);
    // A change of the adapters meanwhile is refused, as it is while a kernel of theirs runs.
    if (auto* carrier = as_carrier(weight)) running_.emplace(*carrier->weight()->calls());
    head_ = operand(weight, trains_weight_);
    if (options.bias().defined()) offset_ = operand(options.bias(), trains_bias_);
  }

  /// The loss of the rows of hidden at positions `rows`, 0-dim.
  at::Tensor loss(const at::Tensor& rows, const at::Tensor& labels) {
    const auto matrix = hidden_.detach().reshape({labels.numel(), hidden_.size(-1)});
    if (trains_hidden_) d_hidden_ = at::zeros(matrix.sizes(), matrix.options());
    const auto count = rows.size(0), step = chunk_rows(count);
    at::Tensor sum;
    for (int64_t begin = 0; begin == 0 || begin < count; begin += step) {
      const auto part = rows.narrow(0, begin, std::min(step, count - begin));
      const auto losses = add_chunk(matrix, part, labels.index_select(0, part));
      sum = sum.defined() ? sum + losses : losses;
    }
    double factor = 1;
    if (std::holds_alternative<torch::enumtype::kMean>(options_.reduction())) {
      sum.div_(count);
      factor = count > 0 ? 1 / static_cast<double>(count) : 0;
    }
    auto result = sum.to(accumulation_dtype(hidden_.scalar_type()));
    attach(result, factor);
    return result;
  }

 private:
  using Tensors = torch::autograd::variable_list;
  using Edges = torch::autograd::edge_list;

  at::Tensor cast(const at::Tensor& tensor) const {
    return autocast_dtype_ ? at::autocast::cached_cast(*autocast_dtype_, tensor, tensor.device().type()) : tensor;
  }

  /// What at::linear gets. A plain tensor is cast once and its gradient summed in one place; what a carrier makes of
  /// its own is left to it.
  at::Tensor operand(const at::Tensor& tensor, bool& trained) const {
    if (as_carrier(tensor) != nullptr) return tensor;
    trained = differentiable_ && tensor.requires_grad();
    return cast(tensor.detach());
  }

  /// Of equal chunks none has more logits than stay in the last cache level, and the memory of one is the next one's.
  int64_t chunk_rows(int64_t count) const {
    constexpr int64_t kLogitBytes = int64_t{24} << 20;
    if (options_.chunk_rows() > 0) return options_.chunk_rows();
    const auto bytes = static_cast<int64_t>(c10::elementSize(autocast_dtype_.value_or(hidden_.scalar_type())));
    const auto most = std::max<int64_t>(1, kLogitBytes / (weight_.size(0) * bytes));
    const auto chunks = std::max<int64_t>(1, (count + most - 1) / most);
    return std::max<int64_t>(1, (count + chunks - 1) / chunks);
  }

  at::Tensor add_chunk(const at::Tensor& matrix, const at::Tensor& rows, const at::Tensor& labels) {
    const GraphSection section("lora::linear_cross_entropy");
    const at::AutoGradMode grad_mode(differentiable_);
    const auto x = cast(matrix.index_select(0, rows)).requires_grad_(trains_hidden_);
    const auto logits = at::linear(x, head_, offset_).contiguous();
    const auto values = logits.detach();
    const bool by_graph = section.computed(logits), by_sum = trains_weight_ || trains_bias_;
    const auto losses = cross_entropy_of_rows(values, labels, options_.label_smoothing(), by_graph || by_sum);
    // The values are the gradient of the logits from here on.
    const at::NoGradGuard no_grad;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (trains_weight_) add_product(d_weight_, values.t(), x);
    if (trains_bias_) add(d_bias_, values.sum(0, false, accumulation_dtype(values.scalar_type())));
    if (by_graph) add_gradients(section, rows, x, logits, values);
    return losses.sum();
  }

  /// The gradients of the hidden rows and of what a carrier is made of.
  void add_gradients(const GraphSection& section, const at::Tensor& rows, const at::Tensor& x, const at::Tensor& logits,
                     const at::Tensor& values) {
    const auto x_edge = torch::autograd::impl::gradient_edge(x);
    if (!sources_) {
      sources_ = section.sources({logits});
      sources_->erase(std::remove(sources_->begin(), sources_->end(), x_edge), sources_->end());
      d_sources_.resize(sources_->size());
    }
    auto edges = *sources_;
    if (trains_hidden_) edges.push_back(x_edge);
    const auto gradients = section.backward({logits}, {values}, edges);
    for (size_t i = 0; i < d_sources_.size(); ++i) {
      if (gradients[i].defined()) add(d_sources_[i], gradients[i]);
    }
    if (trains_hidden_) d_hidden_.index_copy_(0, rows, gradients.back().to(d_hidden_.scalar_type()));
  }

  static at::Tensor& zeros_once(at::Tensor& sum, at::IntArrayRef sizes, const at::Tensor& like) {
    const auto dtype = accumulation_dtype(like.scalar_type());
    if (!sum.defined()) sum = at::zeros(sizes, like.options().dtype(dtype));
    return sum;
  }

  /// sum += gradient, in float32 at least.
  static void add(at::Tensor& sum, const at::Tensor& gradient) {
    zeros_once(sum, gradient.sizes(), gradient).add_(gradient);
  }

  /// sum += left · right, in float32 at least.
  static void add_product(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
    zeros_once(sum, {left.size(0), right.size(1)}, left);
    if (sum.scalar_type() == left.scalar_type()) {
      sum.addmm_(left, right);
    } else {
      sum.add_(at::mm(left, right));
    }
  }

  void attach(at::Tensor& loss, double factor) {
    Tensors gradients = std::move(d_sources_);
    Edges edges = sources_ ? std::move(*sources_) : Edges{};
    const auto append = [&](const at::Tensor& tensor, const at::Tensor& gradient) {
      if (!gradient.defined()) return;
      edges.push_back(torch::autograd::impl::gradient_edge(tensor));
      gradients.push_back(gradient.view(tensor.sizes()));
    };
    append(hidden_, d_hidden_);
    append(weight_, d_weight_);
    append(options_.bias(), d_bias_);
    if (edges.empty()) return;
    torch::autograd::create_gradient_edge(
        loss, make_node<LinearCrossEntropyBackward>(std::move(gradients), factor, std::move(edges)));
  }

  const LinearCrossEntropyOptions& options_;
  const at::Tensor& hidden_;
  const at::Tensor& weight_;
  bool differentiable_;
  bool trains_hidden_;
  bool trains_weight_ = false;
  bool trains_bias_ = false;
  std::optional<at::ScalarType> autocast_dtype_;
  std::optional<CallState::Running> running_;
  at::Tensor head_, offset_;  // what is multiplied with

  // Gradients of the sum of the rows' losses.
  at::Tensor d_hidden_, d_weight_, d_bias_;
  std::optional<Edges> sources_;
  Tensors d_sources_;
};

}  // namespace detail

/// Cross entropy (nats) of the logits hidden · head_weightᵀ + bias with the labels, without the logits of all rows in
/// memory: a 0-dim tensor in float32, float64 of float64.
///
/// hidden: [*, d], head_weight: [vocab, d], labels: [*] int64. It equals at::cross_entropy_loss of at::linear of the
/// rows that have a label, the softmax in float32. The weight and the bias may be plain, frozen or trainable, or those
/// of an adapted module, whose adapters' tensors get their gradients. Rows without a label are not multiplied. The
/// others go through the head in chunks, which leave loss and gradients in the same pass; backward only scales these.
/// Where nothing needs a gradient, none is computed. Gradients are summed over the chunks in float32; it can be
/// differentiated once. Under autocast the product has its dtype, as at::linear has.
///
/// Without a labelled row the mean is NaN, as LibTorch's, the sum 0, and every gradient zero. Throws a c10::ValueError,
/// before anything is computed, for shapes, dtypes or devices that do not fit and for a label that is no class. On
/// devices other than the CPU the softmax runs by LibTorch's operators.
inline at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& head_weight,
                                       const at::Tensor& labels, const LinearCrossEntropyOptions& options = {}) {
  detail::check_linear_cross_entropy(hidden, head_weight, labels, options);
  const auto flat = labels.reshape({-1});
  const auto rows = detail::labelled_rows(flat, head_weight.size(0), options.ignore_index());
  return detail::LinearCrossEntropy(hidden, head_weight, options).loss(rows, flat);
}

LORA_NAMESPACE_END
