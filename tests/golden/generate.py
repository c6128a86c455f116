"""Writes the golden files beside this script with Python PEFT and transformers; README.md describes each tensor.

    tests/oracles/setup && tests/oracles/python tests/golden/generate.py [OUTPUT FOLDER]

A second run with the versions of tests/oracles/requirements.txt writes the same bytes on the same processor.
"""

import json
import os
import pathlib
import shutil
import sys
import warnings

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes target_modules in a set's order
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent / "oracles"))

import peft
import safetensors
import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from generate_options import write_options
from models import MhaBlock, Mlp

LR, WEIGHT_DECAY, LR_RATIO, LR_EMBEDDING = 1e-3, 0.01, 16, 1e-6


def randomize(module, std):
    """Draws every trainable tensor anew, so that B is not zero and no two biases are alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, std)


def adapter_tensors(model):
    """name of the adapted module -> {"lora_A": A, "lora_B": B}, names as in the base model."""
    return {
        name.removeprefix("base_model.model."):
            {kind: getattr(module, kind)["default"].weight for kind in ("lora_A", "lora_B")}
        for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def flat(model, suffix, of):
    return {f"{name}.{kind}{suffix}": of(tensor)
            for name, pair in adapter_tensors(model).items() for kind, tensor in pair.items()}


def store(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def store_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_adapter(model, folder):
    model.save_pretrained(folder)
    for card in folder.rglob("README.md"):  # a template of PEFT's that says nothing about these files
        card.unlink()


def after_one_step(model, make_optimizer, suffix):
    """The adapter's tensors after one optimizer step; the model is left as it was."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_optimizer(model).step()
    stepped = flat(model, suffix, lambda t: t.detach().clone())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return stepped


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=WEIGHT_DECAY)


def adamw_loraplus(model):
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=LR_RATIO, loraplus_lr_embedding=LR_EMBEDDING,
        loraplus_weight_decay=WEIGHT_DECAY)


def merged_weights(model):
    """Merges for good: {"<module>.merged": weight}; the model is used up."""
    names = list(adapter_tensors(model))
    merged = model.merge_and_unload()
    return merged, {f"{name}.merged": merged.get_submodule(name).weight for name in names}


def write_mlp(folder):
    torch.manual_seed(20260101)
    base = Mlp()
    x, g = torch.randn(5, 12), torch.randn(5, 8)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    store(folder / "base.safetensors", weights)
    store(folder / "data.safetensors", {"x": x, "g": g, "y_base": base(x)})

    def fresh():
        module = Mlp()
        module.load_state_dict(weights)
        return module

    variants = {
        "plain": LoraConfig(r=3, lora_alpha=7, target_modules=["up", "down"]),
        "rslora": LoraConfig(r=3, lora_alpha=7, target_modules=["up", "down"], use_rslora=True),
        "patterns": LoraConfig(
            r=3, lora_alpha=7, target_modules="up|down", rank_pattern={"down": 5},
            alpha_pattern={"^up": 11, "down": 2}),
        "one_target": LoraConfig(r=4, lora_alpha=2, target_modules=["down"], init_lora_weights="gaussian"),
    }
    for name, config in variants.items():
        model = get_peft_model(fresh(), config)
        randomize(model, 0.3)
        save_adapter(model, folder / name)
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        (y * g).sum().backward()
        expected = {"y": y, "dx": inputs.grad}
        expected |= flat(model, "", lambda t: t) | flat(model, ".grad", lambda t: t.grad)
        expected |= after_one_step(model, adamw, ".adamw") | after_one_step(model, adamw_loraplus, ".adamw_loraplus")
        merged, tensors = merged_weights(model)
        store(folder / name / "expected.safetensors", expected | tensors | {"y_merged": merged(x)})

    model = get_peft_model(fresh(), LoraConfig(r=3, lora_alpha=7, target_modules=["up", "down"]))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=5, target_modules=["down"]))
    for name in ("default", "other"):
        model.base_model.set_adapter(name)
        randomize(model, 0.3)
    expected = {}
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        expected["y_" + "_and_".join(active)] = model(x)
    model.base_model.set_adapter(["default", "other"])
    save_adapter(model, folder / "two_adapters")
    store(folder / "two_adapters" / "expected.safetensors", expected)


