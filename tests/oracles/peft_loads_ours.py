"""Does Python PEFT load the adapters that C++ wrote, and compute the same?

    peft_loads_ours.py PROGRAM      PROGRAM write_adapters OUT writes any number of case folders into the folder OUT
    peft_loads_ours.py FOLDER...    case folders that are there already

A case folder holds manifest.json:

    {"model": "mlp" | "mha" | "gpt2" | "reader" | "convs" | "sequential",
     "layers": {"up": "Linear", "act": "Tanh", "down": "Linear"},
     "base": "base.safetensors",
     "adapters": {"default": "adapter", "other": "adapter/other"},
     "data": "data.safetensors",
     "cases": [{"active": ["default"], "input": "x", "output": "y"}]}

"base" is the plain model: a safetensors file of its state_dict, for gpt2 a Hugging Face folder. "layers" is needed for
"sequential" only: names and torch.nn classes in order (Linear, Tanh, ReLU, GELU), shapes as in the base's tensors.
"adapters" maps names to PEFT folders, "data" holds inputs and our outputs, and an empty "active" is the base alone.
Judged in every folder: each tensor of an adapter has its place in PEFT's model and the other way round, bit for bit;
then every case.

PEFT adds MultiheadAttention's out_proj part twice; its scaling is halved here, so that it counts once. It also knows no
adapter on in_proj or out_proj alone: the half that a file lacks has to have stayed zero.
"""

import json
import pathlib
import subprocess
import sys
import warnings

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import MultiheadAttention
from safetensors.torch import load_file

from judging import Verdicts, work_folder
from models import Convs, MhaBlock, Mlp, Reader

LAYERS = ("Linear", "Tanh", "ReLU", "GELU")


def sequential(layers, weights):
    model = torch.nn.Sequential()
    for name, kind in layers.items():
        if kind not in LAYERS:
            raise ValueError(f"layer {name}: unknown class {kind}")
        if kind == "Linear":
            out_features, in_features = weights[f"{name}.weight"].shape
            model.add_module(name, torch.nn.Linear(in_features, out_features, bias=f"{name}.bias" in weights))
        else:
            model.add_module(name, getattr(torch.nn, kind)())
    return model


def base_model(folder, manifest):
    if manifest["model"] == "gpt2":
        return transformers.GPT2LMHeadModel.from_pretrained(folder / manifest["base"])
    weights = load_file(folder / manifest["base"])
    makers = {"mlp": Mlp, "mha": MhaBlock, "reader": Reader, "convs": Convs, "sequential": lambda: sequential(manifest["layers"], weights)}
    model = makers[manifest["model"]]()
    model.load_state_dict(weights)
    return model


def count_out_proj_once(model, adapter):
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.base_layer.out_proj.scaling[adapter] /= 2


def in_zero_half_of_attention(key, placed, written):
    half = key.rpartition(".lora_")[0]
    layer = half.removesuffix(".base_layer.out_proj")
    other = layer if layer != half else f"{layer}.base_layer.out_proj"
    both = all(f"{part}.lora_{which}.weight" in placed for part in (half, other) for which in "AB")
    alone = f"{half}.lora_B.weight" not in written and f"{other}.lora_B.weight" in written
    return both and alone and not placed[f"{half}.lora_B.weight"].any()


def twice(key):
    """PEFT's bias="all" lists the biases below modules_to_save again, the base's too."""
    return ".original_module." in key or ".modules_to_save." in key


def judge(folder, verdicts):
    manifest = json.loads((folder / "manifest.json").read_text())
    title = f"{folder.name} ({manifest['model']})"
    base = base_model(folder, manifest).eval()
    model = None
    for name, place in manifest["adapters"].items():
        if model is None:
            model = PeftModel.from_pretrained(base, folder / place, adapter_name=name)
        else:
            result = model.load_adapter(folder / place, adapter_name=name)
            verdicts.check(not result.unexpected_keys, f"{title}, {name}: unexpected keys {result.unexpected_keys}")
        written = load_file(folder / place / "adapter_model.safetensors")
        placed = get_peft_model_state_dict(model, adapter_name=name)
        missing, unexpected = sorted(placed.keys() - written.keys()), sorted(written.keys() - placed.keys())
        missing = [key for key in missing if not in_zero_half_of_attention(key, placed, written) and not twice(key)]
        verdicts.check(not missing, f"{title}, {name}: the file lacks {missing}")
        verdicts.check(not unexpected, f"{title}, {name}: PEFT has no place for {unexpected}")
        for key in written.keys() & placed.keys():
            equal = torch.equal(written[key].to(placed[key].dtype), placed[key])
            verdicts.check(equal, f"{title}, {name}: {key} differs")
        count_out_proj_once(model, name)
    model.eval()
    data = load_file(folder / manifest["data"])
    for case in manifest["cases"]:
        if case["active"]:
            model.base_model.set_adapter(case["active"])
            found = model.base_model(data[case["input"]])
        else:  # PEFT leaves trained biases in a model whose adapters are off
            found = base_model(folder, manifest).eval()(data[case["input"]])
        if manifest["model"] == "gpt2":
            found = found.logits
        active = "+".join(case["active"]) or "base"
        verdicts.close(found, data[case["output"]], f"{title}, {active} -> {case['output']}")


def main():
    folders = []
    for argument in map(pathlib.Path, sys.argv[1:]):
        if argument.is_file():
            out = work_folder()
            subprocess.run([argument, "write_adapters", out], check=True)
            argument = out
        folders += sorted(path.parent for path in argument.rglob("manifest.json"))
    verdicts = Verdicts()
    for folder in folders:
        judge(folder, verdicts)
    verdicts.finish()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what PEFT warns of is judged above
    transformers.logging.disable_progress_bar()
    main()
