// Fine-tunes a GPT-2, a plain LibTorch model that knows nothing of adapters, and shows what that costs and brings.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <lora/lora.h>  // defines: inject, LoraConfig, Adapters, param_groups, Schedule
#include <torch/optim/adamw.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "finetune/base_model.h"    // defines: open_base, the small GPT-2 and its pre-training
#include "finetune/checkpoint.h"    // defines: Checkpoint
#include "finetune/command_line.h"  // defines: parse_options
#include "finetune/compare.h"       // defines: compare, each method over the grid of learning rates
#include "finetune/data.h"          // defines: new_domain_pairs, old_domain_pairs, encode_or_report
#include "finetune/error_line.h"    // defines: error_line, an exception in one line
#include "finetune/figures.h"       // defines: Figures, to_json
#include "finetune/options.h"       // defines: Options, Method
#include "finetune/paths.h"         // defines: check_outputs
#include "finetune/report.h"        // defines: Texts, write_texts, print_report
#include "training/line_plot.h"     // defines: write_line_plot
#include "training/peak_memory.h"   // defines: reset_peak_memory, peak_memory_bytes
#include "training/trainer.h"       // defines: train, evaluate
#include "training/wait_policy.h"   // defines: sleep_while_waiting

namespace {

/// Adapters in the model for lora and lora+, none for full fine-tuning; either way what the optimizer trains.
struct Trainable {
  std::optional<lora::Adapters> adapters;
  std::unique_ptr<torch::optim::AdamW> optimizer;