def write_gpt2(folder):
    torch.manual_seed(20260102)
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0)
    base = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.15)
    base.save_pretrained(folder / "model")
    (folder / "model" / "generation_config.json").unlink()

    ids = torch.randint(0, config.vocab_size, (2, 17))
    g = torch.randn(2, 17, config.vocab_size)
    plain = base(ids, labels=ids)
    expected = {"ids": ids, "g": g, "logits_base": plain.logits, "loss_base": plain.loss}
    model = get_peft_model(base, LoraConfig(
        r=4, lora_alpha=12, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"))
    randomize(model, 0.15)
    save_adapter(model, folder / "adapter")
    adapted = model(input_ids=ids, labels=ids)
    (adapted.logits * g).sum().backward()
    expected |= {"logits_adapted": adapted.logits, "loss_adapted": adapted.loss}
    expected |= flat(model, ".grad", lambda t: t.grad)
    merged, tensors = merged_weights(model)
    store(folder / "expected.safetensors", expected | tensors | {"logits_merged": merged(ids).logits})


def dense_mha(weights, deltas, x):
    """MultiheadAttention as defined, with `deltas` added once to the weights of the same names."""
    w = {name: weights[name] + deltas.get(name, 0) for name in weights}
    return torch.nn.functional.multi_head_attention_forward(
        x, x, x, 16, 4, w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False, 0.0,
        w["attn.out_proj.weight"], w["attn.out_proj.bias"], need_weights=False)[0]


def write_mha(folder):
    torch.manual_seed(20260103)
    base = MhaBlock()
    randomize(base, 0.3)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    x, g = torch.randn(6, 2, 16), torch.randn(6, 2, 16)
    store(folder / "base.safetensors", weights)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, target_modules=["attn"]))
    randomize(model, 0.3)
    save_adapter(model, folder / "adapter")

    attention = model.base_model.model.attn
    factors = {"attn.in_proj_weight": attention, "attn.out_proj.weight": attention.base_layer.out_proj}
    pairs = {name: (layer.lora_A["default"].weight.detach().clone().requires_grad_(),
                    layer.lora_B["default"].weight.detach().clone().requires_grad_())
             for name, layer in factors.items()}

    def output(inputs, out_proj_count):
        count = {"attn.in_proj_weight": 1, "attn.out_proj.weight": out_proj_count}
        return dense_mha(weights, {name: count[name] * 7 / 3 * (b @ a) for name, (a, b) in pairs.items()}, inputs)

    inputs = x.clone().requires_grad_()
    y = output(inputs, 1)
    (y * g).sum().backward()
    y_peft = model(x)
    torch.testing.assert_close(y_peft, output(x, 2), rtol=1e-5, atol=1e-5)
    assert (y_peft - y).abs().max() > 1e-2
    expected = {"x": x, "g": g, "y_base": dense_mha(weights, {}, x), "y": y, "dx": inputs.grad, "y_peft": y_peft}
    for name, (a, b) in pairs.items():
        stem = name.removesuffix("_weight").removesuffix(".weight")
        expected |= {f"{stem}.lora_A.grad": a.grad, f"{stem}.lora_B.grad": b.grad,
                     f"{stem}.merged": weights[name] + 7 / 3 * (b @ a)}
    store(folder / "expected.safetensors", expected)


def write_loraplus_groups(path):
    """PEFT's LoRA+ groups of a model with an embedding, and of one whose adapter has a bias."""
    table = {"lr": LR, "lr_ratio": LR_RATIO, "lr_embedding": LR_EMBEDDING, "weight_decay": WEIGHT_DECAY}
    for case, config in {"embedding": LoraConfig(r=2, target_modules=["wte", "fc"]),
                         "lora_bias": LoraConfig(r=2, target_modules=["fc"], lora_bias=True)}.items():
        model = torch.nn.Sequential()
        model.add_module("wte", torch.nn.Embedding(11, 6))
        model.add_module("fc", torch.nn.Linear(6, 4))
        peft_model = get_peft_model(model, config)
        names = {id(p): name.removeprefix("base_model.model.") for name, p in peft_model.named_parameters()}
        table[case] = [{"lr": group["lr"], "weight_decay": group["weight_decay"],
                        "parameters": [names[id(p)] for p in group["params"]]}
                       for group in adamw_loraplus(peft_model).param_groups]
    store_json(path, table)


