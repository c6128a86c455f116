"""Writes the tables of docs/performance.md, and its pictures, from what benchmarks/compare/run wrote.

From the project's root: python3 docs/scripts/performance.py [--check]
  --check: change nothing, and exit with 1 where the page is not what the figures give

The figures are docs/figures/performance.json: benchmarks/compare/run --json docs/figures/performance.json. The pictures
need matplotlib; they are left as they are where it is not there.
"""

import importlib.machinery
import importlib.util
import json
import pathlib
import re
import sys

from tables import write

DOCS = pathlib.Path(__file__).resolve().parent.parent
PAGE = DOCS / "performance.md"
FIGURES = DOCS / "figures"
RUN = DOCS.parent / "benchmarks" / "compare" / "run"

# What the operators of one step do, by the beginnings of their names.
PARTS = {
    "products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::matmul", "aten::linear", "aten::bmm"),
    "attention": ("aten::scaled_dot_product_attention", "torch::autograd::CppNode<lora::detail::Attention"),
    "GELU": ("aten::gelu", "torch::autograd::CppNode<lora::detail::Gelu"),
    "layer norms": ("aten::native_layer_norm",),
    "copies and sums": ("aten::copy_", "aten::cat", "aten::add", "aten::mul", "aten::sum", "aten::fill_", "aten::zero_"),
    "outside of operators, the loss's pass over the logits among it": ("outside of operators",),
}


def compare_run():
    loader = importlib.machinery.SourceFileLoader("compare_run", str(RUN))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("compare_run", loader))
    loader.exec_module(module)
    return module


def parts(profile):
    """Seconds by part; "the rest" takes what belongs to none."""
    found = dict.fromkeys(PARTS, 0.0) | {"the rest": 0.0}
    for name, seconds in profile.items():
        name = re.sub(r"lora::abi\d+::", "lora::", name)
        part = next((part for part, beginnings in PARTS.items() if name.startswith(beginnings)), "the rest")
        found[part] += seconds
    return found


def profile_table(profiles):
    columns = {dtype: parts(profile) for dtype, profile in profiles.items()}
    rows = ["| part of a step | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for part in next(iter(columns.values())):
        cells = [f"{1e3 * column[part]:.0f} ms, {column[part] / sum(column.values()):.0%}" for column in columns.values()]
        rows.append(f"| {part} | " + " | ".join(cells) + " |")
    return rows


def growth_table(growth, key):
    rows = [f"| {key} | ours, ms | PEFT, ms | ratio |", "|---|---|---|---|"]
    for (size, ours), (_, peer) in zip(growth["ours"][key], growth["peer"][key]):
        rows.append(f"| {size} | {1e3 * ours:.0f} | {1e3 * peer:.0f} | {peer / ours:.2f} |")
    return rows


def draw_growth(growth):
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no pictures: matplotlib is not there", file=sys.stderr)
        return
    pyplot.rcParams["svg.hashsalt"] = "lora"
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    labels = {"rank": "rank", "tokens": "tokens a step", "layers": "layers"}
    for axis, (key, label) in zip(axes, labels.items()):
        for side, color, name in (("peer", "#c44e52", "PEFT"), ("ours", "#4c72b0", "lora")):
            sizes, seconds = zip(*growth[side][key])
            axis.plot(sizes, seconds, "o-", color=color, label=name)
        logarithmic = key == "tokens"
        axis.set(xlabel=label, xscale="linear" if key == "layers" else "log", yscale="log" if logarithmic else "linear")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(True, which="major", alpha=0.3)
        if not logarithmic:
            axis.set_ylim(bottom=0)
    axes[0].set_ylabel("seconds a training step")
    axes[0].legend()
    figure.savefig(FIGURES / "performance_growth.svg", metadata={"Date": None})


def main():
    report = json.loads((FIGURES / "performance.json").read_text(encoding="utf-8"))
    tables = {"rows": compare_run().markdown(report).rstrip("\n").splitlines(),
              "profile": profile_table(report["profile"])}
    tables |= {key: growth_table(report["growth"], key) for key in ("rank", "tokens", "layers")}
    write(PAGE, tables)
    draw_growth(report["growth"])


if __name__ == "__main__":
    main()
