#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/io/checkpoint.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "harness/expect_same_bits.h"
#include "harness/message_of.h"
#include "harness/temp_folder.h"

namespace checkpoint_test {
namespace {

using harness::expect_same_bits;
using harness::message_of;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using Tensors = std::map<std::string, torch::Tensor>;

std::vector<std::string> names_in(const TempFolder& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// Tensors "a" to "e" of 40 bytes each, all of one value.
Tensors five(float value) {
  Tensors tensors;
  for (const char* name : {"a", "b", "c", "d", "e"}) tensors[name] = torch::full({10}, value);
  return tensors;
}

std::string error_of_loading(const std::string& path) {
  return message_of<lora::FormatError>([&] { lora::load_checkpoint(path); });
}

lora::SaveCheckpointOptions shards_of(int64_t bytes) { return lora::SaveCheckpointOptions().max_shard_bytes(bytes); }

TEST(Checkpoint, OneFileOrShards) {
  TempFolder folder;
  const auto directory = folder.path().string();
  lora::save_checkpoint(five(1), directory);
  EXPECT_THAT(names_in(folder), ElementsAre("model.safetensors"));
  expect_same_bits(lora::load_checkpoint(directory), five(1));

  lora::save_checkpoint(five(2), directory, shards_of(100));
  EXPECT_THAT(names_in(folder), ElementsAre("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                            "model-00003-of-00003.safetensors", "model.safetensors.index.json"));
  expect_same_bits(lora::load_checkpoint(directory), five(2));
  expect_same_bits(lora::load_checkpoint(folder / "model.safetensors.index.json"), five(2));
  EXPECT_EQ(read_bytes(folder / "model.safetensors.index.json"), R"({
  "metadata": {
    "total_size": 200
  },
  "weight_map": {
    "a": "model-00001-of-00003.safetensors",
    "b": "model-00001-of-00003.safetensors",
    "c": "model-00002-of-00003.safetensors",
    "d": "model-00002-of-00003.safetensors",
    "e": "model-00003-of-00003.safetensors"
  }
}
)");
  const auto metadata = lora::load_safetensors_with_metadata(folder / "model-00001-of-00003.safetensors").metadata;
  EXPECT_THAT(metadata, ElementsAre(Pair("format", "pt"), Pair("lora.crc32", HasSubstr("__metadata__"))));

  lora::save_checkpoint(five(3), directory, shards_of(1));
  EXPECT_EQ(names_in(folder).size(), 6u);
  expect_same_bits(lora::load_checkpoint(directory), five(3));

  write_bytes(folder / "config.json", "{}");
  lora::save_checkpoint(five(4), directory, shards_of(200));
  EXPECT_THAT(names_in(folder), ElementsAre("config.json", "model.safetensors"));
  expect_same_bits(lora::load_checkpoint(directory), five(4));

  lora::save_checkpoint({}, folder / "new/none");
  EXPECT_TRUE(lora::load_checkpoint(folder / "new/none").empty());
}

TEST(Checkpoint, ReadsEveryKindOfFile) {
  TempFolder folder;
  const auto directory = folder.path().string();
  const auto expect_of = [&](const std::string& name, float value) {
    SCOPED_TRACE(name);
    expect_same_bits(lora::load_checkpoint(folder / name), five(value));
    expect_same_bits(lora::load_checkpoint(directory), five(value));
  };
  // Each is preferred to those before it.
  const auto part = [](Tensors tensors, const std::vector<std::string>& names) {
    Tensors result;
    for (const auto& name : names) result[name] = tensors.at(name);
    return result;
  };
  lora::save_torch_pickle(part(five(1), {"a", "b"}), folder / "x.bin");
  lora::save_torch_pickle(part(five(1), {"c", "d", "e"}), folder / "y.bin");
  write_bytes(folder / "pytorch_model.bin.index.json",
              R"({"metadata":{},"weight_map":{"a":"x.bin","b":"x.bin","c":"y.bin","d":"y.bin","e":"y.bin"}})");
  expect_of("pytorch_model.bin.index.json", 1);
  lora::save_torch_pickle(five(2), folder / "pytorch_model.bin");
  expect_of("pytorch_model.bin", 2);
  lora::save_safetensors(five(3), folder / "x.safetensors");
  write_bytes(
      folder / "model.safetensors.index.json",
      R"({"weight_map":{"a":"x.safetensors","b":"x.safetensors","c":"x.safetensors","d":"x.safetensors","e":"x.safetensors"}})");
  expect_of("model.safetensors.index.json", 3);
  lora::save_safetensors(five(4), folder / "model.safetensors");
  expect_of("model.safetensors", 4);
  for (const char* name : {"m.pt", "m.pth"}) {
    lora::save_torch_pickle(five(5), folder / name);
    expect_same_bits(lora::load_checkpoint(folder / name), five(5));
  }
}

TEST(Checkpoint, RefusesWhatIsNoCheckpoint) {
  TempFolder folder;
  EXPECT_THAT(error_of_loading(folder.path().string()), HasSubstr("found none of model.safetensors"));
  EXPECT_THAT(error_of_loading(folder / "none.safetensors"), HasSubstr("cannot be opened"));
  EXPECT_THAT(error_of_loading(folder / "model.gguf"), HasSubstr("expected a folder or a name that ends in"));
}

TEST(Checkpoint, TheShardsHaveToBeWhatTheIndexSays) {
  TempFolder folder;
  const auto directory = folder.path().string();
  const auto index = folder / "model.safetensors.index.json";
  const auto error = [&](const std::string& text) {
    write_bytes(index, text);
    return error_of_loading(directory);
  };
  lora::save_safetensors({{"a", torch::ones({1})}, {"b", torch::ones({1})}}, folder / "1.safetensors");
  lora::save_safetensors({{"c", torch::ones({1})}}, folder / "2.safetensors");
  write_bytes(folder / "3.safetensors", "broken");
  EXPECT_EQ(error(R"({"weight_map":{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}})"), "");
  EXPECT_THAT(error(R"({"weight_map":{"a":"1.safetensors","c":"1.safetensors","d":"2.safetensors","e":"3.safetensors",)"
                    R"("f":"none.safetensors"}})"),
              AllOf(HasSubstr("6 problems"), HasSubstr("found no tensor c in 1.safetensors"),
                    HasSubstr("found the tensor b in 1.safetensors"), HasSubstr("found no tensor d in 2.safetensors"),
                    HasSubstr("found the tensor c in 2.safetensors"), HasSubstr("3.safetensors: has 6 bytes"),
                    HasSubstr("none.safetensors: cannot be opened")));
  EXPECT_THAT(
      error(R"({"weight_map":{"a":"../1.safetensors","b":"/etc/x.bin","c":"..","d":7,"e":"1.safetensors\u0000.bin"}})"),
      AllOf(HasSubstr("5 problems"), HasSubstr("found the shard '../1.safetensors'"),
            HasSubstr("found the shard '/etc/x.bin'"), HasSubstr("found the shard '..'"),
            HasSubstr("found number as the shard of d")));
  EXPECT_THAT(error(R"({"weight_map":{"a":"1.safetensors","a":"2.safetensors"}})"),
              HasSubstr("key 'a' is there twice"));
  EXPECT_THAT(error("{}"), HasSubstr("found no object weight_map"));
  EXPECT_THAT(error("[]"), HasSubstr("found no object weight_map"));
  EXPECT_THAT(error("{"), HasSubstr("is no valid JSON"));
  EXPECT_THAT(error(std::string(100'000, '[')), HasSubstr("nested more than 8 deep"));
}

TEST(Checkpoint, LeavesOutTiedTensors) {
  TempFolder folder;
  const auto directory = folder.path().string();
  auto tensors = five(1);
  tensors["b"] = tensors["a"];
  const auto tied = [](const std::string& name, const std::string& of) {
    return lora::SaveCheckpointOptions().tied({{name, of}});
  };
  lora::save_checkpoint(tensors, directory, tied("b", "a"));
  tensors.erase("b");
  expect_same_bits(lora::load_checkpoint(directory), tensors);
  tensors["c"] = torch::zeros({10});
  for (const auto& [options, message] : std::map<std::string, std::string>{
           {"c", "found different values in c and a"}, {"x", "found tied(x to a)"}, {"a", "found tied(a to a)"}}) {
    EXPECT_THAT(message_of([&, name = options] { lora::save_checkpoint(tensors, directory, tied(name, "a")); }),
                HasSubstr(message));
  }
  EXPECT_THAT(message_of([&] { lora::save_checkpoint(tensors, directory, shards_of(0)); }),
              HasSubstr("max_shard_bytes = 0"));
}

// ---- interrupted saves ----

TEST(Checkpoint, FailedSaveLeavesTheOldFiles) {
  TempFolder folder;
  const auto directory = folder.path().string();
  lora::save_checkpoint(five(1), directory, shards_of(100));
  const auto before = names_in(folder);
  auto tensors = five(2);
  tensors["e"] = torch::zeros({100'000});
  tensors["f"] = torch::eye(3).to_sparse();
  tensors["g"] = torch::Tensor();
  EXPECT_THAT(message_of([&] { lora::save_checkpoint(tensors, directory); }),
              AllOf(HasSubstr("'f' is sparse"), HasSubstr("'g' is undefined")));
  tensors.erase("f");
  tensors.erase("g");
  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  rlimit unlimited{};
  ::getrlimit(RLIMIT_FSIZE, &unlimited);
  const rlimit limit{100'000, unlimited.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  const auto error = message_of([&] { lora::save_checkpoint(tensors, directory, shards_of(100)); });
  ::setrlimit(RLIMIT_FSIZE, &unlimited);
  ::signal(SIGXFSZ, handler);
  EXPECT_THAT(error, HasSubstr("File too large"));
  EXPECT_EQ(names_in(folder), before);
  expect_same_bits(lora::load_checkpoint(directory), five(1));
}

TEST(Checkpoint, AKilledSaveNeverMixesTwoModels) {
  std::mt19937 random(20260107);
  for (int trial = 0; trial < 20; ++trial) {
    TempFolder folder;
    const auto directory = folder.path().string();
    // Every second trial the old and the new shards have the same names.
    lora::save_checkpoint(five(1), directory, shards_of(trial % 2 == 0 ? 100 : 50));
    const pid_t child = ::fork();
    if (child == 0) {
      for (float value = 2;; ++value)
        lora::save_checkpoint(five(value), directory, shards_of(trial % 4 < 2 ? 100 : 1000));
    }
    ASSERT_GT(child, 0);
    ::usleep(std::uniform_int_distribution<useconds_t>(0, 20'000)(random));
    ::kill(child, SIGKILL);
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    Tensors loaded;
    const auto error = message_of([&] { loaded = lora::load_checkpoint(directory); });
    if (!error.empty()) {
      EXPECT_THAT(error, HasSubstr("found none of model.safetensors")) << trial;
      continue;
    }
    expect_same_bits(loaded, five(loaded.at("a")[0].item<float>()));
  }
}

}  // namespace
}  // namespace checkpoint_test
