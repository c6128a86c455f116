#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/io/safetensors.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "harness/memory.h"
#include "harness/message_of.h"
#include "harness/temp_folder.h"

namespace safetensors_test {
namespace {

using harness::message_of;
using ::testing::HasSubstr;
using Tensors = std::map<std::string, torch::Tensor>;

std::string file_bytes(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + header + data;
}

std::string error_of_loading(const std::string& path) {
  return message_of<lora::FormatError>([&] { lora::load_safetensors(path); });
}

std::string error_of_saving(const Tensors& tensors, const std::string& path) {
  return message_of<lora::FormatError>([&] { lora::save_safetensors(tensors, path); });
}

// ---- round trips ----

std::string raw_bytes(const torch::Tensor& values) {
  const torch::Tensor data = values.contiguous();
  return std::string(static_cast<const char*>(data.const_data_ptr()), data.nbytes());
}

class SafetensorsDtype : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(SafetensorsDtype, RoundTripIsBitwise) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  torch::Tensor values = torch::randn({3, 5}) * 50;
  if (!c10::isSignedType(GetParam())) values = values.abs();
  values = values.to(GetParam());
  lora::save_safetensors({{"a", values}, {"scalar", values[1][2]}, {"empty", values.slice(0, 0, 0)}}, path);
  const Tensors loaded = lora::load_safetensors(path);
  ASSERT_EQ(loaded.size(), 3u);
  for (const auto& [name, expected] :
       Tensors{{"a", values}, {"scalar", values[1][2]}, {"empty", values.slice(0, 0, 0)}}) {
    const torch::Tensor& found = loaded.at(name);
    EXPECT_EQ(found.scalar_type(), GetParam());
    EXPECT_EQ(found.sizes(), expected.sizes());
    EXPECT_EQ(raw_bytes(found), raw_bytes(expected));
  }
}

INSTANTIATE_TEST_SUITE_P(All, SafetensorsDtype,
                         ::testing::Values(at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                                           at::kShort, at::kChar, at::kByte, at::kBool, at::kUInt16, at::kUInt32,
                                           at::kUInt64, at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kComplexFloat),
                         [](const auto& dtype) { return std::string(c10::toString(dtype.param)); });

TEST(Safetensors, WritesTheBytesOfTheFormat) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  lora::save_safetensors({{"z", torch::ones({2}, at::kDouble)},
                          {"b", torch::tensor({1, 2}, at::kByte)},
                          {"a", torch::zeros({})},
                          {"\"é\n", torch::zeros({0, 3})}},
                         path);
  std::string header = R"({"__metadata__":{"format":"pt"},"z":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},)"
                       R"("\"é\n":{"dtype":"F32","shape":[0,3],"data_offsets":[16,16]},)"
                       R"("a":{"dtype":"F32","shape":[],"data_offsets":[16,20]},)"
                       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[20,22]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string one("\0\0\0\0\0\0\xf0\x3f", 8);
  EXPECT_EQ(read_bytes(path), file_bytes(header, one + one + std::string(4, '\0') + "\x01\x02"));
}

TEST(Safetensors, StridesSharingAndGradientsDoNotMatter) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  const torch::Tensor base = torch::randn({4, 6}).requires_grad_();
  const Tensors tensors = {{"base", base},
                           {"row", base[2]},
                           {"transposed", base.t()},
                           {"strided", base.slice(1, 0, 6, 2)},
                           {"expanded", base.slice(0, 0, 1).expand({3, 6})},
                           {"conjugate", torch::randn({3}, at::kComplexFloat).conj()}};
  lora::save_safetensors(tensors, path);
  for (const auto& [name, found] : lora::load_safetensors(path)) {
    EXPECT_TRUE(torch::equal(found, tensors.at(name))) << name;
    EXPECT_TRUE(found.is_contiguous()) << name;
    EXPECT_FALSE(found.requires_grad()) << name;
  }
}

TEST(Safetensors, MetadataComesBack) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"κλειδί", "a \"quoted\"\tvalue"}, {"", ""}};
  lora::save_safetensors({{"a", torch::ones({1})}}, path, metadata);
  EXPECT_EQ(lora::load_safetensors_with_metadata(path).metadata, metadata);
  lora::save_safetensors({}, path, {});
  EXPECT_TRUE(lora::load_safetensors_with_metadata(path).metadata.empty());
  for (const auto& [name, text] : std::map<std::string, std::string>{{"\xff", "a"}, {"a", "\xff"}}) {
    EXPECT_THROW(lora::save_safetensors({{"a", torch::ones({1})}}, path, {{name, text}}), lora::FormatError);
  }
  EXPECT_TRUE(lora::load_safetensors_with_metadata(path).metadata.empty()) << "the old file";
  EXPECT_EQ(read_bytes(path), file_bytes("{}      ", ""));
}

