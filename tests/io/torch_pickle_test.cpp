#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/detail/crc32.h>
#include <lora/io/torch_pickle.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "harness/message_of.h"
#include "harness/temp_folder.h"
#include "harness/torch_archive.h"
#include "harness/values.h"

namespace torch_pickle_test {
namespace {

using harness::message_of;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Tensors = std::map<std::string, torch::Tensor>;

Tensors load(const std::string& bytes) {
  TempFolder folder;
  write_bytes(folder / "file.pt", bytes);
  return lora::load_torch_pickle(folder / "file.pt");
}

std::string error_of_loading(const std::string& bytes) {
  return message_of<lora::FormatError>([&] { load(bytes); });
}

const std::string kSixFloats = [] {
  std::string bytes;
  for (float value = 0; value < 6; ++value) bytes += raw(value);
  return bytes;
}();

/// A file with the given object and six floats, 0 to 5, as storage "0".
std::string file_of(const std::string& object, const Records& more = {}) {
  Records records = {{"data.pkl", pickle(object)}, {"byteorder", "little"}, {"data/0", kSixFloats}};
  records.insert(records.end(), more.begin(), more.end());
  return torch_archive(records);
}
/// A file with the tensor "a" alone.
std::string one(const std::string& tensor) { return file_of(dict(string("a") + tensor)); }

TEST(Crc32, IsThatOfZlib) {
  EXPECT_EQ(lora::detail::crc32(""), 0u);
  EXPECT_EQ(lora::detail::crc32("123456789"), 0xCBF43926u);  // the check value of the algorithm's catalogues
  EXPECT_EQ(lora::detail::crc32("The quick brown fox jumps over the lazy dog"), 0x414FA339u);
}

TEST(Crc32, MayComeInPieces) {
  const std::string text = "The quick brown fox jumps over the lazy dog";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    EXPECT_EQ(lora::detail::crc32(text.substr(cut), lora::detail::crc32(text.substr(0, cut))), 0x414FA339u) << cut;
  }
}

// ---- reading ----

TEST(TorchPickle, ReadsViewsOfOneStorage) {
  const auto six = storage("0", 6);
  const auto loaded = load(file_of(dict(string("whole") + rebuild(six, 0, {2, 3}, {3, 1}) +     //
                                        string("row") + rebuild(six, 3, {3}, {1}) +             //
                                        string("columns") + rebuild(six, 0, {3, 2}, {1, 3}) +   //
                                        string("repeated") + rebuild(six, 1, {4, 1}, {0, 7}) +  //
                                        string("scalar") + rebuild(six, 5, {}, {}) +            //
                                        string("empty") + rebuild(six, 6, {0, 3}, {3, 1}))));
  const auto whole = torch::arange(6, at::kFloat).reshape({2, 3});
  const Tensors expected = {{"whole", whole},
                            {"row", whole[1]},
                            {"columns", whole.t()},
                            {"repeated", torch::ones({4, 1})},
                            {"scalar", torch::tensor(5.0f)},
                            {"empty", torch::empty({0, 3})}};
  ASSERT_EQ(loaded.size(), expected.size());
  for (const auto& [name, tensor] : expected) EXPECT_TRUE(torch::equal(loaded.at(name), tensor)) << name;
  loaded.at("row").fill_(9);
  EXPECT_EQ(loaded.at("columns")[2][1].item<float>(), 9) << "they shared a storage when they were saved";
}

TEST(TorchPickle, JoinsTheKeysOfDictsInDicts) {
  const auto tensor = rebuild(storage("0", 6), 0, {6}, {1});
  const auto ordered = global("collections", "OrderedDict") + ")R(" + string("w") + tensor + "u}" +
                       string("_metadata") + integer(1) + "sb";
  const auto loaded = load(file_of(dict(string("a") + dict(string("b.c") + tensor) + string("d") + ordered)));
  std::vector<std::string> names;
  for (const auto& [name, unused] : loaded) names.push_back(name);
  EXPECT_THAT(names, ElementsAre("a.b.c", "d.w"));
}

TEST(TorchPickle, ReadsParametersAndDtypesWithoutAStorageClass) {
  const auto hooks = global("collections", "OrderedDict") + ")R";
  const auto parameter = global("torch._utils", "_rebuild_parameter") +
                         tuple(rebuild(storage("0", 6), 0, {6}, {1}) + "\x88" + hooks) + "R";
  const auto untyped = storage("0", 24, global("torch.storage", "UntypedStorage"));
  const auto wide =
      global("torch._utils", "_rebuild_tensor_v3") +
      tuple(untyped + integer(1) + integers({5}) + integers({1}) + "\x89" + hooks + global("torch", "uint32")) + "R";
  const auto loaded = load(file_of(dict(string("p") + parameter + string("u") + wide)));
  EXPECT_FALSE(loaded.at("p").requires_grad());
  EXPECT_EQ(loaded.at("u").scalar_type(), at::kUInt32);
  EXPECT_TRUE(torch::equal(loaded.at("u").view(at::kInt), loaded.at("p").view(at::kInt).slice(0, 1)));
}

TEST(TorchPickle, ReadsThePapersAdapter) {
  const std::string path = LORA_SOURCE_DIR "/../shared/data/roberta_mnli_lora/roberta_base_lora_mnli.bin";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no ../shared/data/roberta_mnli_lora";
  const auto loaded = lora::load_torch_pickle(path);
  EXPECT_EQ(loaded.size(), 52u);
  for (const char* layer : {"query", "value"}) {
    for (int i = 0; i < 12; ++i) {
      const auto prefix = "roberta.encoder.layer." + std::to_string(i) + ".attention.self." + layer;
      EXPECT_THAT(loaded.at(prefix + ".lora_A").sizes(), ElementsAre(8, 768));
      EXPECT_THAT(loaded.at(prefix + ".lora_B").sizes(), ElementsAre(768, 8));
    }
  }
  EXPECT_THAT(loaded.at("classifier.out_proj.weight").sizes(), ElementsAre(3, 768));
  for (const auto& [name, tensor] : loaded) EXPECT_TRUE(at::isfinite(tensor).all().item<bool>()) << name;
}

// ---- what is refused ----

TEST(TorchPickle, RunsNothingAndNamesWhatIsNoTensor) {
  const auto tensor = rebuild(storage("0", 6), 0, {6}, {1});
  const auto state = dict(string("epoch") + integer(3) + string("lr") + "G" + std::string(8, '\0') + string("none") +
                          "N" + string("text") + string("x") + string("list") + "](" + tensor + "e" + string("flag") +
                          "\x88" + string("dtype") + global("torch", "float32") + string("run") +
                          global("os", "system") + tuple(string("exit 1")) + "R" + string("storage") + storage("0", 6) +
                          string("set") + "\x8f(" + integer(1) + "\x90" + string("good") + tensor);
  const auto error = error_of_loading(file_of(dict(string("model") + state + integer(7) + tensor)));
  for (const char* part :
       {"found a builtins.int at model.epoch, expected tensors", "found a builtins.float at model.lr",
        "found None at model.none", "found a builtins.str at model.text", "found a builtins.list at model.list",
        "found a builtins.bool at model.flag", "found the name torch.float32 at model.dtype",
        "found a call of os.system at model.run", "found a torch.UntypedStorage at model.storage",
        "found a builtins.set at model.set", "found a builtins.int as a key in ''", "11 problems"}) {
    EXPECT_THAT(error, HasSubstr(part));
  }
  EXPECT_THAT(error_of_loading(file_of(tensor)),
              HasSubstr("found a call of torch._utils._rebuild_tensor_v2, expected a dict"));
}

TEST(TorchPickle, RefusesViewsThatLeaveTheirStorage) {
  const auto six = storage("0", 6);
  constexpr int64_t kHuge = int64_t{1} << 62;
  EXPECT_THAT(error_of_loading(one(rebuild(six, 1, {2, 3}, {3, 1}))),
              HasSubstr("tensor 'a': reaches byte 28 of its storage of 24"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 6, {}, {}))), HasSubstr("reaches byte 28"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, -1, {2}, {1}))), HasSubstr("negative"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 5, {2}, {-1}))), HasSubstr("negative"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 0, {-2}, {1}))), HasSubstr("negative"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 0, {kHuge, 8}, {0, 0}))), HasSubstr("overflow"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 0, {kHuge, 0}, {0, 0}))), HasSubstr("overflow"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 0, {5}, {kHuge}))), HasSubstr("overflow"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, kHuge, {1}, {1}))), HasSubstr("overflow"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, kHuge, {0}, {1}))), HasSubstr("overflow"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 0, {1000000, 1}, {0, 1}))), HasSubstr("repeats elements beyond"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 0, {2, 3}, {1}))), HasSubstr("not equal in number"));
  EXPECT_THAT(error_of_loading(one(rebuild(six, 0, std::vector<int64_t>(65, 1), std::vector<int64_t>(65, 1)))),
              HasSubstr("sizes or strides"));
}