def write_init_statistics(path):
    rows = []
    for in_features, out_features, r in ((64, 48, 4), (256, 96, 8), (1024, 32, 16)):
        for init in (True, "gaussian"):
            torch.manual_seed(20260104)
            draws = {"lora_A": [], "lora_B": []}
            for _ in range(max(1, 200_000 // (r * in_features))):
                layer = get_peft_model(
                    torch.nn.Sequential(torch.nn.Linear(in_features, out_features)),
                    LoraConfig(r=r, target_modules=["0"], init_lora_weights=init)).base_model.model[0]
                for kind in draws:
                    draws[kind].append(getattr(layer, kind)["default"].weight.detach().flatten())
            a, b = torch.cat(draws["lora_A"]), torch.cat(draws["lora_B"])
            rows.append({
                "init_lora_weights": init, "in": in_features, "out": out_features, "r": r, "samples": a.numel(),
                "a_mean": a.mean().item(), "a_std": a.std().item(), "a_min": a.min().item(), "a_max": a.max().item(),
                "a_kurtosis": ((a - a.mean()) ** 4).mean().item() / a.var().item() ** 2,
                "a_std_by_definition": 1 / (3 * in_features) ** 0.5 if init is True else 1 / r,
                "b_max_abs": b.abs().max().item()})
    store_json(path, rows)


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)


class Nested(torch.nn.Module):
    """Nothing is computed: only the names and kinds of the modules count."""

    def __init__(self):
        super().__init__()

        def linear():
            return torch.nn.Linear(4, 6)

        def block():
            attention = torch.nn.ModuleDict({n: linear() for n in ("q_proj", "k_proj", "v_proj", "out_proj")})
            mlp = torch.nn.ModuleDict({"fc1": linear(), "fc2": linear()})
            return torch.nn.ModuleDict({"self_attn": attention, "mlp": mlp, "norm": torch.nn.LayerNorm(4)})

        def expert_block():
            experts = torch.nn.ModuleList(Expert() for _ in range(2))
            return torch.nn.ModuleDict({"experts": experts, "gate": linear()})

        self.embed = torch.nn.Embedding(10, 4)
        self.encoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(block() for _ in range(3))})
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"proj": linear()}) for _ in range(2))
        self.moe = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(expert_block() for _ in range(2))})
        self.deep = torch.nn.ModuleDict(
            {"h": torch.nn.ModuleList(torch.nn.ModuleDict({"xq_proj": linear()}) for _ in range(12))})
        self.proj = linear()
        self.q_proj = linear()
        self.q_proj_2 = linear()
        self.head = linear()


