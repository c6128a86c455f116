"""Writes schedules.json beside this script: the learning rates of transformers' schedules, step by step.

    tests/oracles/setup && tests/oracles/python tests/golden/generate_schedules.py [OUTPUT FOLDER]
"""

import json
import pathlib
import sys
import warnings

import torch
import transformers

BASE_LRS = [1e-3, 16e-3]
BEYOND = 12  # steps after the total

# name, warm-up steps, total steps, waves of the cosine
ROWS = [
    ("constant", 0, 5, 0.5),
    ("constant", 1, 5, 0.5),
    ("constant", 7, 20, 0.5),
    ("linear", 0, 1, 0.5),
    ("linear", 0, 10, 0.5),
    ("linear", 1, 10, 0.5),
    ("linear", 7, 50, 0.5),
    ("linear", 10, 10, 0.5),
    ("linear", 13, 10, 0.5),
    ("cosine", 0, 1, 0.5),
    ("cosine", 0, 10, 0.5),
    ("cosine", 3, 10, 0.5),
    ("cosine", 7, 50, 0.5),
    ("cosine", 7, 50, 1.75),
    ("cosine", 2, 30, 0.3),
    ("cosine", 0, 20, -1.0),
    ("cosine", 10, 10, 0.5),
    ("cosine", 13, 10, 0.5),
]


def make(optimizer, name, warmup, total, cycles):
    if name == "constant" and warmup == 0:
        return transformers.get_constant_schedule(optimizer)
    if name == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    if name == "linear":
        return transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    return transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total, num_cycles=cycles)


def learning_rates(row):
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in BASE_LRS])
    schedule = make(optimizer, *row)
    lrs = []
    for _ in range(row[2] + BEYOND):
        lrs.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return lrs


def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent
    warnings.simplefilter("ignore")
    keys = ("type", "warmup_steps", "total_steps", "num_cycles")
    rows = [dict(zip(keys, row)) | {"base_lrs": BASE_LRS, "lrs": learning_rates(row)} for row in ROWS]
    lines = ",\n".join(" " + json.dumps(row) for row in rows)
    (out / "schedules.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
