"""Does Python's tokenizers split text into the same byte-level BPE tokens as ours, and put them together again alike?

    tokens_agree.py PROGRAM VOCAB.json MERGES.txt STRINGS.json

PROGRAM encode_strings with the three files as arguments writes a JSON list to its standard output: for each string its list of ids.
Random strings are added to STRINGS.
"""

import json
import os
import random
import subprocess
import sys

from tokenizers import ByteLevelBPETokenizer

from judging import Verdicts, work_folder


def random_strings(count):
    """Letters, digits, marks, blanks and signs of many scripts in random order, and any code points at all."""
    draw = random.Random(20260108)
    kinds = ("ab'st ", "  \t\n\r\u00a0\u3000", "0١२３½", "éßЖ語한ا\u0301\u0327", ".,!'’\"-_", "😀👍🏽❤️\u200d",
             "'s't're've'm'll'd ")
    for _ in range(count):
        any_point = [chr(draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)))) for _ in range(3)]
        alphabet = "".join(draw.sample(kinds, 3)) + "".join(any_point)
        yield "".join(draw.choices(alphabet, k=draw.randrange(1, 30)))


def main():
    program, vocab, merges, strings_path = sys.argv[1:]
    if not os.path.exists(vocab):
        print(f"SKIPPED: there is no {vocab}", file=sys.stderr)
        sys.exit(77)
    strings = json.load(open(strings_path, encoding="utf-8")) + list(random_strings(5000))
    all_strings = work_folder() / "strings.json"
    all_strings.write_text(json.dumps(strings))
    ours = json.loads(subprocess.run([program, "encode_strings", vocab, merges, all_strings], check=True, stdout=subprocess.PIPE).stdout)
    tokenizer = ByteLevelBPETokenizer(vocab, merges, add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])

    verdicts = Verdicts()
    verdicts.check(len(ours) == len(strings), f"{len(ours)} lists of ids, expected {len(strings)}")
    for string, found in zip(strings, ours):
        expected = tokenizer.encode(string).ids
        verdicts.check(found == expected, f"{string!r}: {found}, expected {expected}")
        back = tokenizer.decode(found, skip_special_tokens=False)
        verdicts.check(back == string, f"{string!r}: decodes to {back!r}")
    verdicts.finish()


if __name__ == "__main__":
    main()
