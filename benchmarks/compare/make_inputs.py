"""Writes what both sides of the comparison read, once: `make_inputs.py FOLDER [E2E_FOLDER]`.

gpt2/            GPT-2 of 124M parameters, drawn at random, as transformers saves it
adapter/         a fresh LoRA of r = 8 on c_attn and attn.c_proj, as PEFT saves it
wide/adapter-*/  two adapters with values for a model of 200 Linear layers
batch.json       4 x 128 tokens
e2e.json         the first 256 lines of E2E as tokens; absent without E2E_FOLDER
"""
import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from models import Wide


def fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def write_e2e(folder, e2e):
    """The tokens of finetune_gpt2's own pairs: " meaning ||" without a loss, " text" and the end with one."""
    from transformers import GPT2Tokenizer

    vocabulary = e2e.parent / "gpt2_vocab"
    tokenizer = GPT2Tokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    lines = []
    for line in (e2e / "train.txt").read_text(encoding="utf-8").splitlines():
        meaning, text = line.split("||", 1)
        prompt = tokenizer.encode(" " + meaning.strip() + " ||")
        lines.append({"prompt": prompt, "text": tokenizer.encode(" " + text.strip()) + [tokenizer.eos_token_id]})
        if len(lines) == 256:
            break
    (folder / "e2e.json").write_text(json.dumps(lines))


def main():
    folder = pathlib.Path(sys.argv[1])
    done = folder / "complete"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    model.save_pretrained(folder / "gpt2")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    tokens = torch.randint(0, 50257, (4, 128)).tolist()
    (folder / "batch.json").write_text(json.dumps(tokens))
    for seed in (1, 2):
        wide = get_peft_model(Wide(), LoraConfig(r=8, target_modules="all-linear"))
        fill(wide, seed)
        wide.save_pretrained(folder / "wide" / f"adapter-{seed}")
    if len(sys.argv) > 2:
        write_e2e(folder, pathlib.Path(sys.argv[2]))
    done.touch()


if __name__ == "__main__":
    main()
