// The table of docs/methods.md, made from the code: what each method does with each kind of layer. With LORA_WRITE_DOCS
// set the test writes it into the page.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "harness/methods.h"
#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace methods_table_test {
namespace {

const std::string kPage = LORA_SOURCE_DIR "/docs/methods.md";
const std::string kBegin = "<!-- begin methods -->\n", kEnd = "<!-- end methods -->";

struct Column {
  std::string title;
  std::string host;  // of harness::host_cases()
};

const std::vector<Column>& columns() {
  static const std::vector<Column> all{
      {"Linear", "MlpOf3dInput"},        {"parts of one", "FusedParts"}, {"attention's `in_proj`", "AttentionCross"},
      {"Embedding", "Embedding"},        {"convolution", "Conv2d"},      {"with groups", "Conv2dGroups"},
      {"transposed", "ConvTranspose2d"}, {"Bilinear", "Bilinear"}};
  return all;
}

std::vector<harness::MethodCase> methods() {
  auto lora = harness::method_case("LoRA", lora::LoraConfig().r(2));
  lora.parameters = [](const harness::WeightSizes& w) { return 2 * (w.in + w.out); };
  std::vector<harness::MethodCase> all{lora};
  for (auto method : harness::method_cases()) {
    // A rank that every layer's sizes allow, where the method asks for one that divides them.
    if (method.name == "MiSSBat") {
      method = harness::method_case(method.name, lora::MissConfig().r(1).init_weights(lora::MissForm::kBat));
    } else if (method.name == "MiSSMini") {
      method = harness::method_case(method.name, lora::MissConfig().r(2).mini_r(1).init_weights(lora::MissForm::kMini));
    }
    all.push_back(std::move(method));
  }
  return all;
}

std::string cell(const harness::MethodCase& method, const std::string& name) {
  for (const auto& host : harness::host_cases()) {
    if (host.name != name) continue;
    const auto model = host.make();
    model.module->to(at::kDouble);
    try {
      const auto adapters = method.inject(*model.module, host.targets);
      harness::fill(adapters);
      model.forward(harness::normal(host.input, 3)).sum().backward();
      return adapters.fallbacks().empty() ? "factored" : "dense";
    } catch (const c10::ValueError&) {
      return "refused";
    }
  }
  ADD_FAILURE() << "no host " << name;
  return "";
}

std::string table() {
  std::ostringstream out;
  out << "| method |";
  for (const auto& column : columns()) out << " " << column.title << " |";
  out << "\n|---|";
  for (size_t i = 0; i < columns().size(); ++i) out << "---|";
  out << "\n";
  for (const auto& method : methods()) {
    out << "| " << method.name << " |";
    for (const auto& column : columns()) out << " " << cell(method, column.host) << " |";
    out << "\n";
  }
  return out.str();
}

TEST(MethodsTable, IsWhatTheCodeDoes) {
  const auto page = read_bytes(kPage);
  const auto begin = page.find(kBegin), end = page.find(kEnd);
  ASSERT_NE(begin, std::string::npos);
  ASSERT_NE(end, std::string::npos);
  const auto from = begin + kBegin.size();
  const auto expected = table();
  if (std::getenv("LORA_WRITE_DOCS") != nullptr) {
    write_bytes(kPage, page.substr(0, from) + expected + page.substr(end));
    return;
  }
  EXPECT_EQ(page.substr(from, end - from), expected) << "run this test with LORA_WRITE_DOCS=1";
}

}  // namespace
}  // namespace methods_table_test
