#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>
#include <lora/detail/json.h>
#include <lora/version.h>
#include <torch/serialize/archive.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

using TensorMap = std::map<std::string, at::Tensor>;

/// What was written into an archive, as one to read from.
inline torch::serialize::InputArchive reopened(torch::serialize::OutputArchive& written) {
  std::string bytes;
  written.save_to([&](const void* data, size_t size) {
    bytes.append(static_cast<const char*>(data), size);
    return size;
  });
  torch::serialize::InputArchive archive;
  archive.load_from(bytes.data(), bytes.size());
  return archive;
}

/// A value as JSON; the tensors in it go into `tensors` under names that begin with `name`.
inline Json field_json(const c10::IValue& value, const std::string& name, TensorMap& tensors) {
  if (value.isNone()) return nullptr;
  if (value.isBool()) return value.toBool();
  if (value.isInt()) return value.toInt();
  if (value.isString()) return value.toStringRef();
  if (value.isDouble()) {
    const double real = value.toDouble();
    if (std::isfinite(real)) return real;
    return Json::object({{"real", std::isnan(real) ? "nan" : real > 0 ? "inf" : "-inf"}});  // JSON has no such numbers
  }
  if (value.isTensor()) {
    tensors[name] = value.toTensor();
    return Json::object({{"tensor", name}});
  }
  auto list = Json::array();
  const auto add = [&](const c10::IValue& element) {
    list.push_back(field_json(element, name + "/" + std::to_string(list.size()), tensors));
  };
  if (value.isTensorList()) {
    for (const at::Tensor& element : value.toTensorVector()) add(element);
    return Json::object({{"tensors", std::move(list)}});
  }
  TORCH_CHECK_VALUE(value.isTuple(), "[lora::TrainingState] found a ", value.tagKind(), " for ", name,
                    ", expected a number, a text, a tensor, or a list of tensors");
  for (const auto& element : value.toTupleRef().elements()) add(element);
  return Json::object({{"tuple", std::move(list)}});
}

/// The value that field_json made into JSON; `tensor` finds a tensor by its name. Throws a std::exception where it is
/// no such JSON.
inline c10::IValue field_value(const Json& json, const std::function<at::Tensor(const std::string&)>& tensor) {
  if (json.is_null()) return {};
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_number_integer()) return json.get<int64_t>();
  if (json.is_number_float()) return json.get<double>();
  if (json.is_string()) return json.get<std::string>();
  if (json.contains("real")) {
    const auto text = json["real"].get<std::string>();
    using Limits = std::numeric_limits<double>;
    return text == "nan" ? Limits::quiet_NaN() : text == "inf" ? Limits::infinity() : -Limits::infinity();
  }
  if (json.contains("tensor")) return tensor(json["tensor"].get<std::string>());
  if (json.contains("tensors")) {
    c10::List<at::Tensor> list;
    for (const auto& element : json["tensors"]) list.push_back(field_value(element, tensor).toTensor());
    return list;
  }
  std::vector<c10::IValue> elements;
  for (const auto& element : json.at("tuple")) elements.push_back(field_value(element, tensor));
  return c10::ivalue::Tuple::create(std::move(elements));
}

/// What the options of a group or the state of a parameter write into an archive, each field as JSON.
template <class Source>
Json fields_json(const Source& source, const std::string& name, TensorMap& tensors) {
  torch::serialize::OutputArchive written;
  source.serialize(written);
  auto archive = reopened(written);
  auto json = Json::object();
  for (const auto& key : archive.keys()) {
    c10::IValue value;
    archive.read(key, value);
    json[key] = field_json(value, name + "/" + key, tensors);
  }
  return json;
}

/// The archive that fields_json has read, as a child of `parent`.
inline torch::serialize::OutputArchive fields_archive(const Json& json, const torch::serialize::OutputArchive& parent,
                                                      const std::function<at::Tensor(const std::string&)>& tensor) {
  torch::serialize::OutputArchive archive(parent.compilation_unit());
  for (const auto& [key, value] : json.items()) archive.write(key, field_value(value, tensor));
  return archive;
}

}  // namespace detail
LORA_NAMESPACE_END
