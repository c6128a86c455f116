"""Writes methods/: adapters of PEFT's other methods over the golden models; README.md describes each file.

    tests/oracles/setup && tests/oracles/python tests/golden/generate_methods.py [OUTPUT FOLDER]

The base weights and inputs are those that generate.py has written beside this script.
"""

import copy
import pathlib
import shutil
import sys
import tempfile
import unittest.mock
import warnings

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent / "oracles"))

from generate import save_adapter, store, store_json  # first: it starts Python anew where sets have no fixed order

import torch
import transformers
from peft import (
    EvaConfig, IA3Config, LoraConfig, MissConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, VeraConfig,
    get_peft_model, initialize_lora_eva_weights)
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora import eva
from peft.tuners.lora.layer import Embedding
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera.model import _kaiming_init
from safetensors.torch import load_file

from generate_options import gradients
from models import Convs, Mlp, Reader

MODELS = {
    "mlp": (Mlp, here / "mlp"),
    "reader": (Reader, here / "options" / "reader"),
    "convs": (Convs, here / "options" / "convs"),
}
BOTH = dict(target_modules=["up", "down"])
GPT2 = dict(fan_in_fan_out=True, task_type="CAUSAL_LM")

DORA = {
    "mlp": ("mlp", dict(BOTH)),
    "mlp_rslora": ("mlp", dict(BOTH, use_rslora=True)),
    "gpt2": ("gpt2", dict(GPT2, r=4, lora_alpha=12, target_modules=["c_attn", "attn.c_proj"])),
    "embedding_conv1d": ("reader", dict(target_modules=["wte", "mix", "conv"])),
    "conv2d_conv3d": ("convs", dict(target_modules=["first", "second"])),
}
VERA = {
    "mlp": ("mlp", dict(BOTH)),
    "mlp_no_projection": ("mlp", dict(BOTH, save_projection=False)),
    "gpt2": ("gpt2", dict(GPT2, target_modules=["c_attn"])),
}
IA3 = {
    "mlp": ("mlp", dict(BOTH, feedforward_modules=["down"])),
    "gpt2": ("gpt2", dict(GPT2, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "conv": ("convs", dict(target_modules=["first", "second"], feedforward_modules=[])),
    "conv_feedforward": (
        "convs", dict(target_modules=["first", "second"], feedforward_modules=["first", "second"])),
}
MISS = {
    "balance": dict(r=3),
    "bat": dict(r=4, init_weights="bat"),
    "mini": dict(r=3, mini_r=4, init_weights="mini"),
}
EVA = {
    "plain": (3, EvaConfig(rho=2.0)),
    "whiten": (3, EvaConfig(rho=2.0, whiten=True, adjust_scaling_factors=False)),
    "excluded": (1, EvaConfig(rho=2.0)),
}
PROMPTS = {
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix_projection": PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24, task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


def output(model, x):
    y = model(x)
    return getattr(y, "logits", y)


def base_of(name):
    """A base model of generate.py in eval, its input and the weights of the loss."""
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel.from_pretrained(here / "gpt2" / "model")
        model.name_or_path = ""  # PEFT would write this machine's folder
        data = load_file(here / "gpt2" / "expected.safetensors")
        x, g, y = data["ids"], data["g"], data["logits_base"]
    else:
        make, folder = MODELS[name]
        model = make()
        model.load_state_dict(load_file(folder / "base.safetensors"))
        data = load_file(folder / "data.safetensors")
        x, g, y = data["x"], data["g"], data["y_base"]
    torch.testing.assert_close(output(model.eval(), x), y)
    return model, x, g


def randomize(model):
    """Every trainable tensor away from its start, and from whatever makes it do nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "ia3_l" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.5 if "vera_lambda" in name else 0.3)
        for module in model.modules():
            if isinstance(module, Embedding) and module.base_layer.padding_idx is not None:
                # Training leaves it zero: the padding takes no gradient. B would get one through it otherwise.
                module.lora_embedding_A["default"][:, module.base_layer.padding_idx] = 0


def adapted(model):
    """name of the adapted module in the base model -> its layer"""
    return {name.removeprefix("base_model.model."): module
            for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def expected_of(model, x, g):
    inputs = x.clone().requires_grad_(x.is_floating_point())
    y = output(model, inputs)
    (y * g).sum().backward()
    expected = {"y": y} | ({"dx": inputs.grad} if inputs.requires_grad else {})
    expected |= {f"{key.removeprefix('base_model.model.')}.grad": grad for key, grad in gradients(model).items()}
    merged = copy.deepcopy(model).merge_and_unload()
    for name, module in adapted(model).items():
        layer, bias = merged.get_submodule(name), getattr(module.get_base_layer(), "bias", None)
        expected[f"{name}.merged"] = layer.weight
        if bias is not None and not torch.equal(layer.bias, bias):
            expected[f"{name}.merged_bias"] = layer.bias
    expected["y_merged"] = output(merged, x)
    torch.testing.assert_close(expected["y_merged"], y, rtol=1e-4, atol=1e-5)
    return expected


def write_case(folder, base, config):
    model, x, g = base_of(base)
    model = get_peft_model(model, config)
    randomize(model)
    save_adapter(model, folder)
    store(folder / "expected.safetensors", expected_of(model, x, g))


def write_dora(folder):
    torch.manual_seed(20260120)
    for name, (base, options) in DORA.items():
        write_case(folder / name, base, LoraConfig(use_dora=True, **({"r": 3, "lora_alpha": 7} | options)))


def write_vera(folder):
    torch.manual_seed(20260121)
    for name, (base, options) in VERA.items():
        write_case(folder / name, base, VeraConfig(r=4, d_initial=0.1, projection_prng_key=3, **options))
    drawn = {}
    for key in (0, 3):
        for r, in_features, out_features in ((4, 20, 20), (4, 32, 96), (3, 5, 7)):
            generator = torch.Generator(device="cpu").manual_seed(key)
            for kind, shape in (("A", (r, in_features)), ("B", (out_features, r))):
                drawn[f"key_{key}.r_{r}_in_{in_features}_out_{out_features}.{kind}"] = _kaiming_init(shape, generator)
    store(folder / "vera_projection.safetensors", drawn)


def write_ia3(folder):
    torch.manual_seed(20260122)
    for name, (base, options) in IA3.items():
        write_case(folder / name, base, IA3Config(**options))


def write_miss(folder):
    torch.manual_seed(20260123)
    for name, options in MISS.items():
        write_case(folder / name, "mlp", MissConfig(**BOTH, **options))


def factors(model):
    return {f"{name}.{kind}": getattr(module, kind)["default"].weight
            for name, module in adapted(model).items() for kind in ("lora_A", "lora_B")}


def write_residual_start(folder, init):
    """A start that takes the adapter's part out of the base weights, trained a little, as it is and converted."""
    model, x, g = base_of("mlp")
    y_base = model(x)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, init_lora_weights=init, **BOTH))
    torch.testing.assert_close(model(x), y_base, rtol=1e-4, atol=1e-5)
    residual = {f"{name}.residual": module.get_base_layer().weight for name, module in adapted(model).items()}
    store(folder / "start.safetensors", factors(model) | residual)
    with tempfile.TemporaryDirectory() as temporary:
        start = pathlib.Path(temporary) / "start"
        model.save_pretrained(start)
        with torch.no_grad():
            for tensor in factors(model).values():
                tensor.add_(0.2 * torch.randn_like(tensor))
        save_adapter(model, folder / "raw")
        model.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=start)
    (folder / "converted" / "README.md").unlink()
    store(folder / "raw" / "expected.safetensors", expected_of(model, x, g))

    torch.testing.assert_close(PeftModel.from_pretrained(base_of("mlp")[0], folder / "raw")(x), model(x))
    converted = PeftModel.from_pretrained(base_of("mlp")[0], folder / "converted", is_trainable=True)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    store(folder / "converted" / "expected.safetensors", expected_of(converted, x, g))


