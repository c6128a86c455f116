#pragma once

#include <ATen/SequenceNumber.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <lora/detail/error.h>
#include <lora/detail/graph_node.h>
#include <lora/version.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The nodes that this thread adds to the autograd graph while the section lives, and its own backward over them: the
/// gradients are returned, and neither accumulated nor shown to a hook of the tensors that the section starts from.
class GraphSection {
 public:
  using Edges = torch::autograd::edge_list;
  using Tensors = torch::autograd::variable_list;

  /// `function` is named in errors.
  explicit GraphSection(const char* function)
      : function_(function),
        begin_(at::sequence_number::peek()),
        thread_(at::RecordFunction::currentThreadId()),
        cached_(at::autocast::is_autocast_cache_enabled()) {
    // A cast of a weight would stay in the cache as a node of the section and be found there by others.
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~GraphSection() { at::autocast::set_autocast_cache_enabled(cached_); }
  GraphSection(const GraphSection&) = delete;
  GraphSection& operator=(const GraphSection&) = delete;

  /// Whether a tensor was computed in the section from one that needs a gradient.
  bool computed(const at::Tensor& tensor) const {
    return tensor.defined() && tensor.requires_grad() && tensor.grad_fn() != nullptr && holds(*tensor.grad_fn());
  }

  /// The edges out of the section that gradients of `outputs` leave it by, each once: to leaves and to tensors that
  /// were computed before.
  Edges sources(const Tensors& outputs) const {
    Edges result;
    std::unordered_set<torch::autograd::Edge> known;
    visit_sources(outputs, [&](const torch::autograd::Edge& edge) {
      if (known.insert(edge).second) result.push_back(edge);
    });
    return result;
  }

  /// The gradients that leave along `sources`, undefined for none, given those of `outputs`, which were computed in the
  /// section. It cuts the section off from its sources and frees it. Throws a StateError where sources() are others.
  Tensors backward(const Tensors& outputs, const Tensors& gradients, const Edges& sources) const {
    std::vector<decltype(make_node<Sink>(sources[0]))> sinks;
    std::unordered_map<torch::autograd::Edge, size_t> index;
    for (const auto& source : sources) {
      index.emplace(source, sinks.size());
      sinks.push_back(make_node<Sink>(source));
    }
    std::unordered_set<size_t> reached;
    visit_sources(outputs, [&](torch::autograd::Edge& edge) {
      const auto found = index.find(edge);
      if (found == index.end()) refuse_other_sources();
      reached.insert(found->second);
      edge = torch::autograd::Edge(sinks[found->second], 0);
    });
    if (reached.size() != sinks.size()) refuse_other_sources();
    torch::autograd::backward(outputs, gradients);
    Tensors result;
    for (const auto& sink : sinks) result.push_back(std::move(sink->gradient));
    return result;
  }

 private:
  struct Sink : torch::autograd::Node {
    explicit Sink(const torch::autograd::Edge& source) {
      const auto& metadata = source.function->input_metadata(source.input_nr);
      const auto sizes = c10::asIntArrayRefSlow(metadata.shape_as_dim_vector(), __FILE__, __LINE__);
      add_input_metadata(at::empty({}, metadata.options()).expand(sizes));
    }
    std::string name() const override { return "lora::GraphSection::Sink"; }
    torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
      gradient = std::move(gradients[0]);
      return {};
    }
    at::Tensor gradient;
  };

  // Numbers grow on their thread only: what another thread made has been made elsewhere. The largest number is that of
  // nodes without a place in the order, the leaves' among them.
  bool holds(const torch::autograd::Node& node) const {
    return node.sequence_nr() >= begin_ && node.sequence_nr() != std::numeric_limits<uint64_t>::max() &&
           node.thread_id() == thread_;
  }

  template <class Visit>
  void visit_sources(const Tensors& outputs, const Visit& visit) const {
    std::vector<NodePointer> open;
    std::unordered_set<const torch::autograd::Node*> known;
    const auto enter = [&](const NodePointer& node) {
      if (known.insert(node.get()).second) open.push_back(node);
    };
    for (const auto& output : outputs) enter(output.grad_fn());
    while (!open.empty()) {
      const auto node = open.back();
      open.pop_back();
      for (auto& edge : node->next_edges()) {
        if (!edge.is_valid()) continue;
        if (holds(*edge.function)) {
          enter(edge.function);
        } else {
          visit(edge);
        }
      }
    }
  }

  [[noreturn]] void refuse_other_sources() const {
    throw StateError("[" + std::string(function_) +
                     "] found a computation that starts from other tensors that need a gradient when it is run again, "
                     "expected those of its first run; keep active adapters, guards, requires_grad and everything that "
                     "it depends on as they were then");
  }

  const char* function_;
  uint64_t begin_;
  uint64_t thread_;
  bool cached_;
};

}  // namespace detail
LORA_NAMESPACE_END
