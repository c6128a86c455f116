// libFuzzer: any text as an adapter_config.json. A configuration that is read can be asked about a module, and is
// written and read again as the same.

#include <c10/util/Exception.h>
#include <lora/detail/error.h>
#include <lora/inject/copy_planner.h>
#include <lora/io/config_json.h>
#include <lora/methods/lora.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

lora::LoraConfig read(const std::string& text) {
  std::vector<std::string> problems;
  const auto json = lora::detail::parse_object(text, "input");
  auto config = lora::detail::read_config<lora::LoraConfig>(json, problems);
  if (!problems.empty()) throw lora::FormatError("input", problems);
  return config;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lora::LoraConfig config;
  try {
    config = read(std::string(reinterpret_cast<const char*>(data), size));
    const lora::LoRA method(config);
    const std::string path = "model.layers.0.self_attn.q_proj";
    method.scaling({path});
    for (const auto& modules : {config.target_modules(), config.exclude_modules()}) {
      for (const auto& entry : modules.entries()) modules.matches(entry, path);
    }
    const auto layers = config.targeting().layers;
    if (!layers.empty()) layers.contains(path);
    for (const auto& name : config.modules_to_save()) lora::detail::saves(name, path);
  } catch (const lora::FormatError& error) {
    if (error.problems().empty()) std::abort();
    return 0;
  } catch (const c10::ValueError&) {
    return 0;
  }
  const auto text = lora::detail::config_json(config).dump();
  if (lora::detail::config_json(read(text)).dump() != text) std::abort();
  return 0;
}
