// Files as torch.save writes them, with any pickle in them.
#pragma once

#include <caffe2/serialize/inline_container.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

using Records = std::vector<std::pair<std::string, std::string>>;

inline std::string torch_archive(const Records& records) {
  std::string bytes;
  caffe2::serialize::PyTorchStreamWriter writer([&](const void* data, size_t size) {
    bytes.append(static_cast<const char*>(data), size);
    return size;
  });
  for (const auto& [name, content] : records) writer.writeRecord(name, content.data(), content.size());
  writer.writeEndOfFile();
  return bytes;
}

// The parts of a pickle.

template <class Number>
std::string raw(Number number) {
  return std::string(reinterpret_cast<const char*>(&number), sizeof number);
}
inline std::string string(const std::string& text) { return "X" + raw(static_cast<uint32_t>(text.size())) + text; }
inline std::string integer(int64_t number) { return "\x8a\x08" + raw(number); }
inline std::string global(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}
inline std::string tuple(const std::string& items) { return "(" + items + "t"; }
inline std::string integers(const std::vector<int64_t>& numbers) {
  std::string items;
  for (const auto number : numbers) items += integer(number);
  return tuple(items);
}
inline std::string dict(const std::string& items) { return "}(" + items + "u"; }
inline std::string pickle(const std::string& object) { return "\x80\x02" + object + "."; }

inline std::string storage(const std::string& key, int64_t count,
                           const std::string& type = global("torch", "FloatStorage")) {
  return tuple(string("storage") + type + string(key) + string("cpu") + integer(count)) + "Q";
}
inline std::string rebuild(const std::string& storage, int64_t offset, const std::vector<int64_t>& sizes,
                           const std::vector<int64_t>& strides, const std::string& rest = "") {
  const auto hooks = global("collections", "OrderedDict") + ")R";
  return global("torch._utils", "_rebuild_tensor_v2") +
         tuple(storage + integer(offset) + integers(sizes) + integers(strides) + "\x89" + hooks + rest) + "R";
}
