// Whatever writes files leaves the old ones as they were where the system refuses.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <sys/stat.h>

#include <filesystem>
#include <functional>
#include <map>
#include <ostream>
#include <string>

#include "harness/system_limits.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace writers_test {
namespace {

struct Writer {
  std::string name;
  std::function<void(double value, const std::string& folder)> write;
};

void PrintTo(const Writer& writer, std::ostream* out) { *out << writer.name; }

std::map<std::string, at::Tensor> tensors(double value) {
  return {{"a", at::full({500}, value)}, {"b", at::full({500}, value)}};
}

lora::Adapters adapters(Mlp& model, double value) {
  auto result = lora::inject(*model, lora::LoraConfig().r(8).target_modules({"up", "down"}));
  const at::NoGradGuard no_grad;
  for (const auto& parameter : result.parameters()) parameter.fill_(value);
  return result;
}

const Writer kWriters[] = {
    {"Safetensors", [](double value, const auto& folder) { lora::save_safetensors(tensors(value), folder + "/file"); }},
    {"TorchPickle",
     [](double value, const auto& folder) { lora::save_torch_pickle(tensors(value), folder + "/file"); }},
    {"Checkpoint",
     [](double value, const auto& folder) {
       lora::save_checkpoint(tensors(value), folder, lora::SaveCheckpointOptions().max_shard_bytes(2100));
     }},
    {"PeftDirectory",
     [](double value, const auto& folder) {
       Mlp model;
       adapters(model, value).save(folder);
     }},
    {"Conversion",
     [](double value, const auto& folder) {
       lora::convert_adapter(folder + "/../source" + std::to_string(value), folder, lora::AdapterFormat::kPeftPickle);
     }},
    {"TrainingState", [](double value, const auto& folder) {
       Mlp model;
       const auto trained = adapters(model, value);
       lora::TrainingState().adapters(trained).save(folder + "/file");
     }}};

class EveryWriter : public ::testing::TestWithParam<Writer> {
 protected:
  EveryWriter() {
    for (const double value : {1.0, 2.0}) {
      Mlp model;
      adapters(model, value).save(parent_ / ("source" + std::to_string(value)));
    }
    std::filesystem::create_directory(folder_);
    GetParam().write(1, folder_);
    std::filesystem::permissions(parent_.path(), std::filesystem::perms::others_all,
                                 std::filesystem::perm_options::add);
  }

  std::map<std::string, std::string> files() const {
    std::map<std::string, std::string> bytes;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      bytes[entry.path().filename().string()] = read_bytes(entry.path().string());
    }
    return bytes;
  }
  void expect_refused() {
    try {
      GetParam().write(2, folder_);
      ADD_FAILURE() << "it was written";
    } catch (const lora::SystemError& error) {
      EXPECT_THAT(error.path(), ::testing::StartsWith(folder_));
    }
  }

  TempFolder parent_;
  const std::string folder_ = parent_ / "written";
};

TEST_P(EveryWriter, LeavesTheOldFilesInAReadOnlyFolder) {
  const auto before = files();
  ASSERT_EQ(::chmod(folder_.c_str(), 0555), 0);
  {
    const harness::NotRoot guard;
    expect_refused();
  }
  ASSERT_EQ(::chmod(folder_.c_str(), 0755), 0);
  EXPECT_EQ(files(), before);
}

TEST_P(EveryWriter, LeavesTheOldFilesOnAFullDisk) {
  const auto before = files();
  {
    const harness::FileSizeLimit limit(1000);
    expect_refused();
  }
  EXPECT_EQ(files(), before);
  GetParam().write(2, folder_);
  EXPECT_NE(files(), before);
}

INSTANTIATE_TEST_SUITE_P(Files, EveryWriter, ::testing::ValuesIn(kWriters),
                         [](const auto& writer) { return writer.param.name; });

}  // namespace
}  // namespace writers_test