def write_starts(folder):
    torch.manual_seed(20260124)
    for init in ("pissa", "olora"):
        write_residual_start(folder / init, init)
    model = get_peft_model(base_of("mlp")[0], LoraConfig(r=4, lora_alpha=7, init_lora_weights="orthogonal", **BOTH))
    store(folder / "orthogonal" / "start.safetensors", factors(model))


def write_eva(folder):
    torch.manual_seed(20260125)
    # Strongest where `up` is weakest: the two layers' spectra differ, and ranks move.
    directions = torch.linalg.svd(base_of("mlp")[0].up.weight.detach(), full_matrices=False).Vh.flip(0)
    strengths = torch.tensor([2.0, 1.8] + [0.9 ** k for k in range(10)])
    x = torch.randn(8, 16, 12) * strengths @ directions + torch.randn(12)
    store(folder / "data.safetensors", {"x": x})
    for name, (r, options) in EVA.items():
        base, inputs, g = base_of("mlp")
        model = get_peft_model(
            base, LoraConfig(r=r, lora_alpha=7, init_lora_weights="eva", eva_config=options, **BOTH))
        hooks, calls = [], []

        class Recorded(eva.SVDHook):
            def __init__(self, **options):
                super().__init__(**options)
                hooks.append(self)

        def forward(model, batch):
            calls.append(batch)
            model(batch)

        with unittest.mock.patch.object(eva, "SVDHook", Recorded):
            initialize_lora_eva_weights(
                model, list(x), forward_fn=forward, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
                show_progress_bar=False)
        start = {}
        for hook in hooks:
            stem = hook.name.removeprefix("base_model.model.")
            start |= {f"{stem}.{key}": getattr(hook.svd, f"{key}_") for key in (
                "components", "singular_values", "explained_variance_ratio", "mean", "n_samples_seen")}
        layers = adapted(model)
        start |= {f"{stem}.lora_A": layer.lora_A["default"].weight for stem, layer in layers.items()}
        store(folder / name / "start.safetensors", start)
        config = model.peft_config["default"]
        store_json(folder / name / "ranks.json", {
            "forward_passes": len(calls), "target_modules": config.target_modules, "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
            "modules": {stem: {"rank": layer.r["default"], "alpha": layer.lora_alpha["default"],
                               "scaling": layer.scaling["default"]} for stem, layer in layers.items()}})
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_B["default"].weight.normal_(0, 0.3)
        save_adapter(model, folder / name / "adapter")
        store(folder / name / "adapter" / "expected.safetensors", expected_of(model, inputs, g))