// ---- the mapping ----

TEST(Safetensors, WritingIntoALoadedTensorLeavesTheFile) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  lora::save_safetensors({{"a", torch::ones({1000})}}, path);
  const std::string before = read_bytes(path);
  torch::Tensor loaded = lora::load_safetensors(path).at("a");
  loaded.fill_(7);
  EXPECT_EQ(read_bytes(path), before);
  EXPECT_EQ(lora::load_safetensors(path).at("a").sum().item<float>(), 1000);
  EXPECT_EQ(loaded.sum().item<float>(), 7000);
}

TEST(Safetensors, LoadedTensorsOutliveTheirFile) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  lora::save_safetensors({{"a", torch::ones({100'000})}, {"b", torch::ones({5})}}, path);
  torch::Tensor old = lora::load_safetensors(path).at("a");
  lora::save_safetensors({{"a", old + 1}}, path);  // reads the file that it replaces
  EXPECT_EQ(lora::load_safetensors(path).at("a").sum().item<float>(), 200'000);
  EXPECT_EQ(old.sum().item<float>(), 100'000);
  std::filesystem::remove(path);
  EXPECT_EQ(old.mean().item<float>(), 1);
}

TEST(Safetensors, MisalignedDataIsRight) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  const torch::Tensor values = torch::arange(4, at::kDouble);
  const std::string data = raw_bytes(values);
  // Eight positions of the data relative to a double's alignment, by blanks behind the header and a tensor of bytes
  // before it.
  for (size_t shift = 0; shift < 8; ++shift) {
    const std::string header = R"({"s":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                               R"("v":{"dtype":"F64","shape":[4],"data_offsets":[3,35]}})" +
                               std::string(shift, ' ');
    write_bytes(path, file_bytes(header, "\x01\x02\x03" + data));
    const Tensors loaded = lora::load_safetensors(path);
    EXPECT_TRUE(torch::equal(loaded.at("v"), values)) << shift;
    EXPECT_TRUE(torch::equal(loaded.at("s"), torch::tensor({1, 2, 3}, at::kByte))) << shift;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(loaded.at("v").const_data_ptr()) % alignof(double), 0u) << shift;
  }
}

// ---- damaged files ----

struct Damage {
  std::string name;
  std::string bytes;
  std::vector<std::string> says;  // every one of them in the one error
};

/// A file of four bytes of data with the given header.
std::string four(const std::string& header) { return file_bytes(header, std::string(4, '\0')); }
std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}
/// The tensor "a" alone.
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return four(R"({"a":)" + tensor(dtype, shape, offsets) + "}");
}
std::string two(const std::string& a_offsets, const std::string& b_offsets, const std::string& shape = "[2]") {
  return four(R"({"a":)" + tensor("U8", shape, a_offsets) + R"(,"b":)" + tensor("U8", shape, b_offsets) + "}");
}

std::vector<Damage> damages() {
  const std::string huge_length = std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8);
  return {
      {"Empty", "", {"has 0 bytes"}},
      {"ShorterThanTheLength", "\x02\0\0", {"truncated?"}},
      {"LengthAboveTheLimit", huge_length + "{}", {"above the limit"}},
      {"LengthBeyondTheFile", four("{}").substr(0, 9), {"header length 2 is more than the 1 bytes"}},
      {"EmptyHeader", file_bytes("", ""), {"does not begin with '{'"}},
      {"Pickle", std::string("\x80\x02}q\x00.\0\0\0\0\0\0\0\0", 14), {"no safetensors file?"}},
      {"List", four("[1]"), {"does not begin with '{'"}},
      {"ByteOrderMark", four("\xef\xbb\xbf{}"), {"does not begin with '{'"}},
      {"BrokenJson", four(R"({"a":)"), {"no valid JSON"}},
      {"TwoValues", four("{}{}"), {"no valid JSON"}},
      {"ZeroByte", four(std::string("{}\0 ", 4)), {"no valid JSON"}},
      {"BadUtf8", four("{\"\xff\":1}"), {"no valid JSON"}},
      {"DeepNesting", four(R"({"a":)" + std::string(100'000, '[')), {"nested more than 3 deep"}},
      {"DuplicateTensor",
       four(R"({"a":)" + tensor("F32", "[1]", "[0,4]") + R"(,"a":)" + tensor("I32", "[1]", "[0,4]") + "}"),
       {"key 'a' is there twice"}},
      {"DuplicateField",
       four(R"({"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}})"),
       {"key 'dtype' is there twice"}},
      {"TensorNoObject", four(R"({"a":3})"), {"tensor 'a': is no object"}},
      {"UnknownField",
       four(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"scale":2}})"),
       {"unknown field 'scale'"}},
      {"UnknownDtype", one("F4", "[1]", "[0,4]"), {"tensor 'a': unknown dtype \"F4\""}},
      {"DtypeMissing", four(R"({"a":{"shape":[1],"data_offsets":[0,4]}})"), {"dtype is missing"}},
      {"DtypeNoString",
       four(R"({"a":{"dtype":32,"shape":[1],"data_offsets":[0,4]}})"),
       {"dtype is missing or no string"}},
      {"ShapeMissing", four(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})"), {"shape is missing"}},
      {"ShapeNegative", one("F32", "[-1]", "[0,4]"), {"shape holds -1"}},
      {"ShapeFraction", one("F32", "[1.0]", "[0,4]"), {"shape holds 1.0"}},
      {"ShapeTooLarge", one("F32", "[9223372036854775808]", "[0,4]"), {"shape holds 9223372036854775808"}},
      {"ShapeTooLargeForAnyInteger", one("F32", "[99999999999999999999]", "[0,4]"), {"expected a size"}},
      {"ShapeOverflows", one("F32", "[4294967296,4294967296]", "[0,4]"), {"shape overflows"}},
      {"ShapeOverflowsToTheSpan", one("U8", "[4611686018427387905,4]", "[0,4]"), {"shape overflows"}},
      {"EmptyShapeOverflows", one("F32", "[0,4611686018427387904,8]", "[0,0]"), {"shape overflows"}},
      {"TooManyDimensions",
       one(
           "U8",
           "[4" +
               [] {
                 std::string ones;
                 for (int i = 0; i < 64; ++i) ones += ",1";
                 return ones;
               }() +
               "]",
           "[0,4]"),
       {"has 65 dimensions"}},
      {"OffsetsMissing", four(R"({"a":{"dtype":"F32","shape":[1]}})"), {"data_offsets are missing"}},
      {"OffsetsThree", one("F32", "[1]", "[0,2,4]"), {"data_offsets are missing or no two"}},
      {"OffsetsNegative", one("F32", "[1]", "[-4,0]"), {"no two positions"}},
      {"OffsetsBackwards", one("F32", "[1]", "[4,0]"), {"not within the 4 bytes"}},
      {"OffsetsPastTheEnd", one("F32", "[2]", "[0,8]"), {"[0,8] are not within the 4 bytes of data (truncated?)"}},
      {"OffsetsHuge", one("F32", "[1]", "[18446744073709551612,18446744073709551615]"), {"not within"}},
      {"SpanTooLong", one("U8", "[3]", "[0,4]"), {"span 4 bytes, expected 3"}},
      {"SpanTooShort", one("F64", "[1]", "[0,4]"), {"span 4 bytes, expected 8"}},
      {"Overlap", two("[0,2]", "[1,3]"), {"tensor 'b': overlaps", "1 bytes after the last tensor"}},
      {"SameBytesTwice", two("[0,4]", "[0,4]", "[4]"), {"tensor 'b': overlaps"}},
      {"HoleBetween", two("[0,1]", "[3,4]", "[1]"), {"tensor 'b': 2 bytes before it"}},
      {"HoleAtTheBeginning", one("U8", "[2]", "[2,4]"), {"2 bytes before it"}},
      {"TrailingBytes", one("U8", "[2]", "[0,2]"), {"2 bytes after the last tensor"}},
      {"DataWithoutTensors", four("{}"), {"4 bytes after the last tensor"}},
      {"BoolThatIsTwo",
       file_bytes(R"({"a":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}})", "\x01\x02"),
       {"neither 0 nor 1"}},
      {"MetadataNoObject", file_bytes(R"({"__metadata__":[]})", ""), {"__metadata__ is no object"}},
      {"MetadataNoString", file_bytes(R"({"__metadata__":{"k":1}})", ""), {"__metadata__ 'k' is no string"}},
      {"EverythingAtOnce",
       four(R"({"__metadata__":{"k":null},"x":1,"y":)" + tensor("F99", "[-1]", "[0,9]") + R"(,"z":)" +
            tensor("F64", "[1]", "[0,4]") + "}"),
       {"6 problems", "'k' is no string", "'x': is no object", "'y': unknown dtype", "'y': shape holds -1",
        "'y': data_offsets", "'z': data_offsets span 4"}},
  };
}

