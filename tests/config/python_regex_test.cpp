// Regular expressions of Python's dialect: the same meaning or an error.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/detail/python_regex.h>

#include <optional>
#include <string>

namespace python_regex_test {
namespace {

using lora::detail::PythonRegex;
using lora::detail::PythonSubstitution;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

struct Row {
  std::string pattern, text;
  bool matches;  // Python 3.11: re.fullmatch(pattern, text) is not None
};

TEST(PythonRegex, MatchesAsPythonDoes) {
  for (const auto& row : {Row{"q_proj", "q_proj", true},
                          {"q_proj", "x.q_proj", false},
                          {"a|ab", "ab", true},
                          {R"(.*\.(q|v)_proj)", "layers.0.v_proj", true},
                          {R"(.*\.(?:q|v)_proj)", "layers.0.k_proj", false},
                          {R"(h\.\d+\.mlp)", "h.12.mlp", true},
                          {R"(h\.[^1]\.mlp)", "h.1.mlp", false},
                          {R"(h\.(?!1\.)\d+\.mlp)", "h.1.mlp", false},
                          {R"(h\.(?!1\.)\d+\.mlp)", "h.11.mlp", true},
                          {R"((?=h).*)", "h.1", true},
                          {"a{2}", "aa", true},
                          {"a{,2}", "aa", true},
                          {"a{,2}", "aaa", false},
                          {"a{1,}?b", "aaab", true},
                          {R"(\w+\b\.x)", "ab.x", true},
                          {R"([\w.]+)", "a.b_c", true},
                          {R"(a\{)", "a{", true},
                          {R"(x[{,]y)", "x,y", true},
                          {R"(x[{,]y)", "x0y", false},
                          {R"(a\\{,2})", R"(a\\)", true},
                          {"^a$", "a", true},
                          {"", "", true},
                          {"", "a", false}}) {
    EXPECT_EQ(PythonRegex(row.pattern).fullmatch(row.text), row.matches) << row.pattern << " on " << row.text;
  }
}

TEST(PythonRegex, RefusesWhatItWouldReadDifferently) {
  for (const std::string pattern :
       {R"((?<=a)b)", R"((?<!a)b)", "(?P<n>a)",    "(?i)a", "(?>a)", "a*+",  "a++",    "a{2}+", R"(\Aa)", R"(a\Z)",
        R"((a)\1)",   R"(\0)",      "[[:alpha:]]", "[]a]",  "a{",    "a{x}", R"(\ua)", "a\\",   R"(\pL)", R"([\b])"}) {
    EXPECT_THAT([&] { PythonRegex{pattern}; }, ThrowsMessage<c10::ValueError>(HasSubstr("[lora::regex] found ")))
        << pattern;
  }
}

TEST(PythonRegex, RefusesCountsThatStdRegexReadsAsOthers) {
  for (const std::string pattern :
       {"a{4294967297}", "a{1,4294967297}", "a{,10000}", "[a-z]{1,11111111111111111111}$"}) {
    EXPECT_THAT([&] { PythonRegex{pattern}; }, ThrowsMessage<c10::ValueError>(HasSubstr("more than 9999 times")))
        << pattern;
  }
  EXPECT_TRUE(PythonRegex("a{0003}").fullmatch("aaa"));
}

#if defined(__GLIBCXX__)
TEST(PythonRegex, MatchesInBoundedTime) {
  // Trying one way after another to the end would take longer than anyone waits.
  const std::string path = "base.model.layers.0.self_attn.q_proj";
  for (const std::string pattern : {"(.*.*)*x", "(.*)*(.*)*(.*)*x", "([a-z._0-9]+)*!", "(.|.)*(.|.)*x"}) {
    EXPECT_FALSE(PythonRegex{pattern}.fullmatch(path)) << pattern;
  }
  EXPECT_TRUE(PythonRegex{"(.*.*)*j"}.fullmatch(path));
}
#endif

TEST(PythonRegex, RefusesWhatWouldUseUpTheStack) {
  const size_t many = 100'000;
  for (const auto& pattern : {std::string(many, '(') + std::string(many, ')'), std::string(many, 'a')}) {
    EXPECT_THAT([&] { PythonRegex{pattern}; }, ThrowsMessage<c10::ValueError>(HasSubstr("more than 4096 characters")));
  }
  EXPECT_THAT([] { PythonRegex{std::string(65, '(') + std::string(65, ')')}; },
              ThrowsMessage<c10::ValueError>(HasSubstr("nested more than 64 deep")));
  std::string longest(4096, 'a');
  EXPECT_TRUE(PythonRegex{longest}.fullmatch(longest));
}

TEST(PythonRegex, NamesAnInvalidPattern) {
  for (const std::string pattern : {"(a", "a)", "[a", "*a", "(?:"}) {
    EXPECT_THAT([&] { PythonRegex{pattern}; }, ThrowsMessage<c10::ValueError>(HasSubstr(pattern))) << pattern;
  }
}

TEST(PythonSubstitution, IsPythonsReSub) {
  const auto sub = [](const std::string& pattern, const std::string& replacement, const std::string& text) {
    return PythonSubstitution(pattern, replacement)(text);
  };
  EXPECT_EQ(sub("^model\\.layers", "decoder.blocks", "model.layers.3.q"), "decoder.blocks.3.q");
  EXPECT_EQ(sub("(a+)(b)", R"(\2$&\1\\)", "xaabyab"), R"(xb$&aa\yb$&a\)");
  EXPECT_EQ(sub("c", "d", "ab"), std::nullopt);
  EXPECT_EQ(sub("a*", "d", std::string(100'000, 'a')), std::nullopt) << "too long to search without risk";
}

TEST(PythonSubstitution, RefusesReplacementsThatPythonReadsInAnotherWay) {
  for (const auto* replacement : {R"(\g<1>)", R"(\0)", R"(\2)", R"(\11)", R"(\n)", "\\"}) {
    EXPECT_THAT([&] { PythonSubstitution("(a)", replacement); },
                ThrowsMessage<c10::ValueError>(HasSubstr("found the replacement")))
        << replacement;
  }
}

}  // namespace
}  // namespace python_regex_test
