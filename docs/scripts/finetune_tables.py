"""Writes the tables of docs/finetune_gpt2.md from the figures that finetune_gpt2 --json wrote.

From the project's root: python3 docs/scripts/finetune_tables.py [--check]
  --check: change nothing, and exit with 1 where the page is not what the figures give
"""

import json
import pathlib
import statistics

from tables import write

DOCS = pathlib.Path(__file__).resolve().parent.parent
PAGE = DOCS / "finetune_gpt2.md"


def size(count):
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def mean(runs, key):
    return statistics.mean(run[key] for run in runs)


def spread(runs, key):
    return f"{mean(runs, key):.4f} ± {statistics.stdev(run[key] for run in runs):.4f}"


def groups(runs):
    """Runs that differ in their seed alone, by method and learning rate."""
    found = {}
    for run in runs:
        found.setdefault(run["method"], {}).setdefault(run["learning_rate"], []).append(run)
    return found


def comparison(runs):
    found = groups(runs)
    seeds = max(len(group) for rates in found.values() for group in rates.values())
    # A rate with a diverged seed has fewer runs and is out.
    best = {method: min((group for group in rates.values() if len(group) == seeds), key=lambda group: mean(group, "dev_loss_after"))
            for method, rates in found.items()}
    full = best["full"]
    gain = lambda group: mean(group, "dev_loss_before") - mean(group, "dev_loss_after")
    rows = ["| method | lr | trained parameters | saved | training | peak memory | new domain, dev loss | gain | old domains, dev loss |",
            "|---|---|---|---|---|---|---|---|---|",
            f"| none | | | | | | {mean(full, 'dev_loss_before'):.4f} | | {mean(full, 'old_domain_loss_before'):.4f} |"]
    for method, group in best.items():
        trained = group[0]["trainable_parameters"]
        rows.append(f"| {method} | {group[0]['learning_rate']:g} | {trained:,} ({100 * trained / full[0]['trainable_parameters']:.1f} %) | "
                    f"{size(group[0]['adapter_bytes'])} | {mean(group, 'seconds'):.0f} s | {size(mean(group, 'peak_memory_bytes'))} | "
                    f"{spread(group, 'dev_loss_after')} | {100 * gain(group) / gain(full):.1f} % | {spread(group, 'old_domain_loss_after')} |")
    return rows


def grid(runs):
    found = groups(runs)
    rates = sorted({run["learning_rate"] for run in runs})
    rows = ["| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for method, by_rate in found.items():
        cells = [f"{mean(by_rate[rate], 'dev_loss_after'):.4f}" if rate in by_rate else "diverged" for rate in rates]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return rows


def methods(runs):
    """Each method's run of lowest dev loss."""
    rows = ["| method | lr | trained parameters | saved | a step | peak memory | dev loss |", "|---|---|---|---|---|---|---|"]
    for method, rates in groups(runs).items():
        run = min((run for group in rates.values() for run in group), key=lambda run: run["dev_loss_after"])
        rows.append(f"| {method} | {run['learning_rate']:g} | {run['trainable_parameters']:,} | {size(run['adapter_bytes'])} | "
                    f"{1e3 * run['seconds'] / run['steps']:.0f} ms | {size(run['peak_memory_bytes'])} | {run['dev_loss_after']:.4f} |")
    return rows


def e2e(titled):
    """One column a run."""
    names = {"trainable_parameters": "trained parameters", "total_parameters": "parameters of the base", "dev_loss_before": "dev loss before",
             "dev_loss_after": "dev loss after", "old_domain_loss_before": "old domains, dev loss before",
             "old_domain_loss_after": "old domains, dev loss after", "tokens_per_second": "tokens/s",
             "peak_memory_bytes": "peak memory", "adapter_bytes": "adapter", "merged_max_abs_difference": "merged - unmerged logits, at most"}
    rows = ["| figure | " + " | ".join(titled) + " |", "|---" * (len(titled) + 1) + "|"]
    for key, name in names.items():
        cells = []
        for figures in titled.values():
            value = figures[key]
            cells.append(size(value) if key.endswith("bytes") else f"{value:,}" if isinstance(value, int)
                         else f"{value:.1e}" if key.startswith("merged") else f"{value:,.0f}" if key.startswith("tokens") else f"{value:.4f}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def main():
    read = lambda name: json.loads((DOCS / "figures" / name).read_text(encoding="utf-8"))
    compare = read("finetune_compare.json")["runs"]
    tables = {"comparison": comparison(compare), "grid": grid(compare),
              "methods": methods(read("finetune_methods.json")["runs"]),
              "e2e": e2e({"query and value, r = 8, 600 steps": read("finetune_e2e.json"),
                          "all-linear, r = 16, 1500 steps": read("finetune_e2e_all_linear.json")})}
    write(PAGE, tables)


if __name__ == "__main__":
    main()
