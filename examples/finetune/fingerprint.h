#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "file_error.h"  // defines: FileError

/// Tells texts and files apart (FNV-1a).
class Fingerprint {
 public:
  void add(const std::string& text) { add(text.data(), text.size()); }

  void add_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> block(1 << 20);
    while (file) {
      file.read(block.data(), static_cast<std::streamsize>(block.size()));
      add(block.data(), static_cast<std::size_t>(file.gcount()));
    }
    if (!file.eof()) throw FileError(path, {"can't be read; check the path and the permissions"});
  }

  std::string text() const {
    std::ostringstream text;
    text << std::hex << (hash_ >> 32);
    return text.str();
  }

 private:
  void add(const char* letters, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) hash_ = (hash_ ^ static_cast<unsigned char>(letters[i])) * 1099511628211U;
  }

  std::uint64_t hash_ = 14695981039346656037U;
};
