"""What the judges share: a folder to work in, comparing, and one line a verdict."""

import pathlib
import sys
import tempfile

import torch

TOLERANCE = 1e-5  # relative to the largest expected value, fp32


class Verdicts:
    """Collects every check; `finish` prints what failed and ends the program with 1, or with 0 where all held."""

    def __init__(self):
        self.passed, self.failed = 0, 0

    def check(self, holds, text):
        if holds:
            self.passed += 1
        else:
            self.failed += 1
            print(f"FAILED: {text}", file=sys.stderr)
        return holds

    def close(self, found, expected, text, tolerance=TOLERANCE):
        shapes = f"{text}: shape {list(found.shape)}, expected {list(expected.shape)}"
        if not self.check(found.shape == expected.shape, shapes):
            return
        difference = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        largest = expected.double().abs().max().item() if expected.numel() else 0.0
        self.check(difference <= tolerance * largest, f"{text}: differs by {difference:.3g}, largest {largest:.3g}")
        print(f"{text}: {difference / largest if largest else difference:.2g} relative")

    def finish(self):
        self.check(self.passed, "nothing was checked")
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(1 if self.failed else 0)


def work_folder():
    """An empty folder that is gone when the program ends."""
    folders.append(tempfile.TemporaryDirectory(prefix="lora-oracle-"))
    return pathlib.Path(folders[-1].name)


folders = []
torch.set_num_threads(1)
torch.set_grad_enabled(False)
