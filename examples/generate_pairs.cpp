// Prints pairs of the generator's domains in E2E's format, to look at or to train on.
#include <CLI/CLI.hpp>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
#include <set>
#include <string>

#include "text/generator.h"  // defines: PairGenerator, the domains

int main(int argc, char** argv) try {
  std::string domains = "new";
  std::size_t count = 10;
  std::uint64_t seed = 1;
  CLI::App app("Prints pairs 'slot : value | slot : value||text' of the generator's domains.");
  app.add_option("--domains", domains, "base: those of the pre-training; new: the one that it has not seen")
      ->check(CLI::IsMember({"base", "new"}))
      ->capture_default_str();
  app.add_option("--count", count, "pairs of each domain")->capture_default_str();
  app.add_option("--seed", seed, "the same seed gives the same pairs")->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
  const auto& base = generator_base_domains();
  for (const auto& domain : domains == "base" ? base : std::vector<GeneratorDomain>{generator_new_domain()}) {
    std::set<std::string> taken;
    for (const auto& pair : PairGenerator(domain, seed).draw(count, taken)) {
      std::cout << pair.input << "||" << pair.text << '\n';
    }
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 2;
}
