"""Do Python's torch.save and torch.load and ours read and write the same tensors?

    torch_pickle_agrees.py PROGRAM FILE...      PROGRAM copy_torch_pickle IN OUT loads IN and saves its tensors as OUT

Python writes what state dicts hold; ours has to come out with the same names and values, for torch.load with
weights_only. FILEs are read too, as far as they are there. What is no dict of tensors has to be refused by name.
"""

import collections
import pathlib
import subprocess
import sys

import torch

from judging import Verdicts, work_folder

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128)


def examples():
    torch.manual_seed(20260106)
    dtypes = {}
    for dtype in DTYPES:
        values = torch.randint(0, 2, (3, 5)).to(dtype)
        name = str(dtype).removeprefix("torch.")
        dtypes |= {f"{name}.matrix": values, f"{name}.scalar": values[1, 2].clone(), f"{name}.empty": values[:, :0]}
    base = torch.randn(4, 6)
    views = {"base": base, "row": base[2], "transposed": base.t(), "strided": base[:, ::2], "again": base,
             "expanded": base[:1].expand(3, 6), "conj": torch.randn(3, dtype=torch.complex64).conj(),
             "neg": torch.randn(3, dtype=torch.complex64).conj().imag}
    model = torch.nn.Sequential(collections.OrderedDict(
        zz=torch.nn.Linear(3, 2), norm=torch.nn.BatchNorm1d(2), aa=torch.nn.Embedding(5, 3)))
    return {
        "dtypes": dtypes,
        "views": views,
        "state_dict": model.state_dict(),
        "parameters": {name: value for name, value in model.named_parameters()},
        "nested": {"model": {"a": base, "b": {"c": base[0]}}, "ema": collections.OrderedDict(d=base[1:])},
        "none": {},
        "odd_names": {"odd \"\\/\t\x01\x7f\u2028 äöü 語 🙂": torch.ones(2), "": torch.zeros(1)},
        "many": {f"layer.{i}": torch.full((2,), float(i)) for i in range(400)},
    }


def flattened(state, prefix=""):
    for name, value in state.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def identical(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (tensor.detach().resolve_conj().resolve_neg().contiguous() for tensor in (a, b))
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def judge(verdicts, program, title, path, expected):
    ours = path.with_suffix(".ours.pt")
    if not verdicts.check(subprocess.run([program, "copy_torch_pickle", path, ours]).returncode == 0, f"{title}: is not read"):
        return
    for mapped in (False, True):
        loaded = torch.load(ours, weights_only=True, mmap=mapped)
        verdicts.check(type(loaded) is dict, f"{title}: {type(loaded)}")
        # std::map orders names by their bytes.
        names = sorted(expected, key=lambda name: name.encode())
        verdicts.check(list(loaded) == names, f"{title}: names {list(loaded)[:9]}, expected {names[:9]}")
        for name in loaded.keys() & expected.keys():
            verdicts.check(identical(loaded[name], expected[name]), f"{title}: {name} differs")
            verdicts.check(not loaded[name].requires_grad, f"{title}: {name} requires a gradient")
    return loaded


class Custom:
    pass


def refused(verdicts, program, folder):
    base = torch.randn(3)
    cases = {
        "an integer": ({"model": {"epoch": 3, "w": base}}, "found a builtins.int at model.epoch, expected tensors"),
        "an object": ({"w": base, "config": Custom()}, "found a call of __main__.Custom at config"),
        "a list": ([base], "found a builtins.list, expected a dict of tensors"),
        "a tensor": (base, "_rebuild_tensor_v2, expected a dict of tensors"),
        "a sparse tensor": ({"s": torch.eye(3).to_sparse()}, "found a call of torch._utils._rebuild_sparse_tensor at s"),
        "a quantized tensor": ({"q": torch.quantize_per_tensor(base, 0.1, 0, torch.qint8)},
                               "found a call of torch._utils._rebuild_qtensor at q"),
        "an int key": ({0: base}, "found a builtins.int as a key"),
        "an optimizer": ({"optimizer": torch.optim.SGD([base], lr=0.1).state_dict()},
                         "found a builtins.list at optimizer.param_groups"),
    }
    for title, (value, message) in cases.items():
        torch.save(value, folder / "refused.pt")
        judge_refused(verdicts, program, title, folder / "refused.pt", message)
    torch.save({"w": base}, folder / "refused.pt", _use_new_zipfile_serialization=False)
    judge_refused(verdicts, program, "legacy", folder / "refused.pt", "the format of PyTorch before 1.6")
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "refused.pt")
    judge_refused(verdicts, program, "TorchScript", folder / "refused.pt", "found a TorchScript module")


def judge_refused(verdicts, program, title, path, message):
    result = subprocess.run([program, "copy_torch_pickle", path, path.with_suffix(".ours.pt")], capture_output=True, text=True)
    verdicts.check(result.returncode == 2 and message in result.stderr, f"{title}: {result.stderr}")


def main():
    program = sys.argv[1]
    folder = work_folder()
    verdicts = Verdicts()
    for protocol in (2, 3, 4, 5):
        for title, state in examples().items():
            path = folder / f"{title}.{protocol}.pt"
            torch.save(state, path, pickle_protocol=protocol)
            loaded = judge(verdicts, program, f"{title}, protocol {protocol}", path, dict(flattened(state)))
            if title == "views" and loaded:
                tied = loaded["base"].data_ptr() == loaded["again"].data_ptr()
                verdicts.check(tied and loaded["base"].data_ptr() != loaded["row"].data_ptr(), "views: sharing")
    torch.serialization.set_crc32_options(False)
    torch.save(examples()["views"], folder / "unchecked.pt")
    torch.serialization.set_crc32_options(True)
    judge(verdicts, program, "without checksums", folder / "unchecked.pt", torch.load(folder / "unchecked.pt"))
    for path in map(pathlib.Path, sys.argv[2:]):
        if not path.exists():
            print(f"not there: {path}")
            continue
        link = folder / path.name
        link.symlink_to(path)
        judge(verdicts, program, path.name, link, torch.load(path, weights_only=True, map_location="cpu"))
    refused(verdicts, program, folder)
    verdicts.finish()


if __name__ == "__main__":
    main()
