// make_seeds OUT: files to begin with, OUT/<target>/*, for each of the fuzzing programs.

#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <lora/config/lora_config.h>
#include <lora/io/checksum.h>
#include <lora/io/config_json.h>
#include <lora/io/safetensors.h>
#include <lora/io/torch_pickle.h>

#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>

#include "harness/torch_archive.h"

namespace {

namespace fs = std::filesystem;
using Tensors = std::map<std::string, torch::Tensor>;

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write(const fs::path& path, const std::string& bytes) {
  fs::create_directories(path.parent_path());
  if (!(std::ofstream(path, std::ios::binary) << bytes)) throw std::runtime_error("cannot write " + path.string());
}

void safetensors(const fs::path& folder) {
  fs::create_directories(folder);
  Tensors tensors;
  lora::save_safetensors(tensors, folder / "none", {});
  tensors["a"] = at::ones({2}, at::kByte);
  lora::save_safetensors(tensors, folder / "one");
  for (const auto& [name, type] : lora::detail::kSafetensorsDtypes) tensors[name] = at::ones({1}, at::kByte).to(type);
  tensors["scalar"] = at::ones({});
  tensors["empty"] = at::zeros({0, 3});
  tensors["é \"\\\n"] = at::ones({1, 1, 2});
  std::map<std::string, std::string> metadata = {{"format", "pt"}, {"lora.x", "{}"}};
  lora::add_checksums(tensors, metadata);
  lora::save_safetensors(tensors, folder / "all", metadata);
}

void configurations(const fs::path& folder) {
  const auto save = [&](const std::string& name, const lora::LoraConfig& config) {
    write(folder / name, lora::detail::config_json(config).dump());
  };
  save("defaults", lora::LoraConfig());
  save("list", lora::LoraConfig().r(3).lora_alpha(7).target_modules({"c_attn[q,v]", "h.0.fc"}).exclude_modules({"x"}));
  save("patterns", lora::LoraConfig()
                       .target_modules(R"(.*\.(up|down)_[a-z]{1,3}$)")
                       .rank_pattern({{"^up", 5}, {"down", 2}})
                       .alpha_pattern({{"^up", 1.5}})
                       .fused_parts("qkv", {{"q", 8}, {"k", 4}})
                       .use_rslora(true)
                       .lora_dropout(0.25)
                       .init_lora_weights(lora::LoraInit::kGaussian));
  save("copies", lora::LoraConfig()
                     .target_modules({"q_proj"})
                     .layers_to_transform(std::vector<int64_t>{0, 2})
                     .layers_pattern(std::string("layers"))
                     .modules_to_save({"score", "self_attn"})
                     .trainable_token_indices(std::vector<int64_t>{3, 5})
                     .bias(lora::BiasCopies::kAdaptedOnly)
                     .lora_bias(true)
                     .auto_mapping(R"({"base_model_class": "Model"})")
                     .task_type("SEQ_CLS"));
}

/// The first byte says whether a file or a pickle follows.
void pickles(const fs::path& folder) {
  fs::create_directories(folder);
  const auto temporary = folder / "file";
  Tensors tensors;
  for (const auto& dtype : lora::detail::kPickleDtypes) {
    tensors[std::string(dtype.name)] = at::ones({1}, at::kByte).to(dtype.type);
  }
  tensors["empty"] = at::zeros({0, 3});
  lora::save_torch_pickle(tensors, temporary);
  auto bytes = read(temporary);
  fs::remove(temporary);
  write(folder / "checked", "\x02" + bytes);
  // Without checksums a changed file is read further.
  const std::string entry = "PK\x01\x02";
  for (auto at = bytes.find(entry); at != std::string::npos; at = bytes.find(entry, at + 1)) {
    bytes.replace(at + 16, 4, 4, '\0');
  }
  write(folder / "unchecked", "\x02" + bytes);

  const auto six = storage("0", 6);
  const auto whole = rebuild(six, 0, {2, 3}, {3, 1});
  const auto hooks = global("collections", "OrderedDict") + ")R";
  const auto save = [&](const std::string& name, const std::string& object) {
    write(folder / name, "\x01" + pickle(object));
  };
  save("views", dict(string("a") + whole + string("b") + rebuild(six, 1, {2, 2}, {3, 1}) + string("c") +
                     rebuild(six, 0, {}, {})));
  save("nested", dict(string("a") + dict(string("b") + whole + string("c") + dict(string("d") + whole))));
  save("parameter",
       dict(string("a") + global("torch._utils", "_rebuild_parameter") + tuple(whole + "\x88" + hooks) + "R"));
  save("conjugate", dict(string("a") + rebuild(storage("0", 3, global("torch", "ComplexFloatStorage")), 0, {3}, {1},
                                               dict(string("conj") + "\x88"))));
  save("dtype", dict(string("a") + global("torch._utils", "_rebuild_tensor_v3") +
                     tuple(storage("0", 24, global("torch.storage", "UntypedStorage")) + integer(0) + integers({12}) +
                           integers({1}) + "\x89" + hooks + global("torch", "uint16")) +
                     "R"));
  save("memo", "}q" + raw('\0') + "(" + string("a") + "q\x01" + whole + "q\x02" + string("b") + "h\x02u");
  save("others", dict(string("a") + integer(1) + string("b") +
                      "](K\x01M\x01\x02"
                      "Ne" +
                      string("c") + "G12345678" + string("d") + "\x8f(K\x01\x90" + string("e") +
                      global("os", "system") + tuple(string("x")) + "R}b"));
  const std::string modern = "}\x94(\x8c\x01w\x94\x8c\x05torch\x94\x8c\x05int64\x94\x93\x94u.";
  write(folder / "protocol4", "\x01\x80\x04\x95" + raw<uint64_t>(modern.size()) + modern);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::cerr << "usage: make_seeds OUT\n", 2;
  try {
    const fs::path out = argv[1];
    fs::remove_all(out);
    safetensors(out / "safetensors_header");
    configurations(out / "adapter_config");
    pickles(out / "torch_pickle");
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
  return 0;
}
