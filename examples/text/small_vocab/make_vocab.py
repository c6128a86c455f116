"""Trains the small byte-level BPE of the run without arguments on lines `slot : value | ...||text`.

From the project's root:
  build/release/bin/generate_pairs --domains base --count 3000 |
    tests/oracles/python examples/text/small_vocab/make_vocab.py examples/text/small_vocab
"""

import json
import pathlib
import sys

from tokenizers import ByteLevelBPETokenizer

VOCABULARY = 1024
SPECIAL = "<|endoftext|>"


def main():
    folder = pathlib.Path(sys.argv[1])
    # A leading blank, as the words have it everywhere else: the trainer then spends no tokens on first words.
    texts = [" " + part for line in sys.stdin for part in line.rstrip("\n").split("||")]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[SPECIAL],
                                  show_progress=False)
    model = json.loads(tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [" ".join(pair) for pair in model["merges"]]
    assert len(vocab) == VOCABULARY and sorted(vocab.values()) == list(range(VOCABULARY))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
