// LoRA with one thing about its updates changed: a method of somebody else's.
#pragma once

#include <lora/config/lora_config.h>
#include <lora/methods/lora.h>
#include <lora/methods/method.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace harness {

/// Does what another update does; a test's own update overrides what it changes.
class WrappedUpdate : public lora::Update {
 public:
  explicit WrappedUpdate(std::shared_ptr<lora::Update> update) : update_(std::move(update)) {}
  int64_t in_features() const override { return update_->in_features(); }
  int64_t out_features() const override { return update_->out_features(); }
  std::vector<lora::UpdateTensor> tensors() const override { return update_->tensors(); }
  lora::Factors factors(const lora::BaseRows& base) const override { return update_->factors(base); }
  std::shared_ptr<lora::Update> clone(const lora::TensorCopier& copy) const override { return update_->clone(copy); }

 private:
  std::shared_ptr<lora::Update> update_;
};

class WrappedLora;

struct WrappedConfig {
  using Method = WrappedLora;
  lora::LoraConfig lora;
  std::function<std::shared_ptr<lora::Update>(std::shared_ptr<lora::Update>)> wrap;
};

class WrappedLora final : public lora::Method {
 public:
  explicit WrappedLora(const WrappedConfig& config) : lora_(config.lora), wrap_(config.wrap) {}
  const char* peft_type() const override { return "WRAPPED"; }
  const lora::Targeting& targeting() const override { return lora_.targeting(); }
  std::shared_ptr<lora::Update> create(const lora::UpdateSpec& spec) const override {
    return wrap_(lora_.create(spec));
  }
  const char* prefix() const override { return lora_.prefix(); }
  double dropout() const override { return lora_.dropout(); }
  at::ScalarType tensor_dtype(at::ScalarType base) const override { return lora_.tensor_dtype(base); }

 private:
  lora::LoRA lora_;
  std::function<std::shared_ptr<lora::Update>(std::shared_ptr<lora::Update>)> wrap_;
};

}  // namespace harness
