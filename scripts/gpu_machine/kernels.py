"""Every kernel against attention in f64, twice for equal bits, and then timed beside PyTorch's own.

    python3 kernels.py [--small] [--no-times]     DEVICE=cpu: on the emulator, to try the check itself

Prints a line of JSON for each check and each time, and writes all of them to $OUT/kernels.json. What matters most comes first.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import nvrtc
import torch
import variants
from machines import machine
from passes import Passes
from problem import Case, Inputs, exact

NAN = float("nan")
# Of the norm of the difference, as a part of the norm. PyTorch's unfused bf16 attention has 2e-3 forward and 4e-3 backward.
TOLERANCE = {"bf16": 1e-2, "f16": 2e-3, "f32": 1e-5}


def small(dtype, engine):
    """Enough for the sanitizer: several blocks, an odd number of tiles, rows that end inside one, decoding."""
    yield Case(1, 2, 1, 130, 211, 64, 64, dtype, causal=True), True, engine
    yield Case(1, 2, 1, 70, 130, 64, 64, dtype, causal=True, options=True), False, engine
    yield Case(1, 4, 2, 3, 300, 64, 64, dtype, causal=True), True, engine


def checks(dtype, engine):
    """Cases, whether the plain kernels serve them, and the engine."""
    for dim in (128, 64, 256):
        for causal in (False, True):
            for sizes in ((2, 4, 2, 130, 211), (1, 4, 4, 257, 257), (1, 8, 1, 1024, 1024), (1, 2, 2, 1, 999), (2, 8, 2, 5, 999), (1, 2, 1, 300, 100)):
                yield Case(*sizes, dim, dim, dtype, causal=causal), True, engine
        yield Case(1, 2, 1, 300, 333, dim, dim, dtype, causal=True, window=70), True, engine
        yield Case(2, 4, 2, 130, 211, dim, dim, dtype, causal=True, options=True), False, engine
        yield Case(1, 2, 2, 200, 200, dim - 24, dim - 40, dtype, options=True), False, engine
        yield Case(1, 2, 2, 200, 200, dim - 3, dim - 1, dtype), False, engine
    # Scores beyond f32: the careful kernels.
    yield Case(1, 2, 1, 70, 70, 64, 64, dtype, magnitude={"f32": 1e25, "bf16": 1e25, "f16": 1e4}[dtype]), False, engine


def error(got, want):
    # Where both are the same infinity, they don't differ.
    difference = torch.where(got.double() == want, 0.0, got.double() - want)
    norm = torch.where(want.isfinite(), want, 0.0).norm()
    return (difference.norm() / norm.clamp(min=1e-30)).item()


def check(runner, case, plain, engine):
    """The largest error of each result. Raises if the second run has other bits."""
    inputs = Inputs(case, runner.machine.device)
    want = exact(inputs)
    passes = Passes(runner, inputs, plain, engine)
    passes.run()
    first = {name: x.clone() for name, x in passes.results().items()}
    passes.run()
    for name, x in passes.results().items():
        if not torch.equal(first[name].nan_to_num(7), x.nan_to_num(7)):
            raise RuntimeError(f"{name} isn't the same twice")
    errors = {name: error(x, want[name]) for name, x in passes.summed(first).items()}
    if case.magnitude != 1:
        # The weights are 0 and 1, and these gradients zero or what is left of a difference: finite is all that they must be.
        errors |= {name: 0.0 if first[name].isfinite().all() else NAN for name in ("dq", "dk")}
    return errors


def report(rows, row):
    rows.append(row)
    shown = {name: float(f"{x:.3g}") if isinstance(x, float) else x for name, x in row.items()}
    print(json.dumps(shown), flush=True)
    folder = Path(os.environ.get("OUT", "/tmp"))
    (folder / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")


def run_checks(runner, rows, cases):
    wrong = 0
    for case, plain, engine in cases:
        row = {"check": str(case), "kernels": f"{'plain' if plain else 'general'} {engine}"}
        try:
            errors = check(runner, case, plain, engine)
            row |= errors
            row["ok"] = all(x <= TOLERANCE[case.dtype] for x in errors.values())  # false for NaN
        except (RuntimeError, nvrtc.CompileError, subprocess.CalledProcessError) as failure:
            row |= {"ok": False, "failed": str(failure)[:300]}
        wrong += not row["ok"]
        report(rows, row)
        if any(word in row.get("failed", "") for word in ("ILLEGAL", "LAUNCH_FAILED", "MISALIGNED")):
            raise SystemExit("the GPU can't be used any more in this process")
    return wrong


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="three cases for each dtype and engine")
    parser.add_argument("--no-times", action="store_true", help="only the checks")
    parser.add_argument("--dtype", choices=TOLERANCE, action="append", help="only this one")
    parser.add_argument("--engine", choices=("wgmma", "mma"), action="append", help="only this one")
    return parser.parse_args()


def main():
    arguments, runner = parse(), Runner()
    engines = [x for x in ("wgmma", "mma") if x == "mma" or runner.machine.capability == (9, 0)]
    engines = [x for x in engines if x in (arguments.engine or engines)]
    dtypes = arguments.dtype or list(TOLERANCE)
    # There is no wgmma of f32.
    pairs = [(dtype, engine) for dtype in dtypes for engine in engines if dtype != "f32" or engine == "mma"]
    if not arguments.small:
        runner.machine.prepare(runner.variants)
    rows, cases = [], small if arguments.small else checks
    wrong = sum(run_checks(runner, rows, cases(dtype, engine)) for dtype, engine in pairs)
    print(f"{len(rows) - wrong} checks passed, {wrong} failed", flush=True)
    if not arguments.no_times and runner.machine.device == "cuda":
        import times

        times.run(runner, dtypes, lambda row: report(rows, row))
        wrong += sum("failed" in row or not row.get("ok", True) for row in rows if "time" in row)
    sys.exit(1 if wrong else 0)


class Runner:
    def __init__(self):
        self.machine = machine()
        self.variants, _ = variants.load()


if __name__ == "__main__":
    main()
