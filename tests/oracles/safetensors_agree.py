"""Do Python's safetensors and ours read and write the same files?

    safetensors_agree.py PROGRAM    PROGRAM copy_safetensors IN OUT loads IN and saves its tensors and metadata as OUT

Python writes a file of every dtype; ours has to come out with the same bytes, and Python reads it with the same values.
"""

import subprocess
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from judging import Verdicts, work_folder

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64)


def example():
    torch.manual_seed(20260106)
    tensors = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        values = torch.randint(0, 120, (3, 5)).to(dtype)
        tensors |= {f"{name}.matrix": values, f"{name}.scalar": values[1, 2].clone(), f"{name}.empty": values[:, :0]}
    return tensors | {"odd name \"\\/\t\x01\x7f\u2028 äöü 語 🙂": torch.ones(2), "": torch.zeros(1)}


def identical(a, b):
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def main():
    program = sys.argv[1]
    folder = work_folder()
    verdicts = Verdicts()
    files = (("all", example(), {"format": "pt"}), ("bare", {"a": torch.ones(3)}, None),
             ("none", {}, {"only": "metadata é \" \\ \n"}))
    for name, tensors, metadata in files:
        theirs, ours = folder / f"{name}.safetensors", folder / f"{name}.ours.safetensors"
        save_file(tensors, theirs, metadata)
        subprocess.run([program, "copy_safetensors", theirs, ours], check=True)
        verdicts.check(theirs.read_bytes() == ours.read_bytes(), f"{name}: the bytes differ")
        loaded = load_file(ours)
        verdicts.check(loaded.keys() == tensors.keys(), f"{name}: names {sorted(loaded)}")
        for key in loaded:
            verdicts.check(identical(loaded[key], tensors[key]), f"{name}: {key} differs")
        with safe_open(ours, "pt") as file:
            verdicts.check(file.metadata() == metadata, f"{name}: metadata {file.metadata()}")
    verdicts.finish()


if __name__ == "__main__":
    main()