TEST(TorchPickle, RefusesStoragesThatAreNotWhatTheySay) {
  const auto of = [](const std::string& storage) { return error_of_loading(one(rebuild(storage, 0, {1}, {1}))); };
  EXPECT_THAT(of(storage("0", 5)), HasSubstr("its storage has 24 bytes, expected 5 elements of 4"));
  EXPECT_THAT(of(storage("0", -6)), HasSubstr("expected -6 elements"));
  EXPECT_THAT(of(storage("0", int64_t{1} << 62)), HasSubstr("its storage has 24 bytes"));
  EXPECT_THAT(of(storage("1", 6)), HasSubstr("entry 'archive/data/1' is missing"));
  EXPECT_THAT(of(storage("0", 24, global("torch", "QInt8Storage"))), HasSubstr("found the storage torch.QInt8Storage"));
  EXPECT_THAT(of(storage("0", 24, global("torch", "UntypedStorage"))), HasSubstr("has no dtype"));
  EXPECT_THAT(of(storage("0", 24, global("torch", "BoolStorage"))), HasSubstr("neither 0 nor 1"));
  EXPECT_THAT(of("N"), HasSubstr("refers to no storage"));
  EXPECT_THAT(of(tuple(string("storage")) + "Q"), HasSubstr("refers to no storage"));
}

