// Looks at adapters, checks them against models, merges and converts them: no model of C++ is needed.
#include <exception>
#include <iostream>
#include <string>

#include "finetune/error_line.h"     // defines: error_line, an exception in one line
#include "lora_tool/check.h"         // defines: check
#include "lora_tool/command_line.h"  // defines: parse_options
#include "lora_tool/convert.h"       // defines: convert
#include "lora_tool/inspect.h"       // defines: inspect
#include "lora_tool/merge.h"         // defines: merge
#include "lora_tool/options.h"       // defines: Options, Command
#include "lora_tool/outcome.h"       // defines: Outcome, Refused

namespace {

Outcome run(const Options& options) {
  switch (options.command) {
    case Command::kInspect:
      return inspect(options);
    case Command::kCheck:
      return check(options);
    case Command::kMerge:
      return merge(options);
    case Command::kConvert:
      return convert(options);
  }
  return {};
}

int fail(const Options& options, const std::string& line, int exit_code) {
  if (options.json) std::cout << Json{{"error", line}}.dump(2, ' ', false, Json::error_handler_t::replace) << '\n';
  std::cerr << "error: " << line << '\n';
  return exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  try {
    if (const auto exit_code = parse_options(argc, argv, options)) return *exit_code;
    const auto outcome = run(options);
    if (options.json) {
      std::cout << outcome.json.dump(2, ' ', false, Json::error_handler_t::replace) << '\n';
    } else {
      std::cout << outcome.text;
    }
    return outcome.exit_code;
  } catch (const Refused& refused) {
    return fail(options, refused.what(), 1);
  } catch (const std::exception& error) {
    return fail(options, error_line(error), 2);
  }
}
