"""Are the checksums that C++ writes with an adapter those of zlib?

    checksums_agree.py PROGRAM      PROGRAM write_adapters OUT writes any number of adapters into the folder OUT
"""

import json
import subprocess
import sys
import zlib

import numpy
import torch
from safetensors import safe_open

from judging import Verdicts, work_folder


def checksums(file):
    lines = "".join(f"{key}={text}\n" for key, text in sorted(file.metadata().items()) if key != "lora.crc32")
    found = {"__metadata__": zlib.crc32(lines.encode())}
    for name in file.keys():
        tensor = file.get_tensor(name)
        sizes = ",".join(map(str, tensor.shape))
        title = f"{name} {file.get_slice(name).get_dtype()} [{sizes}]\n"
        data = numpy.asarray(tensor.contiguous().reshape(-1).view(torch.uint8)).tobytes()
        found[name] = zlib.crc32(data, zlib.crc32(title.encode()))
    return {name: f"{value:08x}" for name, value in found.items()}


def main():
    folder = work_folder()
    subprocess.run([sys.argv[1], "write_adapters", folder], check=True)
    verdicts = Verdicts()
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        with safe_open(path, "pt") as file:
            written = json.loads(file.metadata()["lora.crc32"])
            verdicts.check(written == checksums(file), f"{path.relative_to(folder)}: {written}, expected {checksums(file)}")
    verdicts.finish()


if __name__ == "__main__":
    main()