TEST(TorchPickle, RefusesPicklesThatAreBroken) {
  const auto of = [](const std::string& bytes) { return error_of_loading(torch_archive({{"data.pkl", bytes}})); };
  EXPECT_THAT(of(""), HasSubstr("the pickle ends within an operation"));
  EXPECT_THAT(of("\x80\x02}"), HasSubstr("ends within an operation (truncated?) at its byte"));
  EXPECT_THAT(of("\x80\x01}."), HasSubstr("has protocol 1"));
  EXPECT_THAT(of(pickle("}") + "."), HasSubstr("bytes behind its end"));
  EXPECT_THAT(of(pickle("")), HasSubstr("takes a value that is not there"));
  EXPECT_THAT(of(pickle("}s")), HasSubstr("takes a value that is not there"));
  EXPECT_THAT(of(pickle("u")), HasSubstr("closes a group that was not opened"));
  EXPECT_THAT(of(pickle("}(Nu")), HasSubstr("a key without a value"));
  EXPECT_THAT(of(pickle("h\x05")), HasSubstr("refers to a value that was not stored"));
  EXPECT_THAT(of(pickle("X\xff\xff\xff\xff")), HasSubstr("ends within an operation"));
  EXPECT_THAT(of(pickle(std::string("\x8d") + std::string(8, '\xff'))), HasSubstr("ends within an operation"));
  EXPECT_THAT(of(pickle("ctorch")), HasSubstr("ends within a name"));
  EXPECT_THAT(of(pickle("NN\x93")), HasSubstr("imports what is no name"));
  EXPECT_THAT(of(pickle("I1\n")), HasSubstr("has the operation 73"));
  EXPECT_THAT(of("\x80\x02" + std::string(9'000'000, '(') + "."), HasSubstr("more than 8388608 operations"));
}