TEST(Safetensors, DamagedFilesAreNamedProblems) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  for (const auto& damage : damages()) {
    SCOPED_TRACE(damage.name);
    write_bytes(path, damage.bytes);
    const std::string error = error_of_loading(path);
    EXPECT_THAT(error, HasSubstr(path));
    for (const auto& part : damage.says) EXPECT_THAT(error, HasSubstr(part));
    EXPECT_LT(error.size(), 2000u);
  }
}

TEST(Safetensors, PathsThatAreNoFiles) {
  TempFolder folder;
  EXPECT_THAT(error_of_loading(folder / "none"), HasSubstr("No such file or directory"));
  EXPECT_THAT(error_of_loading(folder.path().string()), HasSubstr("is no regular file"));
  EXPECT_THAT(error_of_loading("/dev/null"), HasSubstr("is no regular file"));
}

/// Reads what may be read of a file that is damaged somehow: every byte of every tensor, or an error.
void load_and_touch(const std::string& path) {
  try {
    for (const auto& [name, loaded] : lora::load_safetensors(path)) {
      const auto* bytes = static_cast<const unsigned char*>(loaded.const_data_ptr());
      volatile unsigned sum = 0;
      for (size_t i = 0; i < loaded.nbytes(); ++i) sum = sum + bytes[i];
    }
  } catch (const lora::FormatError&) {
  }
}

