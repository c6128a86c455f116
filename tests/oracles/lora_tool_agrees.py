"""Does Python read what the command-line tool `lora` writes?

    lora_tool_agrees.py PROGRAM

A GPT-2 into whose file PROGRAM merges an adapter has to give, loaded by transformers, the logits that PEFT computed for
its own merge (tests/golden/gpt2), from one file and from shards. The adapter that PROGRAM converts, as a directory with
adapter_model.bin and by way of loralib's form, has to give PEFT's logits in PEFT.
"""

import pathlib
import shutil
import subprocess
import sys

import peft
import transformers
from safetensors.torch import load_file

from judging import Verdicts, work_folder

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"


def merged_models(program, folder):
    """Folders with the merged model: one file, and shards."""
    for name, flags in {"whole": [], "sharded": ["--max-shard-size", "30KB"]}.items():
        out = folder / name
        command = [program, "merge", GOLDEN / "gpt2" / "adapter", "--base", GOLDEN / "gpt2" / "model", "--out", out]
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
        shutil.copy(GOLDEN / "gpt2" / "model" / "config.json", out)
        yield out


def converted_adapters(program, folder):
    """PEFT directories with the golden adapter."""

    def convert(source, out, *flags):
        command = [program, "convert", source, "--out", folder / out, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return folder / out

    pickled = convert(GOLDEN / "gpt2" / "adapter", "pickled", "--to", "peft-bin")
    assert sorted(path.name for path in pickled.iterdir()) == ["adapter_config.json", "adapter_model.bin"]
    yield pickled
    loralib = convert(pickled, "lora.pt", "--to", "loralib")
    yield convert(loralib, "from_loralib", "--alpha", "12", "--fan-in-fan-out", "true")


def main():
    program = sys.argv[1]
    folder = work_folder()
    verdicts = Verdicts()
    expected = load_file(GOLDEN / "gpt2" / "expected.safetensors")
    for model in merged_models(program, folder):
        has_index = (model / "model.safetensors.index.json").exists()
        verdicts.check(has_index == (model.name == "sharded"), f"{model.name}: {list(model.iterdir())}")
        loaded, info = transformers.GPT2LMHeadModel.from_pretrained(model, output_loading_info=True)
        for problem, names in info.items():
            verdicts.check(not names, f"{model.name}: {problem} {names}")
        verdicts.close(loaded.eval()(expected["ids"]).logits, expected["logits_merged"], f"logits, {model.name}")
    for adapter in converted_adapters(program, folder):
        base = transformers.GPT2LMHeadModel.from_pretrained(GOLDEN / "gpt2" / "model")
        adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
        verdicts.close(adapted(expected["ids"]).logits, expected["logits_adapted"], f"logits in PEFT, {adapter.name}")
    verdicts.finish()


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    main()
