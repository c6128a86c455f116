// Every kind of file, cut off and with flipped bits at hundreds of places: an error, or what the file still says; never
// a crash, memory that the file only claims to need, or a changed model.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/io/checkpoint.h>
#include <lora/io/convert_adapter.h>
#include <lora/io/safetensors.h>
#include <lora/io/torch_pickle.h>

#include <filesystem>
#include <map>
#include <string>

#include "harness/damage.h"
#include "harness/expect_same_bits.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace damaged_files_test {
namespace {

using harness::damage;
using harness::expect_same_bits;
using Tensors = std::map<std::string, at::Tensor>;

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
  EXPECT_EQ(damage(path, [&] { expect_same_bits(lora::load_torch_pickle(path), tensors); }).cut, 0);
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
  const auto load = [&] { expect_same_bits(lora::load_checkpoint(folder.path().string()), tensors); };
  damage(folder / "model.safetensors.index.json", load);
}

TEST(DamagedFiles, ShardsHaveChecksums) {
  TempFolder folder;
  const auto tensors = example();
  lora::save_checkpoint(tensors, folder.path().string(), lora::SaveCheckpointOptions().max_shard_bytes(300));
  const auto load = [&] { lora::load_checkpoint(folder.path().string()); };
  const auto shard = folder / "model-00001-of-00003.safetensors";
  ASSERT_TRUE(std::filesystem::exists(shard));
  const auto loaded = damage(shard, load);
  EXPECT_EQ(loaded.cut + loaded.flipped, 0);
}

/// An adapter on disk and the model that it is for.
class DamagedAdapter : public ::testing::Test {
 protected:
  DamagedAdapter() { before_ = harness::parameter_state(*model_); }

  /// Damages one of the directory's files; the model is the same after each.
  harness::LoadedDamage damage_file(const std::string& name) {
    return damage_file(name, [&] { return lora::load(*model_, folder_.path().string()); });
  }
  template <class Load>
  harness::LoadedDamage damage_file(const std::string& name, const Load& load) {
    return damage(folder_ / name, [&] {
      try {
        lora::Adapters adapters = load();
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

TEST_F(DamagedAdapter, OfPeftAsAPickle) {
  lora::convert_adapter(LORA_SOURCE_DIR "/tests/golden/mlp/plain", folder_.path().string(),
                        lora::AdapterFormat::kPeftPickle);
  damage_file("adapter_config.json");
  EXPECT_EQ(damage_file("adapter_model.bin").cut, 0);
}

TEST_F(DamagedAdapter, OfLoralib) {
  lora::save_torch_pickle(
      {{"up.lora_A", harness::normal({3, 12}, 1, at::kFloat)}, {"up.lora_B", harness::normal({20, 3}, 2, at::kFloat)}},
      folder_ / "lora.pt");
  const auto config = lora::LoraConfig().r(3).lora_alpha(7).target_modules({"up"});
  EXPECT_EQ(damage_file("lora.pt", [&] { return lora::load(*model_, folder_ / "lora.pt", config); }).cut, 0);
}

TEST_F(DamagedAdapter, IsNotConverted) {
  const TempFolder source;
  for (const auto* name : {"adapter_config.json", "adapter_model.safetensors"}) {
    std::filesystem::copy(std::string(LORA_SOURCE_DIR "/tests/golden/mlp/plain/") + name, source / name);
  }
  const auto convert = [&] {
    std::filesystem::remove_all(folder_ / "out");
    try {
      lora::convert_adapter(source.path().string(), folder_ / "out", lora::AdapterFormat::kPeftPickle);
    } catch (...) {
      EXPECT_FALSE(std::filesystem::exists(folder_ / "out"));
      throw;
    }
  };
  EXPECT_EQ(damage(source / "adapter_model.safetensors", convert).cut, 0);
  damage(source / "adapter_config.json", convert);
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
