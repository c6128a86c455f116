// encode_strings VOCAB.json MERGES.txt STRINGS.json: prints the token ids of each string as a JSON list of lists.

#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "file_error.h"  // defines: read_file
#include "oracles/commands.h"
#include "text/byte_bpe.h"  // defines: ByteBpe

void encode_strings(const Arguments& arguments) {
  const ByteBpe bpe(arguments[0], arguments[1]);
  nlohmann::json all = nlohmann::json::array();
  for (const auto& text : nlohmann::json::parse(read_file(arguments[2]))) {
    const auto ids = bpe.encode(text.get<std::string>());
    if (bpe.decode(ids) != text.get<std::string>()) throw std::runtime_error("decodes differently: " + text.dump());
    all.push_back(ids);
  }
  std::cout << all << '\n';
}
