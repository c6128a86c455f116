// Every kind of file, cut off and with flipped bits at hundreds of places: an error, or what the file still says; never
// a crash, memory that the file only claims to need, or a changed model.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/io/checkpoint.h>
#include <lora/io/safetensors.h>
#include <lora/io/torch_pickle.h>

#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <string>

#include "harness/memory.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace damaged_files_test {
namespace {

using Tensors = std::map<std::string, at::Tensor>;

/// How many of the damaged files were loaded all the same.
struct Loaded {
  int cut = 0;
  int flipped = 0;
};

/// Calls `load` with 500 beginnings of a file in its place and 500 times with one to three bits of it flipped, every
/// second time near its beginning. It has to throw a FormatError or a ValueError, or to load something.
Loaded damage(const std::string& path, const std::function<void()>& load) {
  constexpr int kTrials = 500;
  constexpr size_t kMemory = size_t{256} << 20, kBeginning = 1000;
  const auto intact = read_bytes(path);
  load();
  std::mt19937 random(20260109);
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  const auto loads = [&](const std::string& bytes) {
    write_bytes(path, bytes);
    try {
      load();
      return 1;
    } catch (const lora::FormatError&) {
    } catch (const c10::ValueError&) {
    }
    return 0;
  };
  Loaded loaded;
  const harness::LargestAllocation allocations;
  const harness::MemoryLimit limit(kMemory);
  for (int trial = 0; trial < kTrials; ++trial) loaded.cut += loads(intact.substr(0, below(intact.size())));
  for (int trial = 0; trial < kTrials; ++trial) {
    auto flipped = intact;
    const size_t places = trial % 2 == 0 ? intact.size() : std::min(intact.size(), kBeginning);
    for (size_t i = 0; i <= below(3); ++i) {
      auto& byte = flipped[below(places)];
      byte = static_cast<char>(byte ^ (1 << below(8)));
    }
    loaded.flipped += loads(flipped);
  }
  EXPECT_LE(allocations.bytes(), static_cast<int64_t>(intact.size()) + 4096);
  write_bytes(path, intact);
  return loaded;
}

Tensors example() {
  const auto shared = torch::randn({7, 5});
  return {{"layer.0.weight", shared},
          {"layer.0.bias", torch::randn({5}, at::kDouble)},
          {"mask", torch::ones({9}, at::kBool)},
          {"tied", shared},
          {"wide", torch::ones({40, 30}, at::kBFloat16)},
          {"none", torch::zeros({0, 3})}};
}

void touch(const Tensors& tensors) {
  volatile double sum = 0;
  for (const auto& [name, tensor] : tensors) sum = sum + static_cast<double>(harness::bytes_of(tensor).size());
}

void expect_equal(const Tensors& found, const Tensors& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (const auto& [name, tensor] : expected) EXPECT_TRUE(torch::equal(found.at(name), tensor)) << name;
}

TEST(DamagedFiles, Safetensors) {
  TempFolder folder;
  const auto path = folder / "file.safetensors";
  lora::save_safetensors(example(), path);
  EXPECT_EQ(damage(path, [&] { touch(lora::load_safetensors(path)); }).cut, 0);
}

TEST(DamagedFiles, TorchPicklesAreWhatTheyWere) {
  TempFolder folder;
  const auto path = folder / "file.pt";
  const auto tensors = example();
  lora::save_torch_pickle(tensors, path);
  // Bits that say nothing here can flip: dates, padding.
  EXPECT_EQ(damage(path, [&] { expect_equal(lora::load_torch_pickle(path), tensors); }).cut, 0);
}

TEST(DamagedFiles, TorchPicklesWithoutChecksums) {
  TempFolder folder;
  const auto path = folder / "file.pt";
  lora::save_torch_pickle(example(), path);
  auto bytes = read_bytes(path);
  const std::string entry = "PK\x01\x02";
  for (auto at = bytes.find(entry); at != std::string::npos; at = bytes.find(entry, at + 1)) {
    bytes.replace(at + 16, 4, 4, '\0');
  }
  write_bytes(path, bytes);
  const auto loaded = damage(path, [&] { touch(lora::load_torch_pickle(path)); });
  EXPECT_EQ(loaded.cut, 0);
  EXPECT_GT(loaded.flipped, 0) << "the checksums were to be off";
}

TEST(DamagedFiles, IndexesOfShardsGiveWhatTheyGave) {
  TempFolder folder;
  const auto tensors = example();
  lora::save_checkpoint(tensors, folder.path().string(), lora::SaveCheckpointOptions().max_shard_bytes(300));
  const auto load = [&] { expect_equal(lora::load_checkpoint(folder.path().string()), tensors); };
  damage(folder / "model.safetensors.index.json", load);
}

/// A PEFT directory and the model that it is for.
class DamagedAdapter : public ::testing::Test {
 protected:
  DamagedAdapter() { before_ = harness::parameter_state(*model_); }

  /// Damages one of the directory's files; the model is the same after each.
  Loaded damage_file(const std::string& name) {
    const auto directory = folder_.path().string();
    return damage(folder_ / name, [&] {
      try {
        auto adapters = lora::load(*model_, directory);
        EXPECT_TRUE(at::isfinite(model_->forward(x_)).all().item<bool>());
        adapters.unload();
      } catch (...) {
        EXPECT_EQ(harness::parameter_state(*model_), before_);
        throw;
      }
      EXPECT_EQ(harness::parameter_state(*model_), before_);
    });
  }

  TempFolder folder_;
  Mlp model_;
  const at::Tensor x_ = harness::normal({3, 12}, 5, at::kFloat);
  std::map<std::string, std::string> before_;
};

TEST_F(DamagedAdapter, OfPeft) {
  for (const auto* name : {"adapter_config.json", "adapter_model.safetensors"}) {
    std::filesystem::copy(std::string(LORA_SOURCE_DIR "/tests/golden/mlp/plain/") + name, folder_ / name);
  }
  damage_file("adapter_config.json");
  EXPECT_EQ(damage_file("adapter_model.safetensors").cut, 0);
}

TEST_F(DamagedAdapter, OfOurs) {
  auto adapters = lora::inject(*model_, lora::LoraConfig().r(3).lora_alpha(7).target_modules({"up", "down"}));
  harness::fill(adapters);
  adapters.save(folder_.path().string());
  adapters.unload();
  EXPECT_EQ(damage_file("adapter_config.json").cut, 0);
  const auto loaded = damage_file("adapter_model.safetensors");
  EXPECT_EQ(loaded.cut + loaded.flipped, 0) << "checksums find everything";
}

}  // namespace
}  // namespace damaged_files_test
