// Fine-tunes a GPT-2, a plain LibTorch model that knows nothing of adapters, and shows what that costs and brings.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <lora/lora.h>  // defines: Adapters, Schedule

#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "finetune/base_model.h"    // defines: open_base, the small GPT-2 and its pre-training
#include "finetune/checkpoint.h"    // defines: Checkpoint
#include "finetune/command_line.h"  // defines: parse_options
#include "finetune/compare.h"       // defines: compare, each method over the grid of learning rates
#include "finetune/comparison.h"    // defines: comparison_of
#include "finetune/data.h"          // defines: new_domain_pairs, old_domain_pairs, encode_or_report
#include "finetune/error_line.h"    // defines: error_line, an exception in one line
#include "finetune/figures.h"       // defines: Figures, to_json
#include "finetune/method.h"        // defines: Trainable, the methods
#include "finetune/options.h"       // defines: Options
#include "finetune/paths.h"         // defines: check_outputs
#include "finetune/report.h"        // defines: Texts, write_texts, print_report
#include "training/line_plot.h"     // defines: write_line_plot
#include "training/peak_memory.h"   // defines: reset_peak_memory, peak_memory_bytes
#include "training/trainer.h"       // defines: train, evaluate
#include "training/wait_policy.h"   // defines: sleep_while_waiting

namespace {

torch::Tensor logits_of(GPT2LMHeadModel& model, const Batch& batch) {
  torch::NoGradGuard no_grad;
  return model->forward(batch.input_ids).to(torch::kFloat32);
}

/// The file in --output that holds the weights that were trained.
std::filesystem::path weights_file(const Options& options) {
  const auto* const name = options.method->whole_model ? "model.safetensors" : "adapter_model.safetensors";
  return std::filesystem::path(options.output) / name;
}

/// The model's positions that virtual tokens leave to the text.
std::int64_t positions_left(const GPT2Config& config, const Options& options) {
  if (options.virtual_tokens >= config.n_positions) {
    throw std::runtime_error("[finetune_gpt2] found --virtual-tokens " + std::to_string(options.virtual_tokens) +
                             ", expected fewer than the model's " + std::to_string(config.n_positions) + " positions");
  }
  return config.n_positions - options.virtual_tokens;
}

/// The checkpoint of this run, or null where no flag asks for one.
std::unique_ptr<Checkpoint> make_checkpoint(const Options& options, const Base& base, const Pairs& pairs,
                                            Trainable& trainable, lora::Schedule& schedule) {
  if (!options.resume && options.checkpoint_every == 0) return nullptr;
  auto checkpoint = std::make_unique<Checkpoint>(options, base, pairs);
  if (trainable.adapters) checkpoint->run.adapters(*trainable.adapters);
  checkpoint->run.tensors(trainable.tensors).optimizer(*trainable.optimizer).schedule(schedule);
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
  const auto positions = positions_left(model->config, options);
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
  auto trainable = options.method->make({base, options, stream.samples()});
  figures.trainable_parameters = trainable.count();
  lora::Schedule schedule(*trainable.optimizer, options.schedule_options());
  const auto checkpoint = make_checkpoint(options, base, new_pairs, trainable, schedule);
  TrainReport training;
  if (options.resume && !resume(*checkpoint, options, stream, training)) return;
  TrainOptions train_options;
  train_options.steps = options.steps;
  train_options.evaluations = options.evaluations;
  train_options.read = trainable.read;
  Progress progress(options.method->name, options.steps);
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
  figures.old_domain_loss_after = evaluate(model, old_dev, trainable.read);
  texts.write("after", model, trainable.read);

  trainable.save(options.output);
  figures.adapter_bytes = static_cast<std::int64_t>(std::filesystem::file_size(weights_file(options)));
  if (trainable.adapters) {
    const auto unmerged = logits_of(model, dev.front());
    trainable.adapters->merge();
    figures.merged_max_abs_difference = (logits_of(model, dev.front()) - unmerged).abs().max().item<double>();
    texts.write("merged", model);
    trainable.adapters->unmerge();
  }
  const auto curve = (std::filesystem::path(options.output) / "loss_curve.svg").string();
  write_line_plot(curve, "Loss on the new domain, " + options.method->name, "step", "loss (nats per token)",
                  {{"training batches", training.train, true, false}, {"dev set", training.dev, false, true}});
  texts.print();
  print_report(figures, options, curve);
  if (!options.json.empty()) write_json(options.json, to_json(figures, options));
  if (checkpoint) checkpoint->save(stream, training, /*finished=*/true);
}

}  // namespace

int main(int argc, char** argv) try {
  sleep_while_waiting(argv);
  lora::limit_kernel_caches();
  Options options;
  if (const auto exit_code = parse_options(argc, argv, options)) return *exit_code;
  check_outputs(options);
  at::set_num_threads(options.threads);
  if (const auto comparison = comparison_of(options)) {
    compare(options, *comparison, options.compare ? print_comparison : print_methods);
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
