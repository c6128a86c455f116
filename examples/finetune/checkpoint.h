#pragma once

#include <ATen/ATen.h>
#include <lora/training_state.h>  // defines: TrainingState

#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "finetune/base_model.h"   // defines: Base
#include "finetune/data.h"         // defines: Pairs
#include "finetune/error_line.h"   // defines: error_line
#include "finetune/fingerprint.h"  // defines: Fingerprint
#include "finetune/options.h"      // defines: Options
#include "text/batches.h"          // defines: BatchStream
#include "training/trainer.h"      // defines: TrainReport

/// One run's file, from which it can be continued. `run` is for its adapters or parameters, optimizer and schedule.
class Checkpoint {
 public:
  Checkpoint(const Options& options, const Base& base, const Pairs& pairs)
      : path_((std::filesystem::path(options.output) / "checkpoint.safetensors").string()) {
    std::string targets;
    for (const auto& target : options.targets) targets += (targets.empty() ? "" : " ") + target;
    run.setting("base", fingerprint_of(base)).setting("data", fingerprint_of(pairs.train));
    run.setting("dev", fingerprint_of(pairs.dev)).setting("method", options.method->name);
    run.setting("rank", options.rank).setting("alpha", options.alpha).setting("dropout", options.dropout);
    run.setting("targets", targets).setting("lr", options.learning_rate());
    run.setting("virtual-tokens", options.virtual_tokens);
    run.setting("lora-plus-ratio", options.lora_plus_ratio).setting("steps", options.steps);
    run.setting("batch-size", options.batch_size).setting("seed", options.seed).setting("threads", options.threads);
    run.setting("dtype", options.dtype).setting("device", options.device);
    run.setting("evaluations", options.evaluations);
  }

  const std::string& path() const { return path_; }

  /// Goes on where the file was saved; false where there is none, or the run is at its beginning.
  bool load(BatchStream& stream, TrainReport& report) {
    try {
      if (!run.load(path_)) return false;
    } catch (const std::exception& error) {
      throw std::runtime_error(error_line(error) + "; give the flags of that run, or start anew without --resume");
    }
    stream.go_to(run.get<std::string>("position"));
    report.train = points(run.get<at::Tensor>("train losses"));
    report.dev = points(run.get<at::Tensor>("dev losses"));
    report.seconds = run.get<double>("seconds");
    report.tokens = run.get<std::int64_t>("tokens");
    return true;
  }

  /// Whether what the run makes was written too, when it was saved last.
  bool finished() const { return run.get<bool>("finished"); }

  void save(const BatchStream& stream, const TrainReport& report, bool finished) {
    run.set("position", stream.position()).set("finished", finished);
    run.set("train losses", tensor(report.train)).set("dev losses", tensor(report.dev));
    run.set("seconds", report.seconds).set("tokens", report.tokens);
    run.save(path_);
  }

  lora::TrainingState run;

 private:
  static std::string fingerprint_of(const Base& base) {
    Fingerprint fingerprint;
    for (const auto* const name : {"/model.safetensors", "/config.json", "/vocab.json", "/merges.txt"}) {
      fingerprint.add_file(base.directory + name);
    }
    return fingerprint.text();
  }

  static std::string fingerprint_of(const std::vector<Pair>& pairs) {
    Fingerprint fingerprint;
    for (const auto& pair : pairs) fingerprint.add(pair.input + '\n' + pair.text + '\n');
    return fingerprint.text();
  }

  /// [points, 2]: step and loss.
  static at::Tensor tensor(const std::vector<CurvePoint>& points) {
    auto values = at::empty({static_cast<std::int64_t>(points.size()), 2}, at::kDouble);
    auto* value = values.data_ptr<double>();
    for (const auto& point : points) {
      *value++ = point.step;
      *value++ = point.loss;
    }
    return values;
  }

  static std::vector<CurvePoint> points(const at::Tensor& values) {
    std::vector<CurvePoint> points;
    const auto* const value = values.const_data_ptr<double>();
    for (std::int64_t i = 0; i < values.size(0); ++i) points.push_back({value[2 * i], value[2 * i + 1]});
    return points;
  }

  std::string path_;
};