MATCHING = [
    ("a suffix hits at every depth, and the root's own name", dict(target_modules=["q_proj"])),
    ("a suffix ends at a dot: proj is not q_proj", dict(target_modules=["proj"])),
    ("several parts of the path", dict(target_modules=["self_attn.q_proj"])),
    ("a suffix does not begin within a name: attn.q_proj", dict(target_modules=["attn.q_proj"])),
    ("one full name", dict(target_modules=["encoder.layers.1.mlp.fc1"])),
    ("several entries, one of which matches nothing: PEFT says nothing", dict(target_modules=["fc1", "fc3"])),
    ("no entry matches", dict(target_modules=["fc3"])),
    ("a list entry is no regex", dict(target_modules=[r".*q_proj"])),
    ("a list entry is no regex: the others still match", dict(target_modules=[r".*\.k_proj", "v_proj"])),
    ("a prefix of the path matches nothing", dict(target_modules=["encoder.layers.0"])),
    ("PEFT's own prefix matches nothing", dict(target_modules=["base_model.model.q_proj"])),
    ("an empty list", dict(target_modules=[])),
    ("a container is no layer", dict(target_modules=["self_attn"])),
    ("a LayerNorm is no layer of LoRA", dict(target_modules=["norm"])),
    ("list entries are case-sensitive", dict(target_modules=["Q_proj"])),
    ("a digit as an entry", dict(target_modules=["0"])),
    ("regex: fullmatch, not search", dict(target_modules="q_proj")),
    ("regex: alternation is as wide as the string", dict(target_modules="q_proj|proj")),
    ("regex: every q_proj and v_proj", dict(target_modules=r".*\.(q|v)_proj")),
    ("regex: without the dot, names that end alike match too", dict(target_modules=r".*q_proj")),
    ("regex: a class and a count", dict(target_modules=r"encoder\.layers\.[0-1]\.mlp\.fc\d{1}")),
    ("regex: an unescaped dot is any character", dict(target_modules=r"encoder.layers.2.self_attn.k.proj")),
    ("regex: negative look-ahead", dict(target_modules=r"encoder\.layers\.(?!1\.)\d+\.mlp\.fc1")),
    ("regex: look-behind", dict(target_modules=r".*(?<=self_attn\.)(?:q|k)_proj")),
    ("regex: a backreference", dict(target_modules=r".*\.layers\.(\d)\.experts\.\1\.w1")),
    ("regex: anchors and lazy repeats are redundant", dict(target_modules=r"^encoder\..*?fc2$")),
    ("regex: the flag for case", dict(target_modules=r"(?i)ENCODER\.LAYERS\.0\.MLP\.FC1")),
    ("regex: a named group", dict(target_modules=r"deep\.h\.(?P<n>1\d?)\.xq_proj")),
    ("regex: word characters and a boundary", dict(target_modules=r"\w+\bproj|q_proj\w+")),
    ("regex: not valid", dict(target_modules=r"(q_proj")),
    ("all-linear: every Linear, embeddings and norms not", dict(target_modules="all-linear")),
    ("all-linear in any case", dict(target_modules="ALL-Linear")),
    ("all-linear with a task type: a plain module's head stays in",
     dict(target_modules="all-linear", task_type="FEATURE_EXTRACTION")),
    ("all-linear less a list",
     dict(target_modules="all-linear", exclude_modules=["xq_proj", "w1", "w2", "gate", "head"])),
    ("all-linear in a list is a name", dict(target_modules=["all-linear"])),
    ("exclude: a suffix", dict(target_modules=["q_proj", "k_proj"], exclude_modules=["self_attn.q_proj"])),
    ("exclude: the full name of the root's own only",
     dict(target_modules=["fc1"], exclude_modules=["encoder.layers.0.mlp.fc1"])),
    ("exclude: ends at a dot as well", dict(target_modules=["xq_proj", "q_proj"], exclude_modules=["q_proj"])),
    ("exclude: a container excludes nothing below it", dict(target_modules=["q_proj"], exclude_modules=["self_attn"])),
    ("exclude: regex", dict(target_modules=["fc1", "fc2"], exclude_modules=r"encoder\.layers\.[02]\..*")),
    ("exclude: regex is fullmatch", dict(target_modules=["fc1"], exclude_modules=r"layers\.0")),
    ("exclude: everything", dict(target_modules=["gate"], exclude_modules=["gate"])),
    ("modules_to_save keeps adapters away, below it too",
     dict(target_modules=["fc1", "w1"], modules_to_save=["experts.0"])),
    ("modules_to_save is no suffix of a name", dict(target_modules=["q_proj"], modules_to_save=["head"])),
    ("layers: one number", dict(target_modules=["q_proj"], layers_to_transform=1)),
    ("layers: a list", dict(target_modules=["fc1", "fc2"], layers_to_transform=[0, 2])),
    ("layers: an empty list is no restriction", dict(target_modules=["fc1"], layers_to_transform=[])),
    ("layers: two components must stand before the number",
     dict(target_modules=["proj", "fc1"], layers_to_transform=[0])),
    ("layers: the first number counts, not the expert's", dict(target_modules=["w1"], layers_to_transform=[1])),
    ("layers: 1 is not 10", dict(target_modules=["xq_proj"], layers_to_transform=[1, 11])),
    ("layers: an entry that is a full name is exempt",
     dict(target_modules=["encoder.layers.2.mlp.fc1", "fc2"], layers_to_transform=[0])),
    ("layers: a name without a number never matches", dict(target_modules=["head", "fc1"], layers_to_transform=[0])),
    ("layers: none of that number", dict(target_modules=["fc1"], layers_to_transform=[7])),
    ("layers_pattern: the list's name",
     dict(target_modules=["proj", "fc1"], layers_to_transform=[0], layers_pattern="layers")),
    ("layers_pattern: another list's number",
     dict(target_modules=["w1"], layers_to_transform=[0], layers_pattern=["experts"])),
    ("layers_pattern: the first that hits",
     dict(target_modules=["w1"], layers_to_transform=[0], layers_pattern=["layers", "experts"])),
    ("layers_pattern: names no list", dict(target_modules=["fc1"], layers_to_transform=[0], layers_pattern="blocks")),
    ("layers with a regex are refused", dict(target_modules=r".*fc1", layers_to_transform=[0])),
    ("layers_pattern without layers is refused", dict(target_modules=["fc1"], layers_pattern="layers")),
    ("rank: a suffix", dict(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 16})),
    ("rank: ends at a dot", dict(target_modules=["q_proj", "xq_proj"], rank_pattern={"q_proj": 16})),
    ("rank: a path from the middle", dict(target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2})),
    ("rank: a regex", dict(target_modules=["fc1", "fc2"], rank_pattern={r"layers\.[12]\.mlp\.fc\d": 3})),
    ("rank: the first key that hits wins",
     dict(target_modules=["fc1"], rank_pattern={r"layers\.0\.mlp\.fc1": 2, "fc1": 5})),
    ("rank: the first key that hits wins, turned round",
     dict(target_modules=["fc1"], rank_pattern={"fc1": 5, r"layers\.0\.mlp\.fc1": 2})),
    ("rank: an alternation", dict(target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={"q_proj|v_proj": 6})),
    ("rank: ^ only from the root", dict(target_modules=["q_proj"], rank_pattern={"^q_proj": 6})),
    ("rank: ^ with the full path",
     dict(target_modules=["q_proj"], rank_pattern={"^encoder.layers.1.self_attn.q_proj": 6})),
    ("rank: a container's name never matches", dict(target_modules=["q_proj"], rank_pattern={"self_attn": 6})),
    ("rank: PEFT's own prefix never matches", dict(target_modules=["head"], rank_pattern={"base_model.model.head": 6})),
    ("alpha: apart from rank", dict(target_modules=["fc1", "fc2"], rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 32})),
    ("alpha and rank on one module",
     dict(target_modules=["fc1"], rank_pattern={"0.mlp.fc1": 2}, alpha_pattern={"0.mlp.fc1": 3})),
    ("alpha with rsLoRA",
     dict(target_modules=["fc1", "fc2"], use_rslora=True, rank_pattern={"fc1": 9}, alpha_pattern={"fc2": 32})),
    ("no r: PEFT's defaults", dict(target_modules=["head"])),
    ("r = 0 is refused", dict(target_modules=["head"], r=0)),
    ("an alpha that is no multiple of r", dict(target_modules=["head"], r=3, lora_alpha=7)),
]