TEST(Safetensors, RandomDamageNeverCrashesNorAllocates) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  lora::save_safetensors({{"layer.0.weight", torch::randn({7, 5})},
                          {"layer.0.bias", torch::randn({5}, at::kDouble)},
                          {"mask", torch::ones({9}, at::kBool)},
                          {"none", torch::zeros({0, 3})}},
                         path, {{"format", "pt"}});
  const std::string intact = read_bytes(path);
  uint64_t header_size = 0;
  std::memcpy(&header_size, intact.data(), sizeof header_size);

  std::mt19937 random(20260105);
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  const harness::LargestAllocation allocations;
  for (int trial = 0; trial < 2000; ++trial) {
    std::string damaged = intact;
    switch (trial % 4) {
      case 0:
        damaged.resize(below(damaged.size()));
        break;
      case 1:  // bits of the length or the header
        for (size_t i = 0; i <= below(4); ++i) damaged[below(8 + header_size)] ^= static_cast<char>(1u << below(8));
        break;
      case 2:  // a byte that JSON knows in the place of another: more of these come through the parser
        damaged[8 + below(header_size)] = "0123456789,:[]{}\"-.eE "[below(22)];
        break;
      default:  // a digit in the place of another: most of these are valid JSON
        for (size_t i = 0; i < 3; ++i) {
          const size_t position = 8 + below(header_size);
          if (std::isdigit(static_cast<unsigned char>(damaged[position]))) {
            damaged[position] = static_cast<char>('0' + below(10));
          }
        }
    }
    write_bytes(path, damaged);
    load_and_touch(path);
  }
  EXPECT_LE(allocations.bytes(), static_cast<int64_t>(intact.size()));
}

// ---- what cannot be written ----

TEST(Safetensors, RefusesWhatTheFormatCannotHold) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  lora::save_safetensors({{"old", torch::ones({1})}}, path);
  const std::string before = read_bytes(path);
  const std::string error =
      error_of_saving({{"undefined", torch::Tensor()},
                       {"sparse", torch::eye(3).to_sparse()},
                       {"quantized", torch::quantize_per_tensor(torch::ones({2}), 0.1, 0, at::kQInt8)},
                       {"meta", torch::ones({2}, at::TensorOptions().device(at::kMeta))},
                       {"complex", torch::ones({2}, at::kComplexDouble)},
                       {"__metadata__", torch::ones({2})},
                       {"bad \xff", torch::ones({2})},
                       {"good", torch::ones({2})}},
                      path);
  for (const char* part : {"7 problems", "'undefined' is undefined", "'sparse' is sparse", "'quantized' is quantized",
                           "'meta' holds no data", "'complex' the format has no dtype for ComplexDouble",
                           "'__metadata__' the name", "' the name is not UTF-8"}) {
    EXPECT_THAT(error, HasSubstr(part));
  }
  EXPECT_THAT(error, ::testing::Not(HasSubstr("'good'")));
  EXPECT_EQ(read_bytes(path), before);
}

TEST(Safetensors, FailedSaveLeavesTheOldFile) {
  TempFolder folder;
  const std::string path = folder / "file.safetensors";
  lora::save_safetensors({{"old", torch::ones({1})}}, path);
  const std::string before = read_bytes(path);

  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  rlimit unlimited{};
  ::getrlimit(RLIMIT_FSIZE, &unlimited);
  const rlimit limit{100'000, unlimited.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  const std::string error = error_of_saving({{"new", torch::ones({100'000})}}, path);
  ::setrlimit(RLIMIT_FSIZE, &unlimited);
  ::signal(SIGXFSZ, handler);

  EXPECT_THAT(error, ::testing::AllOf(HasSubstr(path), HasSubstr("File too large")));
  EXPECT_EQ(read_bytes(path), before);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

}  // namespace
}  // namespace safetensors_test
