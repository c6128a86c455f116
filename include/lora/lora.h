#pragma once

#include <lora/adapters.h>            // defines: Adapters, DisableAdapters, inject, load, adapters_of, param_groups
#include <lora/config/ia3_config.h>   // defines: IA3Config
#include <lora/config/lora_config.h>  // defines: LoraConfig, LoraInit, EvaOptions
#include <lora/config/miss_config.h>  // defines: MissConfig, MissForm
#include <lora/config/mora_config.h>  // defines: MoraConfig
#include <lora/config/prefix_tuning_config.h>  // defines: PrefixTuningConfig, PrefixInit
#include <lora/config/prompt_tuning_config.h>  // defines: PromptTuningConfig
#include <lora/config/targets.h>               // defines: TargetModules, FusedPart
#include <lora/config/vera_config.h>           // defines: VeraConfig
#include <lora/cuda/merge.h>            // defines: cuda::MergeKernel, cuda::set_merge_kernel, cuda::has_merge_kernels
#include <lora/detail/error.h>          // defines: StateError, FormatError
#include <lora/functional/attention.h>  // defines: attention, packed_attention
#include <lora/functional/fast_operators.h>        // defines: FastOperators
#include <lora/functional/gelu.h>                  // defines: gelu
#include <lora/functional/linear_cross_entropy.h>  // defines: linear_cross_entropy, LinearCrossEntropyOptions
#include <lora/functional/recompute.h>             // defines: recompute
#include <lora/inject/accelerate.h>                // defines: accelerate, end_acceleration, acceleration_of
#include <lora/inject/clone.h>                     // defines: clone
#include <lora/inject/hosts/module_hosts.h>        // defines: register_host
#include <lora/inject/inject_options.h>            // defines: InjectOptions
#include <lora/inject/report.h>                    // defines: InjectionReport
#include <lora/inject/truncate.h>                  // defines: Truncation, TruncationReport
#include <lora/inject/verify.h>                    // defines: VerifyReport
#include <lora/io/checkpoint.h>                    // defines: load_checkpoint, save_checkpoint, SaveCheckpointOptions
#include <lora/io/checksum.h>                      // defines: add_checksums, check_checksums
#include <lora/io/convert_adapter.h>               // defines: convert_adapter, AdapterFormat, ConvertAdapterOptions
#include <lora/io/describe_adapter.h>              // defines: describe_adapter, AdapterDescription
#include <lora/io/method_registry.h>               // defines: register_method
#include <lora/io/safetensors.h>                   // defines: load_safetensors, save_safetensors, SafetensorsFile
#include <lora/io/torch_pickle.h>                  // defines: load_torch_pickle, save_torch_pickle
#include <lora/lora_fa.h>                          // defines: LoraFa
#include <lora/lora_linear.h>                      // defines: LoRALinear
#include <lora/merge/merge.h>                      // defines: MergeReport
#include <lora/merge_checkpoint.h>           // defines: check_checkpoint, merge_checkpoint, MergeCheckpointOptions
#include <lora/methods/configured_method.h>  // defines: ConfiguredMethod
#include <lora/methods/method.h>             // defines: Method, UpdateSpec
#include <lora/methods/update.h>             // defines: Update, Factors, LowRank, UpdateTensor, TensorRole
#include <lora/prompt/prefix_tuning.h>       // defines: PrefixTuning, load_prefix_tuning, PastKeyValues
#include <lora/prompt/prompt_tuning.h>       // defines: PromptTuning, load_prompt_tuning
#include <lora/train/keep_freed_memory.h>    // defines: keep_freed_memory
#include <lora/train/limit_kernel_caches.h>  // defines: limit_kernel_caches
#include <lora/train/param_groups.h>         // defines: LoraPlusOptions
#include <lora/train/schedule.h>             // defines: Schedule, ScheduleOptions, ScheduleType, schedule_factor
#include <lora/training_state.h>             // defines: TrainingState
#include <lora/version.h>                    // defines: LORA_VERSION_MAJOR, LORA_VERSION_MINOR, LORA_VERSION_PATCH
#include <lora/weight/product_plan.h>        // defines: ProductPlan, ProductShape, ProductKernel
