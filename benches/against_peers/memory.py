"""Peak memory of one run, each time in a fresh process."""

from dataclasses import dataclass, replace

import torch

from attention import Attention
from blocks import Blocks
from case import Case
from operations import ROWS, VOCABULARY, Operation
from peers import rotate

LONG = Attention("attention", 1, 8, 8, 16384, 16384, 64, causal=True, backward=True)
DEEP = Blocks(1, 4096, 256, 4, norm_first=True, backward=True, count=12)
LOSS = Operation("cross_entropy", VOCABULARY, "f32", backward=True)


class Memory(Case):
    """One run of another case."""

    group, case = "memory", None

    @property
    def shape(self):
        return self.case.shape

    def words(self):
        return self.case.words() | {"memory", self.name}

    def inputs(self):
        return self.case.inputs()

    def measure(self, bench, path):
        """The row. `memory_ratio` is the result, and `time_ratio`, if there is one."""
        raise NotImplementedError


def peak(bench, path, case, contender, beyond_inputs=False):
    """Bytes of a run, with its inputs or without them."""
    server = bench.serve()
    now = lambda: server.ask(do="memory")["now"]
    before = now()
    job = server.load(path, case.description())
    # Loading takes twice the memory of the inputs.
    server.ask(do="reset_peak")
    if beyond_inputs:
        before = now()
    server.timer(job, contender)(0, 0)
    bytes = server.ask(do="memory")["peak"] - before
    server.close()
    return bytes


class OfAttention(Memory):
    """Over the size of the inputs, the output and the gradients of both."""

    name, case, causal, backward = "memory", LONG, True, True

    def inputs(self):
        # A run that is only timed starts from a gradient of its own.
        return {name: x for name, x in self.case.inputs().items() if name != "grad_output"}

    def measure(self, bench, path):
        held = peak(bench, path, self.case, self.case.ours)
        own = 8 * 4 * LONG.batch * LONG.heads * LONG.q_len * LONG.dim
        return {"peak_bytes": held, "own_bytes": own, "memory_ratio": held / own}


class OfRecomputation(Memory):
    """Blocks that compute the forward pass again in the backward pass, over those that keep everything."""

    name, case, backward = "recompute", DEEP, True

    def measure(self, bench, path):
        cases = {"ours": replace(DEEP, recompute=True), "kept": DEEP}
        peaks = {name: peak(bench, path, case, case.ours) for name, case in cases.items()}
        jobs = {name: bench.ours.load(path, case.description()) for name, case in cases.items()}
        self.check({name: bench.served(bench.ours, job, "ours").answer() for name, job in jobs.items()}, None)
        times = rotate({name: bench.ours.timer(job, "ours") for name, job in jobs.items()}, bench.rounds, bench.pause)
        for job in jobs.values():
            bench.ours.ask(do="forget", id=job)
        ratios = {"memory_ratio": peaks["ours"] / peaks["kept"], "time_ratio": times["ours"] / times["kept"]}
        return {f"{name}_peak_bytes": bytes for name, bytes in peaks.items()} | ratios | {f"{name}_ms": ms for name, ms in times.items()}


class OfCrossEntropy(Memory):
    """Over candle's loss, both without the logits."""

    name, case, backward = "cross_entropy memory", LOSS, True

    def measure(self, bench, path):
        peaks = {name: peak(bench, path, LOSS, name, beyond_inputs=True) for name in ("ours", "candle")}
        ratio = peaks["ours"] / peaks["candle"]
        return {f"{name}_peak_bytes": bytes for name, bytes in peaks.items()} | {"memory_ratio": ratio}


def cases():
    return [OfAttention(), OfRecomputation(), OfCrossEntropy()]
