"""What the numbers were measured on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Hypervisors hide the names of processors, but not these numbers: Intel's models of family 6.
INTEL = {
    79: "Broadwell", 85: "Skylake, Cascade Lake or Cooper Lake", 106: "Ice Lake", 108: "Ice Lake", 143: "Sapphire Rapids",
    173: "Granite Rapids", 174: "Granite Rapids", 175: "Sierra Forest", 207: "Emerald Rapids",
}  # fmt: skip
# By family and the upper four bits of the model.
AMD = {
    (23, 0): "Zen", (23, 3): "Zen 2", (25, 0): "Zen 3", (25, 1): "Zen 4", (25, 10): "Zen 4c",
    (26, 0): "Zen 5", (26, 1): "Zen 5c",
}  # fmt: skip
# The flags that say most about the speed of these operations.
FLAGS = ["avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "sve", "asimd"]


def processor():
    """Its name, with the kind and the instruction sets that Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    of = {key.strip(): value.strip() for key, _, value in lines}
    family, model = (int(of.get(key, 0)) for key in ("cpu family", "model"))
    kind = INTEL.get(model) if of.get("vendor_id") == "GenuineIntel" and family == 6 else AMD.get((family, model >> 4))
    flags = (of.get("flags") or of.get("Features") or "").split()
    numbers = f"family {family} model {model}" if family else None
    about = [numbers, kind, " ".join(flag for flag in FLAGS if flag in flags)]
    return f"{of.get('model name') or platform.machine()} ({', '.join(filter(None, about))})"


def machine(threads):
    found = {"processor": processor(), "threads": threads}
    for package in ("torch", "onnxruntime", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found
