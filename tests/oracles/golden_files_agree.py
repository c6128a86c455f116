"""Do the scripts of tests/golden still write the committed files? Numbers may differ by the processor's rounding.

    golden_files_agree.py
"""

import json
import pathlib
import subprocess
import sys

from safetensors.torch import load_file

from judging import Verdicts, work_folder

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"


def same(found, expected):
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return abs(found - expected) <= 1e-5 * max(1, abs(expected))
    return found == expected


def has_free_signs(name):
    """Singular vectors and QR's have the sign that LAPACK's kernels for the processor give them."""
    return name.parts[:2] in (("methods", "starts"), ("methods", "eva"))


def files_of(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")}


def main():
    fresh = work_folder()
    for script in ("generate.py", "generate_schedules.py", "generate_methods.py"):
        subprocess.run([sys.executable, GOLDEN / script, fresh], check=True)
    verdicts = Verdicts()
    names = files_of(fresh)
    own = {name.parts[0] for name in names}  # generate_script.py writes beside these
    committed = {name for name in files_of(GOLDEN) if name.parts[0] in own}
    verdicts.check(names == committed, f"files differ: {sorted(map(str, names ^ committed))}")
    for name in sorted(name for name in names & committed if not has_free_signs(name)):
        if name.suffix == ".json":
            found, expected = (json.loads((folder / name).read_text()) for folder in (fresh, GOLDEN))
            verdicts.check(same(found, expected), f"{name} differs")
            continue
        found, expected = load_file(fresh / name), load_file(GOLDEN / name)
        if verdicts.check(found.keys() == expected.keys(), f"{name}: tensors {sorted(found.keys() ^ expected.keys())}"):
            for key in expected:
                verdicts.close(found[key], expected[key], f"{name}: {key}")
    verdicts.finish()


if __name__ == "__main__":
    main()
