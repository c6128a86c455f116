"""Do transformers and we read and write the same checkpoints?

    checkpoints_agree.py PROGRAM    PROGRAM copy_checkpoint IN OUT BYTES [TIED OF] loads IN and saves it as shards in the folder OUT

transformers writes GPT-2 whole and in shards, torch.save writes it as pytorch_model.bin, and PROGRAM copies each whole and
in shards; from_pretrained has to find every tensor of the copies, with the values that the model had.
"""

import json
import shutil
import subprocess
import sys

import torch
import transformers

from judging import Verdicts, work_folder

SHAPE = dict(vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def sources(folder, model):
    """Folders with the model, each in another layout, and whether the tied head is in it."""
    for name, size in {"whole": "1GB", "sharded": "5KB"}.items():
        model.save_pretrained(folder / name, max_shard_size=size)
        yield folder / name, False
    state = model.state_dict()
    for name in ("pickled", "pickled_shards"):
        (folder / name).mkdir()
        model.config.save_pretrained(folder / name)
    torch.save(state, folder / "pickled" / "pytorch_model.bin")
    yield folder / "pickled", True
    shards = [dict(list(state.items())[i::3]) for i in range(3)]
    for i, shard in enumerate(shards):
        torch.save(shard, folder / "pickled_shards" / f"pytorch_model-{i + 1:05}-of-00003.bin")
    weight_map = {key: f"pytorch_model-{i + 1:05}-of-00003.bin" for i, shard in enumerate(shards) for key in shard}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pickled_shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    yield folder / "pickled_shards", True


def main():
    program = sys.argv[1]
    folder = work_folder()
    verdicts = Verdicts()
    for tied in (True, False):
        torch.manual_seed(20260106)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, tie_word_embeddings=tied))
        expected = model.state_dict()
        for source, has_head in sources(folder / f"tied_{tied}", model):
            for size in (10**9, 5000):
                for left_out in ((), (HEAD, EMBEDDING)) if tied and has_head else ((),):
                    title = f"{source.name}, tied {tied}, shards of {size}, without {left_out}"
                    copy = folder / "copy"
                    shutil.rmtree(copy, ignore_errors=True)
                    subprocess.run([program, "copy_checkpoint", source, copy, str(size), *left_out], check=True)
                    shutil.copy(source / "config.json", copy)
                    verdicts.check((copy / "model.safetensors").exists() == (size > 5000), f"{title}: {list(copy.iterdir())}")
                    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(copy, output_loading_info=True)
                    for problem, names in info.items():
                        verdicts.check(not names, f"{title}: {problem} {names}")
                    found = loaded.state_dict()
                    verdicts.check(found.keys() == expected.keys(), f"{title}: names {sorted(found)}")
                    for name in found.keys() & expected.keys():
                        verdicts.check(torch.equal(found[name], expected[name]), f"{title}: {name} differs")
                    same = loaded.lm_head.weight is loaded.transformer.wte.weight
                    verdicts.check(same == tied, f"{title}: the head is tied: {same}")
    verdicts.finish()


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    main()
