"""Writes options/: an adapter by Python PEFT for each option of LoraConfig; README.md describes it. Called by generate.py."""

import pathlib

import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Embedding
from safetensors.torch import save_file

from models import Convs, Reader

READER = {
    "embedding": dict(target_modules=["wte", "mix"]),
    "conv": dict(target_modules=["conv", "mix"]),
    "bias_all": dict(target_modules=["mix"], bias="all"),
    "bias_lora_only": dict(target_modules=["mix", "conv"], bias="lora_only"),
    "lora_bias": dict(target_modules=["mix", "conv"], lora_bias=True),
    "modules_to_save": dict(target_modules=["mix"], modules_to_save=["classifier", "norm"]),
    "bias_and_modules": dict(target_modules=["mix", "conv"], bias="all", modules_to_save=["classifier"]),
    "task_head": dict(target_modules=["mix"], task_type="TOKEN_CLS"),
    "tokens": dict(target_modules=["mix"], trainable_token_indices={"wte": [7, 2, 5]}),
    "layers": dict(target_modules=["mix"], layers_to_transform=[1], layers_pattern="h"),
    "one_layer": dict(target_modules=["h.0.mix", "mix"], layers_to_transform=1, layers_pattern=["h"]),
    "everything": dict(
        target_modules=["wte", "mix", "conv"], exclude_modules=["h.0.mix"], bias="lora_only",
        modules_to_save=["norm", "dense"], rank_pattern={"conv": 2}, alpha_pattern={"wte": 3}, use_rslora=True),
}
CONVS = {"conv2d_conv3d": dict(target_modules=["first", "second"])}


def store(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def randomize(module, std):
    """Every trainable tensor drawn anew around its value, so that nothing is zero and no two are alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)


def gradients(model):
    """The gradients under the keys of the adapter's file."""
    state = {name: torch.zeros(()) for name in model.state_dict()}
    keys = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.grad is not None:
            state[name] = parameter.grad
            keys[id(parameter.grad)] = name
    return {key: grad for key, grad in get_peft_model_state_dict(model, state_dict=state).items() if grad.dim() > 0}


def write_case(folder, base, options, data, g):
    model = get_peft_model(base, LoraConfig(**({"r": 3, "lora_alpha": 7} | options)))
    randomize(model, 0.3)
    for module in model.modules():
        if isinstance(module, Embedding) and module.base_layer.padding_idx is not None:
            # Training leaves it zero: the padding takes no gradient. PEFT's B would get one through it otherwise.
            module.lora_embedding_A["default"].data[:, module.base_layer.padding_idx] = 0
    model.eval()
    call = (lambda x: model.base_model.model(x).logits) if hasattr(base, "config") and hasattr(base, "lm_head") else (
        lambda x: model.base_model.model(x))
    y = call(data)
    (y * g).sum().backward()
    expected = {"y": y} | {f"{key}.grad": grad for key, grad in gradients(model).items()}
    model.save_pretrained(folder)
    for card in folder.rglob("README.md"):
        card.unlink()
    store(folder / "expected.safetensors", expected)
    return model


def write_options(folder: pathlib.Path):
    torch.manual_seed(20260110)
    reader = Reader()
    with torch.no_grad():
        for tensor in reader.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.4)
        reader.wte.weight[0] = 0.5
    weights = {name: tensor.detach().clone() for name, tensor in reader.state_dict().items()}
    ids, g = torch.randint(0, 11, (4, 7)), torch.randn(4, 3)
    store(folder / "reader" / "base.safetensors", weights)
    store(folder / "reader" / "data.safetensors", {"x": ids, "g": g, "y_base": reader.eval()(ids)})

    def fresh_reader():
        model = Reader()
        model.load_state_dict(weights)
        return model.eval()

    for name, options in READER.items():
        write_case(folder / "reader" / name, fresh_reader(), options, ids, g)
    model = get_peft_model(fresh_reader(), LoraConfig(r=3, lora_alpha=7, target_modules=["wte", "conv"]))
    randomize(model, 0.3)
    model.save_pretrained(folder / "reader" / "pickle", safe_serialization=False)
    (folder / "reader" / "pickle" / "README.md").unlink()
    store(folder / "reader" / "pickle" / "expected.safetensors", {"y": model.eval()(ids)})

    torch.manual_seed(20260111)
    convs = Convs()
    conv_weights = {name: tensor.detach().clone() for name, tensor in convs.state_dict().items()}
    x, g = torch.randn(2, 2, 3, 6, 6), torch.randn(2, 5, 3, 3)
    store(folder / "convs" / "base.safetensors", conv_weights)
    store(folder / "convs" / "data.safetensors", {"x": x, "g": g, "y_base": convs(x)})
    for name, options in CONVS.items():
        convs = Convs()
        convs.load_state_dict(conv_weights)
        write_case(folder / "convs" / name, convs, options, x, g)

    # A tied head: its rows are trained with the embedding's.
    torch.manual_seed(20260112)
    config = transformers.GPT2Config(
        vocab_size=24, n_positions=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0)
    base = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.3)
    base.save_pretrained(folder / "gpt2" / "base")
    (folder / "gpt2" / "base" / "generation_config.json").unlink()
    ids, g = torch.randint(0, 24, (2, 9)), torch.randn(2, 9, 24)
    store(folder / "gpt2" / "data.safetensors", {"x": ids, "g": g, "y_base": base(ids).logits})
    for name, options in {
        "tokens": dict(target_modules=["c_attn"], trainable_token_indices=[3, 20, 11], fan_in_fan_out=True),
        "embedding": dict(target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    }.items():
        fresh = transformers.GPT2LMHeadModel.from_pretrained(folder / "gpt2" / "base").eval()
        write_case(folder / "gpt2" / name, fresh, options, ids, g)
    for path in folder.rglob("adapter_config.json"):  # of this machine's folder
        text = path.read_text()
        path.write_text(text.replace(str(folder / "gpt2" / "base"), "base"))