TEST(TorchPickle, DictsThatHoldThemselvesEnd) {
  const auto tensor = rebuild(storage("0", 6), 0, {6}, {1});
  EXPECT_THAT(error_of_loading(file_of("}q" + raw('\0') + string("a") + "h" + raw('\0') + "s")),
              HasSubstr("nested too deeply"));
  // Each dict holds the one before it twice: 2^30 tensors.
  std::string doubled = dict(string("") + tensor);
  for (int i = 0; i < 30; ++i) {
    const auto key = "h" + raw(static_cast<char>(i));
    doubled += "q" + raw(static_cast<char>(i)) + "0" + dict(string("a") + key + string("b") + key);
  }
  EXPECT_THAT(error_of_loading(file_of(doubled)), HasSubstr("name too many tensors"));
}

TEST(TorchPickle, RefusesNamesThatAreThereTwice) {
  const auto tensor = rebuild(storage("0", 6), 0, {6}, {1});
  EXPECT_THAT(error_of_loading(file_of(dict(string("a.b") + tensor + string("a") + dict(string("b") + tensor)))),
              HasSubstr("tensor 'a.b': is there twice"));
  EXPECT_THAT(error_of_loading(file_of(dict(string("\xff") + tensor))), HasSubstr("the name is not UTF-8"));
}

/// The file with a change at the n-th place of `what`.
std::string patched(std::string bytes, const std::string& what, size_t place, size_t offset, const std::string& with) {
  size_t position = bytes.find(what);
  for (size_t i = 0; i < place; ++i) position = bytes.find(what, position + 1);
  return bytes.replace(position + offset, with.size(), with);
}

/// LibTorch's writer ends its files with the records of zip64, also where the old one is enough.
std::string without_zip64_end(const std::string& bytes) {
  const auto end64 = bytes.find("PK\x06\x06");
  return bytes.substr(0, end64) + bytes.substr(bytes.find("PK\x05\x06"));
}

