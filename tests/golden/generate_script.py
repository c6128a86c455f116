"""Writes TorchScript files over the golden models' weights into script/; README.md describes each.

    tests/oracles/setup && tests/oracles/python tests/golden/generate_script.py [OUTPUT FOLDER]

"""

import pathlib
import sys
import warnings
import zipfile

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent / "oracles"))

import torch
import transformers
from safetensors.torch import load_file, save_file

from models import Convs, MhaBlock, Mlp, Reader


class Logits(torch.nn.Module):
    """A transformers model as ids -> logits, which is what can be traced."""

    def __init__(self, model):
        super().__init__()
        self.transformer, self.lm_head = model.transformer, model.lm_head

    def forward(self, ids):
        return self.lm_head(self.transformer(input_ids=ids, use_cache=False).last_hidden_state)


class Encoder(torch.nn.Module):
    """One TransformerEncoderLayer, batch first, with dropout that its `training` switches."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 4, 24, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def save(module, path):
    """Saves without the debug records, which hold the paths of the machine."""
    module.save(path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".debug_pkl")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def with_weights(model, path):
    model.load_state_dict(load_file(path))
    return model


def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here
    script = out / "script"
    script.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(20260108)
    warnings.simplefilter("ignore")

    mlp = with_weights(Mlp(), here / "mlp" / "base.safetensors")
    save(torch.jit.script(mlp), script / "mlp_scripted.pt")
    save(torch.jit.trace(mlp, torch.randn(5, 12)), script / "mlp_traced.pt")
    save(torch.jit.freeze(torch.jit.script(mlp.eval())), script / "mlp_frozen.pt")

    mha = with_weights(MhaBlock(), here / "mha" / "base.safetensors")
    save(torch.jit.script(mha), script / "mha_scripted.pt")

    encoder = Encoder()
    save(torch.jit.script(encoder), script / "encoder_scripted.pt")
    encoder.eval()
    x = torch.randn(2, 7, 16)
    with torch.enable_grad():  # without, the layer takes its fused inference path
        y = encoder(x)
    save_file({"x": x, "y": y.detach()}, script / "encoder_expected.safetensors", {"format": "pt"})

    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(here / "gpt2" / "model", attn_implementation="eager").eval()
    ids = load_file(here / "gpt2" / "expected.safetensors")["ids"]
    save(torch.jit.trace(Logits(gpt2), ids, check_trace=False), script / "gpt2_traced.pt")

    options = here / "options"
    reader = with_weights(Reader(), options / "reader" / "base.safetensors").eval()
    save(torch.jit.script(reader), script / "reader_scripted.pt")
    save(torch.jit.trace(reader, load_file(options / "reader" / "data.safetensors")["x"]), script / "reader_traced.pt")
    convs = with_weights(Convs(), options / "convs" / "base.safetensors")
    save(torch.jit.script(convs), script / "convs_scripted.pt")
    save(torch.jit.trace(convs, load_file(options / "convs" / "data.safetensors")["x"]), script / "convs_traced.pt")
    tied = transformers.GPT2LMHeadModel.from_pretrained(options / "gpt2" / "base", attn_implementation="eager").eval()
    ids = load_file(options / "gpt2" / "data.safetensors")["x"]
    save(torch.jit.trace(Logits(tied), ids, check_trace=False), script / "tied_traced.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    main()
