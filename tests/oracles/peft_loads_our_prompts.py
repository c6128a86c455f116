"""Does Python PEFT load the virtual tokens that C++ wrote, and compute the same logits with them?

    peft_loads_our_prompts.py PROGRAM      PROGRAM write_prompts OUT writes the folder model and the PEFT folders beside it
"""

import subprocess
import sys
import warnings

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from judging import Verdicts, work_folder


def judge(folder, verdicts):
    data = load_file(folder / "data.safetensors")
    written = load_file(folder / "adapter_model.safetensors")
    base = transformers.GPT2LMHeadModel.from_pretrained(folder.parent / "model")
    model = PeftModel.from_pretrained(base, folder).eval()
    placed = get_peft_model_state_dict(model)
    title = folder.name
    verdicts.check(placed.keys() == written.keys(), f"{title}: PEFT has {list(placed)}, the file {list(written)}")
    verdicts.check(torch.equal(placed["prompt_embeddings"], written["prompt_embeddings"]), f"{title}: other values")
    found = model(data["ids"], attention_mask=torch.ones_like(data["ids"])).logits
    verdicts.close(found, data["logits"], title)


def main():
    out = work_folder()
    subprocess.run([sys.argv[1], "write_prompts", out], check=True)
    verdicts = Verdicts()
    for folder in sorted(path.parent for path in out.glob("*/adapter_config.json")):
        judge(folder, verdicts)
    verdicts.finish()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what PEFT warns of is judged above
    transformers.logging.disable_progress_bar()
    main()