TEST(TorchPickle, RefusesOtherFiles) {
  const auto good = one(rebuild(storage("0", 6), 0, {6}, {1}));
  const std::string local = "PK\x03\x04", directory = "PK\x01\x02", end = "PK\x05\x06", end64 = "PK\x06\x06";
  EXPECT_EQ(error_of_loading(good), "");
  EXPECT_THAT(error_of_loading(""), HasSubstr("does not begin as a zip file"));
  EXPECT_THAT(error_of_loading("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."),
              HasSubstr("PyTorch before 1.6"));
  EXPECT_THAT(error_of_loading(std::string(257, 'x') + "ustar"), HasSubstr("tar file"));
  EXPECT_THAT(error_of_loading(good.substr(0, good.size() - 1)), HasSubstr("without its end (truncated?)"));
  EXPECT_THAT(error_of_loading(file_of("}", {{"constants.pkl", "x"}})), HasSubstr("TorchScript module"));
  EXPECT_THAT(error_of_loading(torch_archive({{"other", "x"}})), HasSubstr("entry 'archive/data.pkl' is missing"));
  EXPECT_THAT(error_of_loading(torch_archive({{"data.pkl", pickle("}")}, {"byteorder", "big"}})),
              HasSubstr("found the byte order big, expected little"));

  // Place 0 in the directory is data.pkl, 2 is data/0.
  EXPECT_THAT(error_of_loading(patched(good, directory, 2, 10, raw<uint16_t>(8))), HasSubstr("data/0' is compressed"));
  EXPECT_THAT(error_of_loading(patched(good, directory, 2, 8, raw<uint16_t>(1))), HasSubstr("data/0' is encrypted"));
  EXPECT_THAT(error_of_loading(patched(good, directory, 2, 24, raw<uint32_t>(23))), HasSubstr("data/0' has two sizes"));
  EXPECT_THAT(error_of_loading(patched(good, directory, 2, 20, raw<uint32_t>(1 << 30))),
              HasSubstr("more than are left"));
  EXPECT_THAT(error_of_loading(patched(good, directory, 2, 42, raw<uint32_t>(1))),
              HasSubstr("has no header at byte 1"));
  EXPECT_THAT(error_of_loading(patched(good, directory, 2, 42, raw<uint32_t>(0))), HasSubstr("overlaps"));
  EXPECT_THAT(error_of_loading(patched(good, directory, 2, 42, raw<uint32_t>(0xFFFFFFFF))),
              HasSubstr("lacks its zip64 field"));
  EXPECT_THAT(error_of_loading(patched(good, directory, 2, 46, "A")), HasSubstr("has another name in its own header"));
  EXPECT_THAT(error_of_loading(patched(good, directory, 1, 0, "QK")), HasSubstr("has no directory entry at byte"));
  const auto short_end = without_zip64_end(good);
  EXPECT_EQ(error_of_loading(short_end), "");
  EXPECT_THAT(error_of_loading(patched(short_end, end, 0, 10, raw<uint16_t>(99))), HasSubstr("several disks"));
  EXPECT_THAT(error_of_loading(patched(short_end, end, 0, 8, raw<uint16_t>(99) + raw<uint16_t>(99))),
              HasSubstr("expected 99"));
  EXPECT_THAT(error_of_loading(patched(short_end, end, 0, 16, raw<uint32_t>(1 << 30))),
              HasSubstr("has its directory at byte"));
  EXPECT_THAT(error_of_loading(patched(good, end64, 0, 32, raw<uint64_t>(99))), HasSubstr("several disks"));
  EXPECT_THAT(error_of_loading(patched(good, end64, 0, 24, raw<uint64_t>(99) + raw<uint64_t>(99))),
              HasSubstr("expected 99"));
  EXPECT_THAT(error_of_loading(patched(good, end64, 0, 40, raw(~uint64_t{0}))), HasSubstr("has its directory at byte"));
  EXPECT_THAT(error_of_loading(patched(good, "PK\x06\x07", 0, 8, raw(~uint64_t{0}))), HasSubstr("no zip64 end record"));
  EXPECT_THAT(error_of_loading(patched(good, kSixFloats, 0, 7, "x")), HasSubstr("data/0' does not have the checksum"));
  EXPECT_THAT(error_of_loading(patched(good, "_rebuild_tensor_v2", 0, 0, "X")),
              HasSubstr("data.pkl' does not have the checksum"));
  const auto twice = torch_archive({{"data.pkl", pickle("}")}, {"data/0", "x"}, {"data/1", "y"}});
  EXPECT_THAT(error_of_loading(patched(patched(twice, "data/1", 0, 5, "0"), "data/1", 0, 5, "0")),
              HasSubstr("is there twice"));
}

TEST(TorchPickle, ReadsZip64AndFilesWithoutChecksums) {
  const auto good = one(rebuild(storage("0", 6), 0, {6}, {1}));
  const auto expected = torch::arange(6, at::kFloat);
  const auto directory = good.find("PK\x01\x02"), end = good.find("PK\x05\x06");
  // Every entry and the end record with its numbers in zip64 fields.
  std::string entries;
  uint64_t count = 0;
  for (size_t at = directory; good.compare(at, 4, "PK\x01\x02") == 0; ++count) {
    const auto number = [&](size_t offset, size_t size) {
      uint64_t value = 0;
      std::memcpy(&value, good.data() + at + offset, size);
      return value;
    };
    const auto name = number(28, 2), extra = number(30, 2);
    std::string entry = good.substr(at, 46 + name);
    const auto field =
        raw<uint16_t>(1) + raw<uint16_t>(24) + raw(number(24, 4)) + raw(number(20, 4)) + raw(number(42, 4));
    entry.replace(20, 8, 8, '\xff').replace(42, 4, 4, '\xff');
    entry.replace(30, 4, raw(static_cast<uint16_t>(field.size())) + raw<uint16_t>(0));
    entries += entry + field;
    at += 46 + name + extra;
  }
  const auto end64 = "PK\x06\x06" + raw<uint64_t>(44) + raw<uint32_t>(45 << 16) + raw<uint64_t>(0) + raw(count) +
                     raw(count) + raw<uint64_t>(entries.size()) + raw<uint64_t>(directory);
  const auto locator = "PK\x06\x07" + raw<uint32_t>(0) + raw<uint64_t>(directory + entries.size()) + raw<uint32_t>(1);
  const auto wide = good.substr(0, directory) + entries + end64 + locator + "PK\x05\x06" + raw<uint32_t>(0) +
                    std::string(12, '\xff') + raw<uint16_t>(0);
  EXPECT_TRUE(torch::equal(load(wide).at("a"), expected));
  // A comment may follow.
  EXPECT_TRUE(torch::equal(load(good.substr(0, end + 20) + raw<uint16_t>(5) + "PK\x05\x06.").at("a"), expected));

  std::string unchecked = patched(good, kSixFloats, 0, 0, raw(8.0f));
  for (size_t at = directory; at != std::string::npos; at = unchecked.find("PK\x01\x02", at + 4)) {
    unchecked.replace(at + 16, 4, 4, '\0');
  }
  EXPECT_EQ(load(unchecked).at("a")[0].item<float>(), 8);
}

