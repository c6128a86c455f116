#pragma once

#include <lora/version.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Row k: the checksum of one byte that is followed by k bytes of zeros ("slicing by 8", Kounavis and Berry 2005).
constexpr std::array<std::array<uint32_t, 256>, 8> crc32_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0xEDB88320u : 0u);
    tables[0][byte] = value;
  }
  for (size_t row = 1; row < tables.size(); ++row) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[row - 1][byte];
      tables[row][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

inline constexpr auto kCrc32Tables = crc32_tables();

/// The CRC-32 of zip files and of zlib; `before` is that of the bytes in front, so that data may come in pieces.
inline uint32_t crc32(const void* data, size_t size, uint32_t before = 0) {
  const auto& table = kCrc32Tables;
  const auto* next = static_cast<const unsigned char*>(data);
  uint32_t value = ~before;
  for (; size >= 8; size -= 8, next += 8) {
    uint32_t low = 0, high = 0;
    std::memcpy(&low, next, sizeof low);
    std::memcpy(&high, next + 4, sizeof high);
    low ^= value;
    value = table[7][low & 0xFF] ^ table[6][(low >> 8) & 0xFF] ^ table[5][(low >> 16) & 0xFF] ^ table[4][low >> 24] ^
            table[3][high & 0xFF] ^ table[2][(high >> 8) & 0xFF] ^ table[1][(high >> 16) & 0xFF] ^ table[0][high >> 24];
  }
  for (; size > 0; --size, ++next) value = (value >> 8) ^ table[0][(value ^ *next) & 0xFF];
  return ~value;
}
inline uint32_t crc32(std::string_view text, uint32_t before = 0) { return crc32(text.data(), text.size(), before); }

}  // namespace detail
LORA_NAMESPACE_END
