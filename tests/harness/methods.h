// Every method of the library with what its paper or PEFT defines: W′ of a weight, in the words of the formula and in
// float64, and how many numbers are trained.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/module.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <ostream>
#include <string>
#include <vector>

#include "harness/models.h"

namespace harness {

/// The tensors of one update by their local names.
using Tensors = std::map<std::string, at::Tensor>;

/// Sizes of a weight, or of the rows that an update is for.
struct WeightSizes {
  int64_t out = 0;
  int64_t in = 0;      // columns of the matrix
  int64_t kernel = 1;  // of them, for each channel
};

struct MethodCase {
  using Rows = std::function<at::Tensor(const at::Tensor& W0, const Tensors& tensors)>;

  std::string name;
  std::function<lora::Adapters(torch::nn::Module&, const lora::TargetModules&)> inject;
  std::function<void(lora::Adapters&, const lora::TargetModules&, const std::string&)> add;
  Rows weight;                                                  // W′ [out, in] from W0 [out, in]
  Rows bias = {};                                               // b′ from b; none: b
  std::function<int64_t(const WeightSizes& sizes)> parameters;  // trained ones
  std::function<bool(const HostCase& host)> fits = [](const HostCase&) { return true; };
  bool forms_dense = false;  // every use of the weight
};

inline void PrintTo(const MethodCase& method, std::ostream* out) { *out << method.name; }

inline bool is_table(const HostCase& host) { return host.rows.front().table; }
inline bool has_kernel(const HostCase& host) { return host.name.rfind("Conv", 0) == 0 || host.name == "Bilinear"; }
inline bool has_parts(const HostCase& host) {
  const auto& path = host.rows.front().tensors;
  return path.size() > 2 && (path.substr(path.size() - 2) == ".q");
}

template <class Config>
MethodCase method_case(const std::string& name, const Config& config) {
  MethodCase method;
  method.name = name;
  method.inject = [config](torch::nn::Module& model, const lora::TargetModules& targets) {
    auto targeted = config;
    return lora::inject(model, targeted.target_modules(targets));
  };
  method.add = [config](lora::Adapters& adapters, const lora::TargetModules& targets, const std::string& adapter) {
    auto targeted = config;
    adapters.add(targeted.target_modules(targets), adapter);
  };
  return method;
}

inline at::Tensor factor(const Tensors& tensors, const std::string& name) {
  const auto plain = tensors.find("lora_" + name);
  return plain == tensors.end() ? tensors.at("lora_embedding_" + name) : plain->second;
}

/// MoRA by its pseudo code, one input at a time: what M gives for the unit vectors.
inline at::Tensor mora_dense(const at::Tensor& M, int64_t in, int64_t out, bool rotates) {
  const auto q = M.size(0), groups = (in + q - 1) / q;
  std::vector<at::Tensor> columns;
  for (int64_t i = 0; i < in; ++i) {
    at::Tensor result;
    std::vector<at::Tensor> results;
    for (int64_t g = 0; g < groups; ++g) {
      auto compressed = at::zeros({q}, M.options().requires_grad(false));
      for (int64_t j = 0; j < q; ++j) {
        if ((g * q + j) % in == i) compressed[j] += 1;
      }
      if (rotates) {
        auto rotated = at::zeros_like(compressed);
        for (int64_t k = 0; k < q / 2; ++k) {
          const auto angle =
              static_cast<double>(g) * std::pow(10000.0, -2.0 * static_cast<double>(k) / static_cast<double>(q));
          const auto first = compressed[k].item<double>(), second = compressed[k + q / 2].item<double>();
          rotated[k] = first * std::cos(angle) - second * std::sin(angle);
          rotated[k + q / 2] = second * std::cos(angle) + first * std::sin(angle);
        }
        compressed = rotated;
      }
      results.push_back(at::mv(M, compressed));
    }
    auto y = rotates ? at::cat(results) : at::stack(results).sum(0);
    y = y.repeat({(out + y.size(0) - 1) / y.size(0)}).narrow(0, 0, out);
    columns.push_back(y);
  }
  return at::stack(columns, 1);
}

/// All methods but LoRA itself, which has tests of its own.
inline const std::vector<MethodCase>& method_cases() {
  static const std::vector<MethodCase> cases = [] {
    std::vector<MethodCase> all;
    constexpr int64_t r = 2;
    constexpr double s = 3.0 / 2.0;

    auto dora = method_case("DoRA", lora::LoraConfig().r(r).lora_alpha(3).use_dora(true));
    dora.weight = [](const at::Tensor& W0, const Tensors& tensors) {
      const auto V = W0 + s * at::mm(factor(tensors, "B"), factor(tensors, "A"));
      const auto norm = V.detach().square().sum(1).sqrt();  // which takes no gradient
      return V * (tensors.at("lora_magnitude_vector") / norm).unsqueeze(1);
    };
    dora.parameters = [](const WeightSizes& w) { return r * (w.in + w.out) + w.out; };
    dora.fits = [](const HostCase& host) { return host.name != "ConvTranspose2d"; };
    all.push_back(dora);

    const auto started = [](const at::Tensor& W0, const Tensors& tensors) {
      const auto start = at::mm(tensors.at("lora_B_start"), tensors.at("lora_A_start"));
      return W0 + s * (at::mm(factor(tensors, "B"), factor(tensors, "A")) - start);
    };
    for (const auto init : {lora::LoraInit::kPissa, lora::LoraInit::kOlora}) {
      auto start = method_case(init == lora::LoraInit::kPissa ? "PiSSA" : "OLoRA",
                               lora::LoraConfig().r(r).lora_alpha(3).init_lora_weights(init));
      start.weight = started;
      start.parameters = [](const WeightSizes& w) { return r * (w.in + w.out); };
      all.push_back(start);
    }
    auto orthogonal =
        method_case("Orthogonal", lora::LoraConfig().r(r).lora_alpha(3).init_lora_weights(lora::LoraInit::kOrthogonal));
    orthogonal.weight = [](const at::Tensor& W0, const Tensors& tensors) {
      return W0 + s * at::mm(factor(tensors, "B"), factor(tensors, "A"));
    };
    orthogonal.parameters = [](const WeightSizes& w) { return r * (w.in + w.out); };
    all.push_back(orthogonal);

    auto vera = method_case("VeRA", lora::VeraConfig().r(3).projection_prng_key(5));
    vera.weight = [](const at::Tensor& W0, const Tensors& tensors) {
      const auto A = tensors.at("vera_A").narrow(1, 0, W0.size(1)), B = tensors.at("vera_B").narrow(0, 0, W0.size(0));
      const auto d = at::diag(tensors.at("vera_lambda_d")), b = at::diag(tensors.at("vera_lambda_b"));
      return W0 + at::mm(at::mm(b, B), at::mm(d, A));
    };
    vera.parameters = [](const WeightSizes& w) { return 3 + w.out; };
    all.push_back(vera);

    auto ia3 = method_case("IA3", lora::IA3Config());
    ia3.weight = [](const at::Tensor& W0, const Tensors& tensors) { return at::mm(at::diag(tensors.at("ia3_l")), W0); };
    ia3.bias = [](const at::Tensor& b, const Tensors& tensors) { return b * tensors.at("ia3_l"); };
    ia3.parameters = [](const WeightSizes& w) { return w.out; };
    ia3.fits = dora.fits;
    all.push_back(ia3);

    auto feedforward = method_case("IA3Feedforward", lora::IA3Config().feedforward_modules(".*"));
    feedforward.weight = [](const at::Tensor& W0, const Tensors& tensors) {
      const auto& l = tensors.at("ia3_l");
      return at::mm(W0, at::diag(l.repeat_interleave(W0.size(1) / l.size(0))));
    };
    feedforward.parameters = [](const WeightSizes& w) { return w.in / w.kernel; };
    feedforward.fits = [](const HostCase& host) {
      return !is_table(host) && !has_parts(host) && host.name != "ConvTranspose2d";
    };
    all.push_back(feedforward);

    auto miss = method_case("MiSS", lora::MissConfig().r(3));
    miss.weight = [](const at::Tensor& W0, const Tensors& tensors) {
      const auto& D = tensors.at("miss_block");
      return W0 + D.t().repeat({1, (W0.size(1) + 2) / 3}).narrow(1, 0, W0.size(1));
    };
    miss.parameters = [](const WeightSizes& w) { return 3 * w.out; };
    all.push_back(miss);

    auto mini = method_case("MiSSMini", lora::MissConfig().r(3).mini_r(2).init_weights(lora::MissForm::kMini));
    mini.weight = [](const at::Tensor& W0, const Tensors& tensors) {
      const auto D = tensors.at("miss_block").t();
      return W0 + D.repeat({W0.size(0) / 2, (W0.size(1) + 2) / 3}).narrow(1, 0, W0.size(1));
    };
    mini.parameters = [](const WeightSizes&) { return 6; };
    mini.fits = [](const HostCase& host) {
      for (const auto* odd : {"Twice", "OwnType", "Conv2d", "Conv2dCircular", "Conv2dGroups"}) {
        if (host.name == odd) return false;  // an odd number of outputs
      }
      return true;
    };
    all.push_back(mini);

    auto bat = method_case("MiSSBat", lora::MissConfig().r(4).init_weights(lora::MissForm::kBat));
    bat.weight = [](const at::Tensor& W0, const Tensors& tensors) {
      const auto& D = tensors.at("miss_block");
      std::vector<at::Tensor> rows;
      for (int64_t i = 0; i < W0.size(0); i += 4) {
        std::vector<at::Tensor> blocks;
        for (int64_t j = 0; j < W0.size(1); j += 4) {
          const auto block = W0.narrow(0, i, 4).narrow(1, j, 4);
          blocks.push_back(block + at::mm(block, D[i / 4]) + D[i / 4]);
        }
        rows.push_back(at::cat(blocks, 1));
      }
      return at::cat(rows, 0);
    };
    bat.parameters = [](const WeightSizes& w) { return w.out / 4 * 16; };
    bat.fits = [](const HostCase& host) {
      return host.name.rfind("Mlp", 0) == 0 || host.name == "Sequential" || host.name == "Encoder" ||
             host.name == "AttentionCross" || host.name == "AttentionKdim";
    };
    bat.forms_dense = true;
    all.push_back(bat);

    const auto mora_size = [](const WeightSizes& w, bool even) {
      const auto q = static_cast<int64_t>(std::sqrt(static_cast<double>((w.in + w.out) * r)) + 0.5);
      return even ? q / 2 * 2 : q;
    };
    for (const bool rotates : {false, true}) {
      auto mora = method_case(rotates ? "MoRA6" : "MoRA1", lora::MoraConfig().r(r).mora_type(rotates ? 6 : 1));
      mora.weight = [rotates](const at::Tensor& W0, const Tensors& tensors) {
        return W0 + mora_dense(tensors.at("mora_M"), W0.size(1), W0.size(0), rotates);
      };
      mora.parameters = [=](const WeightSizes& w) { return mora_size(w, rotates) * mora_size(w, rotates); };
      if (rotates) mora.fits = [](const HostCase& host) { return !is_table(host) && !has_kernel(host); };
      all.push_back(mora);
    }
    return all;
  }();
  return cases;
}

/// A method on a kind of layer.
struct MethodOnHost {
  MethodCase method;
  HostCase host;
};

inline void PrintTo(const MethodOnHost& tested, std::ostream* out) {
  *out << tested.method.name << " on " << tested.host.name;
}

inline std::vector<MethodOnHost> methods_on_hosts(bool fit) {
  std::vector<MethodOnHost> all;
  for (const auto& method : method_cases()) {
    for (const auto& host : host_cases()) {
      if (method.fits(host) == fit) all.push_back({method, host});
    }
  }
  return all;
}

inline std::string method_on_host_name(const ::testing::TestParamInfo<MethodOnHost>& info) {
  return info.param.method.name + "On" + info.param.host.name;
}

}  // namespace harness