// ---- writing ----

TEST(TorchPickle, RoundTripIsBitwise) {
  TempFolder folder;
  const std::string path = folder / "file.pt";
  const auto shared = torch::randn({3, 5});
  Tensors tensors = {{"tied.a", shared},
                     {"tied.b", shared},
                     {"view", shared.t()},
                     {"scalar", torch::tensor(2.5)},
                     {"empty", torch::empty({0, 4})},
                     {"conj", torch::randn({3}, at::kComplexFloat).conj()},
                     {"", torch::ones({1})}};
  for (const auto type :
       {at::kDouble, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort, at::kChar, at::kByte, at::kBool,
        at::kUInt16, at::kUInt32, at::kUInt64, at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kComplexDouble}) {
    tensors[c10::toString(type)] = torch::randint(0, 2, {2, 3}).to(type);
  }
  lora::save_torch_pickle(tensors, path);
  const auto loaded = lora::load_torch_pickle(path);
  ASSERT_EQ(loaded.size(), tensors.size());
  for (const auto& [name, expected] : tensors) {
    const auto& found = loaded.at(name);
    ASSERT_EQ(found.scalar_type(), expected.scalar_type()) << name;
    ASSERT_EQ(found.sizes(), expected.sizes()) << name;
    EXPECT_EQ(harness::bytes_of(found), harness::bytes_of(expected.resolve_conj())) << name;
  }
  EXPECT_EQ(loaded.at("tied.a").const_data_ptr(), loaded.at("tied.b").const_data_ptr());
  EXPECT_NE(loaded.at("tied.a").const_data_ptr(), loaded.at("view").const_data_ptr());
  const auto before = read_bytes(path);
  loaded.at("tied.a").fill_(1);
  EXPECT_EQ(read_bytes(path), before) << "the mapping is private";
}

TEST(TorchPickle, RefusesWhatItCannotWrite) {
  TempFolder folder;
  const std::string path = folder / "file.pt";
  lora::save_torch_pickle({{"old", torch::ones({1})}}, path);
  const auto before = read_bytes(path);
  try {
    lora::save_torch_pickle({{"sparse", torch::eye(3).to_sparse()},
                             {"undefined", torch::Tensor()},
                             {"\xff", torch::ones({1})},
                             {"good", torch::ones({1})}},
                            path);
    ADD_FAILURE() << "expected an error";
  } catch (const lora::FormatError& error) {
    EXPECT_THAT(error.what_without_backtrace(),
                ::testing::AllOf(HasSubstr("3 problems"), HasSubstr("'sparse' is sparse"),
                                 HasSubstr("'undefined' is undefined")));
  }
  EXPECT_EQ(read_bytes(path), before);
  EXPECT_THROW(lora::save_torch_pickle({}, folder / "none/file.pt"), lora::FormatError);
}

}  // namespace
}  // namespace torch_pickle_test
