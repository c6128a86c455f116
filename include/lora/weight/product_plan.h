#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/matmul.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/ScalarType.h>
#include <lora/detail/processor.h>
#include <lora/detail/tensor_memory.h>
#include <lora/version.h>
#include <lora/weight/frozen_product.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What the kernel of a product is chosen by: x [rows, in] times a frozen matrix [in, out].
struct ProductShape {
  /// The largest power of two that is no more than x's rows; 64 stands for all from there on.
  int64_t rows = 0;
  int64_t in = 0;                     ///< Rows of the matrix.
  int64_t out = 0;                    ///< Columns of the matrix.
  bool transposed = false;            ///< Whether the matrix lies in memory as [out, in], as a Linear's does.
  at::ScalarType dtype = at::kFloat;  ///< Of both.
  int threads = 1;                    ///< at::get_num_threads().

  /// An order for maps: by matrix, dtype and threads, then by rows.
  bool operator<(const ProductShape& other) const { return key() < other.key(); }
  /// Whether all members are equal.
  bool operator==(const ProductShape& other) const { return key() == other.key(); }

 private:
  std::tuple<int64_t, int64_t, bool, at::ScalarType, int, int64_t> key() const {
    return {in, out, transposed, dtype, threads, rows};
  }
};

/// Which kernel computes each frozen product of an accelerated model: the faster one, measured once for each shape.
///
/// LibTorch has two on the CPU, its own (ATen's, in fp32 MKL's, which is slow on some processors) and oneDNN's, which
/// ATen does not use in fp32. The choice depends on nothing but the shape, the dtype, the number of threads and the
/// processor, so that it can be kept: with the same choices a run repeats bit for bit. Products below 2^22
/// multiplications, fp64 and other devices are ATen's. Safe for several threads.
class ProductPlan {
 public:
  /// A choice with what it was made by.
  struct Choice {
    ProductKernel kernel = ProductKernel::kAten;  ///< The kernel.
    double aten_seconds = 0;                      ///< ATen's best time; 0: not measured.
    double onednn_seconds = 0;                    ///< oneDNN's best time; 0: not measured.
  };
  /// The choices by shape.
  using Choices = std::map<ProductShape, Choice>;

  /// Measures.
  ProductPlan() = default;
  /// Takes the given kernel for every product that it has, of any size, and measures nothing.
  explicit ProductPlan(ProductKernel always) : always_(always) {}

  /// The plan that models share where they are given no other.
  static const std::shared_ptr<ProductPlan>& of_process() {
    static const auto plan = std::make_shared<ProductPlan>();
    return plan;
  }

  /// The processor that the choices are for, as its vendor calls it.
  static std::string processor() { return detail::processor_name(); }
  /// Whether this LibTorch has oneDNN's product; without it every choice is ATen's.
  static bool has_onednn() { return detail::has_onednn_product(); }

  /// The kernel for x [rows, in] times `matrix` [in, out]; measures where the shape is new.
  ProductKernel choose(int64_t rows, const at::Tensor& matrix) {
    const bool small = !always_ && rows * matrix.numel() < kSmallest;
    if (small || !detail::onednn_takes(matrix)) return ProductKernel::kAten;
    if (always_) return *always_;
    const ProductShape shape{row_class(rows),         matrix.size(0),       matrix.size(1),
                             !matrix.is_contiguous(), matrix.scalar_type(), at::get_num_threads()};
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = choices_.find(shape);
    if (found == choices_.end()) found = choices_.emplace(shape, measure(shape)).first;
    return found->second.kernel;
  }

  /// What has been chosen.
  Choices choices() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return choices_;
  }

  /// Sets choices, as those of another run, in place of any of the same shapes.
  void pin(const Choices& choices) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [shape, choice] : choices) choices_[shape] = choice;
  }

  /// Measures every number of rows for the matrices that are known, so that nothing is left to be measured later.
  void complete() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [known, choice] : Choices(choices_)) {
      for (int64_t rows = 1; rows <= kMostRows; rows *= 2) {
        auto shape = known;
        shape.rows = rows;
        if (rows * shape.in * shape.out < kSmallest || choices_.count(shape) != 0) continue;
        choices_.emplace(shape, measure(shape));
      }
    }
  }

 private:
  // Below, a call costs as much as its arithmetic, ATen's least (measured: the two meet at 64·64·64 to 128·128·128),
  // and what is measured near there differs from one run to the next.
  static constexpr int64_t kSmallest = int64_t{1} << 22;
  static constexpr int64_t kMostRows = 64;
  // How much faster oneDNN's has to be: what differs by less may be measured the other way round the next time.
  static constexpr double kAdvantage = 1.2;

  static int64_t row_class(int64_t rows) {
    int64_t power = 1;
    while (2 * power <= std::min(rows, kMostRows)) power *= 2;
    return power;
  }

  static Choice measure(const ProductShape& shape) {
    const c10::InferenceMode no_inference(false);
    const c10::NoGradGuard no_grad;
    const detail::PlainDispatch plain;
    // A part of a large matrix tells as much, sooner.
    const auto in = std::min<int64_t>(shape.in, 2048), out = std::min<int64_t>(shape.out, 2048);
    const auto zeros = [&](at::IntArrayRef sizes) { return detail::zeros_in_own_pages(sizes, shape.dtype); };
    const auto x = zeros({shape.rows, in});
    const auto matrix = shape.transposed ? zeros({out, in}).t() : zeros({in, out});
    Choice choice;
    choice.aten_seconds = choice.onednn_seconds = std::numeric_limits<double>::infinity();
    for (int round = 0; round < 4; ++round) {  // in turn, so that what disturbs one disturbs the other
      const auto aten = seconds([&] { at::matmul(x, matrix); });
      const auto onednn = seconds([&] { detail::onednn_product(x, matrix, std::nullopt); });
      if (round == 0) continue;
      choice.aten_seconds = std::min(choice.aten_seconds, aten);
      choice.onednn_seconds = std::min(choice.onednn_seconds, onednn);
    }
    if (choice.onednn_seconds * kAdvantage < choice.aten_seconds) choice.kernel = ProductKernel::kOneDnn;
    return choice;
  }

  template <class Function>
  static double seconds(const Function& function) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    function();
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  std::optional<ProductKernel> always_;
  mutable std::mutex mutex_;
  Choices choices_;
};

/// A table with a line for each choice.
inline std::ostream& operator<<(std::ostream& out, const ProductPlan& plan) {
  out << "products on " << ProductPlan::processor();
  if (!ProductPlan::has_onednn()) out << "; this LibTorch has no mkldnn::_linear_pointwise, so all are ATen's";
  out << '\n';
  for (const auto& [shape, choice] : plan.choices()) {
    out << shape.rows << (shape.rows == 64 ? "+" : "") << " x " << shape.in << " x " << shape.out
        << (shape.transposed ? " transposed, " : ", ") << c10::toString(shape.dtype) << ", " << shape.threads
        << " threads: " << to_string(choice.kernel);
    if (choice.aten_seconds > 0) {
      out << " (ATen " << choice.aten_seconds * 1e6 << " us, oneDNN " << choice.onednn_seconds * 1e6 << " us)";
    }
    out << '\n';
  }
  return out;
}

LORA_NAMESPACE_END
