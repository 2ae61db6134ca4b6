"""Check that PEFT reads adapters that this crate wrote, and computes with them what this crate does.

    pip install -r tests/golden/requirements-peft.txt && python tests/golden/check_peft.py FOLDER

FOLDER/<kind>/ has adapter_config.json and adapter_model.safetensors for the base model in tests/golden/peft/<kind>, with
A and B of the same names and shapes as in the golden adapter, and outputs.safetensors, whose tensor `output` is what the
first layer with this adapter makes of the golden input. Every kind in FOLDER is checked. Exits with 1 if anything is wrong.
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers as hf
from make_blocks import float64_for_float32
from make_peft import KINDS, OUT, layers_of, load_base
from peft import PeftModel
from safetensors.torch import load_file

TOLERANCE = 1e-5


class Wrong(Exception):
    """What is wrong with a folder."""


def listed(lines, most=6):
    """The lines below one another, without the last ones if there are many."""
    shown = lines[:most] + [f"and {len(lines) - most} more"] * (len(lines) > most)
    return "".join(f"\n    {line.strip()}" for line in shown)


def tensors(file):
    if not file.is_file():
        raise Wrong(f"there is no {file.name}")
    try:
        return load_file(file)
    except Exception as error:
        raise Wrong(f"{file.name} can't be read: {error}") from error


def factors(file):
    """A and B in an adapter's file. What else it may hold is for PEFT to judge."""
    return {name: tensor for name, tensor in tensors(file).items() if ".lora_" in name}


def check_names(found, expected):
    """Compares A and B with those of the golden adapter."""
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name}: shape {list(found[name].shape)}, not {list(expected[name].shape)}"
        for name in sorted(found.keys() & expected.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise Wrong("adapter_model.safetensors has other tensors than the golden adapter" + listed(problems))


def load(kind, folder):
    """The base model with the adapter. PEFT must find all that its config makes it look for, and no more."""
    if not (folder / "adapter_config.json").is_file():
        raise Wrong("there is no adapter_config.json")
    try:
        with warnings.catch_warnings():
            for category in (UserWarning, RuntimeWarning):
                warnings.simplefilter("error", category)
            model = PeftModel.from_pretrained(load_base(kind, torch.float64), folder)
            # from_pretrained keeps to itself which tensors nobody wanted; to load them again tells.
            result = model.load_adapter(folder, "default")
    except Exception as error:
        raise Wrong("PEFT can't load it" + listed([type(error).__name__, *str(error).splitlines()])) from error
    problems = [f"missing: {name}" for name in result.missing_keys]
    problems += [f"unexpected: {name}" for name in result.unexpected_keys]
    if problems:
        raise Wrong("PEFT looks for other tensors than the file holds" + listed(problems))
    return model


def check(kind, folder):
    """The largest difference between PEFT's output and that in the folder."""
    golden = OUT / kind.name / "adapter" / "adapter_model.safetensors"
    check_names(factors(folder / golden.name), factors(golden))
    model = load(kind, folder)
    found = tensors(folder / "outputs.safetensors").get("output")
    if found is None:
        raise Wrong("outputs.safetensors has no tensor `output`")
    x = load_file(OUT / kind.name / "cases.safetensors")["input"]
    with float64_for_float32(), torch.no_grad():
        expected = layers_of(kind, model.get_base_model())[0](x)
    if found.shape != expected.shape:
        raise Wrong(f"`output` has shape {list(found.shape)}, not {list(expected.shape)}")
    difference = (found.double() - expected).abs().max().item()
    # Not the other way round: NaN is no less than anything.
    if not difference <= TOLERANCE:
        raise Wrong(f"`output` differs from PEFT's by {difference:.1e}, more than {TOLERANCE:.0e}")
    return difference


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    if not folder.is_dir():
        sys.exit(f"{folder} is no folder")
    torch.set_num_threads(1)
    hf.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    kinds = {kind.name: kind for kind in KINDS}
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    failed = not names
    if not names:
        print(f"{folder} has no folders of adapters")
    for name in names:
        try:
            if name not in kinds:
                raise Wrong(f"there is no such kind: it is one of {', '.join(kinds)}")
            print(f"{name}: differs by {check(kinds[name], folder / name):.1e}")
        except Wrong as wrong:
            failed = True
            print(f"{name}: WRONG: {wrong}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
