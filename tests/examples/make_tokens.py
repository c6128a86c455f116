"""Writes tokens.json: what Python tokenizers makes of tests/oracles/hard_strings.json with the examples' small vocabulary.

From the project's root: tests/oracles/python tests/examples/make_tokens.py
"""

import json
import pathlib

from tokenizers import ByteLevelBPETokenizer

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


def main():
    vocabulary = ROOT / "examples/text/small_vocab"
    tokenizer = ByteLevelBPETokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    strings = json.loads((HERE.parent / "oracles/hard_strings.json").read_text(encoding="utf-8"))
    rows = [{"text": text, "ids": tokenizer.encode(text).ids} for text in strings]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "tokens.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