def match(description, options):
    row = {"description": description, "config": options, "matched": [], "error": None}
    try:
        model = get_peft_model(Nested(), LoraConfig(**options))
    except Exception as error:
        return row | {"error": {"type": type(error).__name__, "message": str(error).split("\n")[0]}}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            row["matched"].append({"name": name, "r": module.r["default"], "scaling": module.scaling["default"]})
    return row


def write_matching(path):
    modules = [{"name": name, "type": type(module).__name__} for name, module in Nested().named_modules() if name]
    store_json(path, {"modules": modules, "rows": [match(*row) for row in MATCHING]})


CONFIGS = {
    "defaults": dict(target_modules=["q_proj", "v_proj"]),
    "causal_lm": dict(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "regex": dict(r=4, target_modules=r".*\.(q|v)_proj", exclude_modules=r".*\.0\..*", init_lora_weights="gaussian"),
    "all_linear": dict(target_modules="all-linear", exclude_modules=["head"]),
    "patterns": dict(
        target_modules=["fc1"], rank_pattern={"0.mlp.fc1": 2, "fc1": 3}, alpha_pattern={"fc1": 9}, use_rslora=True),
    "layers": dict(target_modules=["fc1"], layers_to_transform=[0, 1], layers_pattern="layers"),
    "beyond_lora": dict(target_modules=["fc1"], use_dora=True, bias="lora_only", modules_to_save=["head"]),
}


def write_configs(folder):
    for name, options in CONFIGS.items():
        LoraConfig(**options).save_pretrained(folder / name)


def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in ("mlp", "gpt2", "mha", "options", "configs"):
        shutil.rmtree(out / name, ignore_errors=True)
    write_mlp(out / "mlp")
    write_gpt2(out / "gpt2")
    write_mha(out / "mha")
    write_options(out / "options")
    write_configs(out / "configs")
    write_loraplus_groups(out / "loraplus_groups.json")
    write_init_statistics(out / "init_statistics.json")
    write_matching(out / "matching.json")
    store_json(out / "versions.json", {
        module.__name__: module.__version__.partition("+")[0]
        for module in (peft, torch, transformers, tokenizers, safetensors)})
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