def write_prompts(folder):
    torch.manual_seed(20260126)
    for name, config in PROMPTS.items():
        base, ids, g = base_of("gpt2")
        model = get_peft_model(base, config).eval()
        randomize(model)
        save_adapter(model, folder / name)
        encoder, prompts = model.prompt_encoder["default"], []

        def keep(module, inputs, prompt):
            prompt.retain_grad()
            prompts.append(prompt)

        encoder.register_forward_hook(keep)
        result = model(ids, attention_mask=torch.ones_like(ids), labels=ids)
        (result.logits[:, -ids.shape[1]:] * g).sum().backward()
        expected = {"y": result.logits, "loss": result.loss, "prompt_embeddings.grad": prompts[0].grad.sum(0)}
        if len(list(encoder.parameters())) > 1:  # the file has only what they make
            for key, tensor in encoder.named_parameters():
                expected |= {key: tensor, f"{key}.grad": tensor.grad}
        else:
            torch.testing.assert_close(encoder.embedding.weight.grad, expected["prompt_embeddings.grad"])
        store(folder / name / "expected.safetensors", expected)


def lorafa_steps(bf16):
    """Three steps on given gradients. PEFT projects in bf16 wherever that is available, also on the processor."""
    torch.manual_seed(20260127)
    model = get_peft_model(base_of("mlp")[0], LoraConfig(
        r=3, lora_alpha=7, rank_pattern={"down": 5}, alpha_pattern={"down": 2}, bias="lora_only", **BOTH))
    randomize(model)
    with unittest.mock.patch("peft.optimizers.lorafa.is_bf16_available", lambda: bf16):
        optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=7, lr=0.01, weight_decay=0.1)
        names = {name: name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")
                 for name, _ in model.named_parameters()}
        trained = {names[name]: p for name, p in model.named_parameters() if p.requires_grad or "lora_" in name}
        tensors = {f"start.{name}": p.detach().clone() for name, p in trained.items()}
        for step in (1, 2, 3):
            for name, p in trained.items():
                if p.requires_grad:
                    p.grad = torch.randn_like(p) * 4 ** step
                    tensors[f"step_{step}.{name}.grad"] = p.grad.clone()
            optimizer.step()
            tensors |= {f"step_{step}.{name}": p.detach().clone() for name, p in trained.items() if p.requires_grad}
            for name, state in optimizer.state.items():
                stem = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
                tensors |= {f"step_{step}.{stem}.{key}": t.clone() for key, t in state.items() if key != "step"}
    return tensors


def write_lorafa(folder):
    store(folder / "steps.safetensors", lorafa_steps(bf16=False))
    store(folder / "steps_bf16.safetensors", lorafa_steps(bf16=True))


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else here) / "methods"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    write_dora(out / "dora")
    write_vera(out / "vera")
    write_ia3(out / "ia3")
    write_miss(out / "miss")
    write_starts(out / "starts")
    write_eva(out / "eva")
    write_prompts(out / "prompts")
    write_lorafa(out / "lorafa")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
