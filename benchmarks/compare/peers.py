"""Python PEFT's side of the comparison: `peers.py CASE --inputs FOLDER --threads N …` prints one line of JSON.

Each case does what the case of the same name in ours.cpp does, as a user of transformers and PEFT would write it.
"""
import argparse
import json
import logging
import pathlib
import statistics
import time
import warnings

import torch

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def resident_bytes(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def reset_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def median_seconds(function, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def load_gpt2(arguments, trainable=True):
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(
        arguments.inputs / "gpt2", dtype=arguments.dtype, attn_implementation="sdpa")
    return PeftModel.from_pretrained(model, arguments.inputs / "adapter", is_trainable=trainable)


def train_on(arguments, model, batches):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses}


def train(arguments):
    import peft
    import transformers
    peft, transformers.GPT2LMHeadModel  # imported before the idle process is measured
    idle = resident_bytes("VmRSS")
    model = load_gpt2(arguments)
    ids = torch.tensor(json.loads((arguments.inputs / "batch.json").read_text()))
    reset_peak()
    result = train_on(arguments, model, [{"input_ids": ids, "labels": ids}] * arguments.steps)
    return result | {"peak_bytes": resident_bytes("VmHWM") - idle}


def dora(arguments):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(
        arguments.inputs / "gpt2", dtype=arguments.dtype, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, use_dora=True, fan_in_fan_out=True,
                                             target_modules=["c_attn", "attn.c_proj"]))
    ids = torch.tensor(json.loads((arguments.inputs / "batch.json").read_text()))
    return train_on(arguments, model, [{"input_ids": ids, "labels": ids}] * arguments.steps)


def e2e(arguments):
    lines = json.loads((arguments.inputs / "e2e.json").read_text())
    batches = []
    for begin in range(0, len(lines), 8):
        rows = lines[begin:begin + 8]
        length = max(len(row["prompt"]) + len(row["text"]) for row in rows)
        ids = torch.full((len(rows), length), 50256)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        labels = torch.full((len(rows), length), -100)
        for i, row in enumerate(rows):
            tokens = torch.tensor(row["prompt"] + row["text"])
            ids[i, :len(tokens)] = tokens
            mask[i, :len(tokens)] = 1
            labels[i, len(row["prompt"]):len(tokens)] = torch.tensor(row["text"])
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    tokens = sum(len(row["prompt"]) + len(row["text"]) for row in lines)
    return train_on(arguments, load_gpt2(arguments), batches) | {"tokens": tokens}


def growth(arguments):
    """How the seconds of a step grow with one size while the others are GPT-2 124M's, r = 8 and 512 tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    def seconds(rank, tokens, layers):
        config = GPT2Config(n_layer=layers, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, attn_implementation="sdpa")
        model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(
            r=rank, lora_alpha=16, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True))
        length = min(tokens, 128)
        ids = torch.randint(0, config.vocab_size, (tokens // length, length))
        return min(train_on(arguments, model, [{"input_ids": ids, "labels": ids}] * arguments.steps)["seconds"])

    return {"rank": [[rank, seconds(rank, 512, 12)] for rank in (1, 4, 16, 64, 256)],
            "tokens": [[tokens, seconds(8, tokens, 12)] for tokens in (64, 256, 1024, 4096)],
            "layers": [[layers, seconds(8, 512, layers)] for layers in (1, 4, 16)]}


def merge(arguments):
    model = load_gpt2(arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    model.eval()
    merges, unmerges = [], []
    for _ in range(arguments.steps):
        merges.append(median_seconds(model.merge_adapter, 1))
        unmerges.append(median_seconds(model.unmerge_adapter, 1))
    return {"merge_seconds": merges, "unmerge_seconds": unmerges}


def merge_square(arguments):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False)).to(arguments.dtype),
                           LoraConfig(r=8, target_modules=["0"]))
    merges, unmerges = [], []
    for _ in range(arguments.steps):
        merges.append(median_seconds(model.merge_adapter, 1))
        unmerges.append(median_seconds(model.unmerge_adapter, 1))
    return {"merge_seconds": merges, "unmerge_seconds": unmerges}


def load(arguments):
    from peft import PeftModel

    from models import Wide

    folder = arguments.inputs / "wide"
    model = PeftModel.from_pretrained(Wide(), folder / "adapter-1")
    loads, switches = [], []
    for i in range(arguments.steps):
        name = f"other{i}"
        loads.append(median_seconds(lambda: model.load_adapter(folder / "adapter-2", name), 1))
        switches.append(median_seconds(lambda: model.set_adapter(name), 1))
        switches.append(median_seconds(lambda: model.set_adapter("default"), 1))
        model.delete_adapter(name)
    return {"load_seconds": loads, "switch_seconds": switches}


def start(arguments):
    model = load_gpt2(arguments)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    torch.tensor(json.loads((arguments.inputs / "batch.json").read_text()))
    return {"clock": time.time()}


def limits(arguments):
    x, weight = torch.randn(512, 768).to(arguments.dtype), torch.randn(3072, 768).to(arguments.dtype)
    with torch.no_grad():
        times = [median_seconds(lambda: torch.nn.functional.linear(x, weight), 1) for _ in range(30)]
    return {"flops_per_second": 2 * 512 * 768 * 3072 / min(times)}


def main():
    cases = {function.__name__: function
             for function in (train, dora, e2e, growth, merge, merge_square, load, start, limits)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=cases)
    parser.add_argument("--inputs", type=pathlib.Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    arguments.dtype = getattr(torch, arguments.dtype)
    torch.set_num_threads(arguments.threads)
    print(json.dumps(cases[arguments.case](arguments)))


if __name__ == "__main__":
    main()
