"""Does transformers' GPT-2 compute the same logits as ours from one checkpoint, within 1e-5 of the largest?

    logits_agree.py PROGRAM [MODEL_FOLDER...]    without folders: random checkpoints of several shapes

PROGRAM gpt2_logits MODEL_FOLDER OUT loads a Hugging Face folder, writes OUT/data.safetensors with ids [batch, length] (int64) and
their logits [batch, length, vocab], and saves the model as the folder OUT/model, which transformers then reads too.
"""

import pathlib
import subprocess
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

from judging import Verdicts, work_folder

SHAPES = {
    "plain": dict(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "odd": dict(vocab_size=257, n_positions=33, n_embd=24, n_layer=3, n_head=3, n_inner=40, layer_norm_epsilon=1e-3),
    "one_head": dict(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=1),
}


def random_checkpoint(folder, shape, seed):
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.15)
    model.save_pretrained(folder)


def rewrite_as_older_files_are(folder):
    """No `transformer.` before the names, and the causal masks stored as buffers."""
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    layers = {name.split(".attn.")[0] for name in tensors if ".attn." in name}
    masks = {f"{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in layers}
    save_file(tensors | masks, path, {"format": "pt"})


def main():
    program, *folders = sys.argv[1:]
    work = work_folder()
    folders = list(map(pathlib.Path, folders))
    if not folders:
        for seed, (name, shape) in enumerate(SHAPES.items()):
            folders += [work / name, work / f"{name}_older"]
            for folder in folders[-2:]:
                random_checkpoint(folder, shape, seed)
            rewrite_as_older_files_are(folders[-1])
    verdicts = Verdicts()
    for number, folder in enumerate(folders):
        out = work / f"out{number}"
        out.mkdir()
        subprocess.run([program, "gpt2_logits", folder, out], check=True)
        data = load_file(out / "data.safetensors")
        for source in (folder, out / "model"):
            logits = transformers.GPT2LMHeadModel.from_pretrained(source).eval()(data["ids"]).logits
            verdicts.close(data["logits"], logits, f"logits of {folder.name} from the folder {source.name}")
    verdicts.finish()


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    main()
