"""The variants of the kernels that are shipped: tests/cuda/variants.json says which, and what each may cost."""

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nvrtc

HERE = Path(__file__).resolve().parent
ELEMENTS = ["f32", "bf16", "f16"]


def first(*paths):
    return next((path for path in paths if path.exists()), paths[0])


# In the repository, or in what `scripts/gpu` packed.
TABLE = first(HERE.parents[1] / "tests/cuda/variants.json", HERE / "variants.json")
DEVICE = first(HERE.parents[1] / "kernels/src/cuda/device", HERE / "device")
CUBINS = HERE / "cubins"


@dataclass
class Variant:
    """A source with its defines: one cubin for each architecture."""

    source: str
    defines: dict
    architectures: list
    kernels: dict

    @property
    def hopper(self):
        return "HOPPER" in self.defines

    @property
    def name(self):
        values = "-".join(f"{name.lower()}{value}" for name, value in self.defines.items())
        return f"{Path(self.source).stem}-{values}"

    @property
    def title(self):
        """For a table."""
        d = self.defines
        words = [Path(self.source).stem, ELEMENTS[d["ELEMENT"]] if "ELEMENT" in d else ""]
        if "HEAD_DIM" in d:
            words.append(f"d{d['HEAD_DIM']}" + (f"/{d['VALUE_DIM']}" if d.get("VALUE_DIM", d["HEAD_DIM"]) != d["HEAD_DIM"] else ""))
        words.append({1: "plain", 0: "general"}.get(d.get("PLAIN"), ""))
        words.append("wgmma" if self.hopper else "mma")
        return " ".join(word for word in words if word)

    def cubin(self, architecture, folder):
        """The path of the cubin and the compiler's log, compiled unless it is there."""
        path = Path(folder) / f"{self.name}.{architecture}.cubin"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            code, log = nvrtc.compile(DEVICE / self.source, architecture, self.defines, DEVICE)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(code)
            unfinished.rename(path)
            path.with_suffix(".log").write_text(log)
        return path


def each(defines):
    """A row of the table stands for every combination of the values that it lists."""
    lists = [value if isinstance(value, list) else [value] for value in defines.values()]
    return (dict(zip(defines, values)) for values in itertools.product(*lists))


def load(table=TABLE):
    """The variants and, by name, what PyTorch's own kernels cost."""
    table = json.loads(Path(table).read_text())
    variants = []
    for row in table["variants"]:
        variants += [Variant(row["source"], x, row["architectures"], row["kernels"]) for x in each(row["defines"])]
    return variants, table["pytorch"]


def dump(table, path=TABLE):
    """Writes the table, a row to three lines."""
    text = json.dumps
    rows = []
    for row in table["variants"]:
        kernels = ", ".join(f"{text(name)}: {text(kernel)}" for name, kernel in row["kernels"].items())
        head = f'"source": {text(row["source"])}, "architectures": {text(row["architectures"])}'
        rows.append(f'    {{ {head},\n      "defines": {text(row["defines"])},\n      "kernels": {{ {kernels} }} }}')
    pytorch = text(table["pytorch"], indent=2).replace("\n", "\n  ")
    Path(path).write_text(f'{{\n  "pytorch": {pytorch},\n  "variants": [\n' + ",\n".join(rows) + "\n  ]\n}\n")


def build(pairs, folder):
    """Compiles pairs of variant and architecture on all processors. The paths, in the same order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: pair[0].cubin(pair[1], folder), pairs))


if __name__ == "__main__":  # for scripts/gpu: what is timed. The rest is compiled where it runs.
    plain = [variant for variant in load()[0] if variant.defines["PLAIN"]]
    try:
        print(len(build([(variant, x) for variant in plain for x in variant.architectures], CUBINS)), "cubins")
    except nvrtc.CompileError as error:
        raise SystemExit(str(error)) from None