  std::int64_t count() const {
    std::int64_t numbers = 0;
    for (const auto& group : optimizer->param_groups()) {
      for (const auto& parameter : group.params()) numbers += parameter.numel();
    }
    return numbers;
  }
};

Trainable make_trainable(GPT2LMHeadModel& model, const Options& options) {
  const auto adamw = torch::optim::AdamWOptions(options.learning_rate());
  if (options.method == Method::kFull) {
    // lm_head's weight is wte's: the parameters of the transformer are all.
    return {std::nullopt, std::make_unique<torch::optim::AdamW>(model->transformer->parameters(), adamw)};
  }
  // As in PEFT a word of its own, not a name in a list.
  const bool all_linear = options.targets == std::vector<std::string>{"all-linear"};
  const auto targets = all_linear ? lora::TargetModules("all-linear") : lora::TargetModules(options.targets);
  auto adapters = lora::inject(*model, lora::LoraConfig()
                                           .r(options.rank)
                                           .lora_alpha(options.alpha)
                                           .lora_dropout(options.dropout)
                                           .target_modules(targets));
  std::cout << adapters.report() << '\n';
  const auto ratio = options.method == Method::kLoraPlus ? options.lora_plus_ratio : 1.0;
  auto groups = lora::param_groups(adapters, adamw, lora::LoraPlusOptions().lr_ratio(ratio));
  return {adapters, std::make_unique<torch::optim::AdamW>(std::move(groups))};
}

torch::Tensor logits_of(GPT2LMHeadModel& model, const Batch& batch) {
  torch::NoGradGuard no_grad;
  return model->forward(batch.input_ids).to(torch::kFloat32);
}

/// The file in --output that holds the weights that were trained.
std::filesystem::path weights_file(const Options& options) {
  const auto* const name = options.method == Method::kFull ? "model.safetensors" : "adapter_model.safetensors";
  return std::filesystem::path(options.output) / name;
}

/// Saves what was trained into --output and returns the bytes of its weights.
std::int64_t save(Trainable& trainable, const Base& base, const Options& options) {
  if (trainable.adapters) {
    trainable.adapters->save(options.output);
  } else {
    save_base(base, options.output);
  }
  return static_cast<std::int64_t>(std::filesystem::file_size(weights_file(options)));
}

/// The checkpoint of this run, or null where no flag asks for one.
std::unique_ptr<Checkpoint> make_checkpoint(const Options& options, const Base& base, const Pairs& pairs,
                                            Trainable& trainable, lora::Schedule& schedule) {
  if (!options.resume && options.checkpoint_every == 0) return nullptr;
  auto checkpoint = std::make_unique<Checkpoint>(options, base, pairs);
  if (trainable.adapters) {
    checkpoint->run.adapters(*trainable.adapters);
  } else {
    checkpoint->run.tensors(base.model->transformer->named_parameters().pairs());
  }
  checkpoint->run.optimizer(*trainable.optimizer).schedule(schedule);
  return checkpoint;
}

/// Loads the checkpoint where there is one and says where the run goes on. False where nothing is left to do.
bool resume(Checkpoint& checkpoint, const Options& options, BatchStream& stream, TrainReport& report) {
  if (!checkpoint.load(stream, report)) {
    std::cout << "No checkpoint in " << options.output << ": starting at step 0\n";
    return true;
  }
  if (checkpoint.finished() && std::filesystem::exists(weights_file(options))) {
    std::cout << "This run is finished: its result lies in " << options.output << '\n';
    return false;
  }
  std::cout << "Continuing after step " << report.train.size() << " of " << options.steps << '\n';
  return true;
}

void finetune(Options& options) {
  auto base = open_base(options);
  auto& model = base.model;
  const auto positions = model->config.n_positions;
  const auto device = model->lm_head->weight.device();
  const auto new_pairs = new_domain_pairs(options);
  auto train_samples = encode_or_report(base.tokenizer, new_pairs.train, positions, "training pairs");
  const auto dev = evaluation_batches(encode_or_report(base.tokenizer, new_pairs.dev, positions, "dev pairs"), device);
  const auto old_samples = encode_or_report(base.tokenizer, old_domain_pairs(0).dev, positions, "old domains");
  const auto old_dev = evaluation_batches(old_samples, device);
  BatchStream stream(std::move(train_samples), options.batch_size, options.seed);
  options.settle_steps(stream.batches_per_epoch());
  print_settings(options, base, new_pairs);

  Figures figures;
  for (const auto& parameter : model->transformer->parameters()) figures.total_parameters += parameter.numel();
  figures.dev_loss_before = evaluate(model, dev);
  figures.old_domain_loss_before = evaluate(model, old_dev);
  Texts texts(base.tokenizer, new_pairs.dev);
  texts.write("before", model);

  at::manual_seed(options.seed);
  auto trainable = make_trainable(model, options);
  figures.trainable_parameters = trainable.count();
  lora::Schedule schedule(*trainable.optimizer, options.schedule_options());
  const auto checkpoint = make_checkpoint(options, base, new_pairs, trainable, schedule);
  TrainReport training;
  if (options.resume && !resume(*checkpoint, options, stream, training)) return;
  TrainOptions train_options;
  train_options.steps = options.steps;
  Progress progress(method_name(options.method), options.steps);
  reset_peak_memory();
  training = train(model, *trainable.optimizer, schedule, stream, dev, train_options, progress, std::move(training),
                   [&](const TrainReport& report) {
                     const auto every = options.checkpoint_every;
                     const bool due = every > 0 && report.train.size() % every == 0;
                     if (due) checkpoint->save(stream, report, /*finished=*/false);
                   });
  figures.peak_memory_bytes = peak_memory_bytes();
  figures.seconds = training.seconds;
  figures.tokens_per_second = static_cast<double>(training.tokens) / training.seconds;
  figures.dev_loss_after = training.dev.back().loss;
  figures.old_domain_loss_after = evaluate(model, old_dev);
  texts.write("after", model);

  figures.adapter_bytes = save(trainable, base, options);
  if (trainable.adapters) {
    const auto unmerged = logits_of(model, dev.front());
    trainable.adapters->merge();
    figures.merged_max_abs_difference = (logits_of(model, dev.front()) - unmerged).abs().max().item<double>();
    texts.write("merged", model);
    trainable.adapters->unmerge();
  }
  const auto curve = (std::filesystem::path(options.output) / "loss_curve.svg").string();
  write_line_plot(curve, "Loss on the new domain, " + method_name(options.method), "step", "loss (nats per token)",
                  {{"training batches", training.train, true, false}, {"dev set", training.dev, false, true}});
  texts.print();
  print_report(figures, options, curve);
  if (!options.json.empty()) write_json(options.json, to_json(figures, options));
  if (checkpoint) checkpoint->save(stream, training, /*finished=*/true);
}

}  // namespace

int main(int argc, char** argv) try {
  sleep_while_waiting(argv);
  Options options;
  if (const auto exit_code = parse_options(argc, argv, options)) return *exit_code;
  check_outputs(options);
  at::set_num_threads(options.threads);
  if (options.compare) {
    compare(options);
  } else {
    finetune(options);
  }
  return 0;
} catch (const DivergedError& error) {
  std::cerr << "error: " << error.what() << '\n';
  return kDivergedExit;
} catch (const std::exception& error) {
  std::cerr << "error: " << error_line(error) << '\n';
  return 2;
}
