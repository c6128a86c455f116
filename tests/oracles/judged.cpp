// judged COMMAND ARGUMENT...: what the scripts of this folder judge. One program, as most of what is compiled for each
// command is the library. Exit status 2 after one line on stderr where the arguments are wrong or the command throws.

#include <algorithm>
#include <cstdio>
#include <map>
#include <sstream>
#include <string>

#include "harness/message_of.h"
#include "oracles/commands.h"

namespace {

struct Command {
  std::string usage;
  void (*run)(const Arguments&);

  /// Whether there are as many arguments as words of the usage, with or without those in brackets.
  bool takes(size_t count) const {
    const auto words = [](const std::string& text) {
      std::istringstream in(text);
      size_t found = 0;
      for (std::string word; in >> word;) ++found;
      return found;
    };
    return count == words(usage) || count == words(usage.substr(0, usage.find('[')));
  }
};

const std::map<std::string, Command> kCommands = {
    {"adapt_encoder", {"ENCODER.pt DATA OUT", adapt_encoder}},
    {"copy_checkpoint", {"IN OUT BYTES [TIED OF]", copy_checkpoint}},
    {"copy_safetensors", {"IN OUT", copy_safetensors}},
    {"copy_torch_pickle", {"IN OUT", copy_torch_pickle}},
    {"encode_strings", {"VOCAB.json MERGES.txt STRINGS.json", encode_strings}},
    {"gpt2_logits", {"MODEL_FOLDER OUT", gpt2_logits}},
    {"write_adapters", {"OUT", write_adapters}},
    {"write_prompts", {"OUT", write_prompts}},
};

}  // namespace

int main(int argc, char** argv) {
  const auto found = argc < 2 ? kCommands.end() : kCommands.find(argv[1]);
  const Arguments arguments(argv + std::min(argc, 2), argv + argc);
  if (found == kCommands.end() || !found->second.takes(arguments.size())) {
    for (const auto& [name, command] : kCommands) {
      if (found == kCommands.end() || name == found->first) {
        std::fprintf(stderr, "usage: judged %s %s\n", name.c_str(), command.usage.c_str());
      }
    }
    return 2;
  }
  const auto error = harness::message_of([&] { found->second.run(arguments); });
  if (!error.empty()) return std::fprintf(stderr, "error: %s\n", error.c_str()), 2;
  return 0;
}
