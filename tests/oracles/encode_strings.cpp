// encode_strings VOCAB.json MERGES.txt STRINGS.json: prints the token ids of each string as a JSON list of lists.

#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "file_error.h"       // defines: read_file
#include "oracles/program.h"  // defines: run_program
#include "text/byte_bpe.h"    // defines: ByteBpe

int main(int argc, char** argv) {
  return run_program(argc == 4, "encode_strings VOCAB.json MERGES.txt STRINGS.json", [&] {
    const ByteBpe bpe(argv[1], argv[2]);
    nlohmann::json all = nlohmann::json::array();
    for (const auto& text : nlohmann::json::parse(read_file(argv[3]))) {
      const auto ids = bpe.encode(text.get<std::string>());
      if (bpe.decode(ids) != text.get<std::string>()) throw std::runtime_error("decodes differently: " + text.dump());
      all.push_back(ids);
    }
    std::cout << all << '\n';
  });
}
