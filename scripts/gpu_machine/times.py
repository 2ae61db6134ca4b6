"""Milliseconds of the kernels beside PyTorch's flash, cuDNN and efficient attention, with a GPU's own clock."""

import statistics

import torch
import torch.nn.functional as F
from passes import Passes
from problem import Case, Inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
TOKENS, FEATURES = 16384, 2048
# Of the difference from PyTorch's answer: more than the sum of both errors.
TOLERANCE = {"bf16": 2e-2, "f16": 4e-3, "f32": 1e-4}


def cases(dtypes):
    """The most important first: bf16, head_dim 128."""
    for dtype in dtypes:
        for length in (8192, 2048, 16384, 1024, 4096):
            for dim in (128, 64):
                for causal in (False, True):
                    heads = FEATURES // dim
                    yield Case(TOKENS // length, heads, heads, length, length, dim, dim, dtype, causal=causal)
        yield Case(2, 16, 4, 8192, 8192, 128, 128, dtype, causal=True)


def milliseconds(run, budget=60):
    """The median of seven turns of equally many runs, which take about `budget` together."""

    def turn(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / runs

    turn(1)
    runs = max(1, min(20, round(budget / 7 / max(turn(1), 1e-3))))
    return statistics.median(turn(runs) for _ in range(7))


def of_pytorch(inputs, backend):
    """The output, the gradients, and the milliseconds of both passes; or None where PyTorch has no such kernel."""
    c = inputs.case
    shared = {"enable_gqa": True} if c.heads != c.kv_heads else {}
    attend = lambda *x: F.scaled_dot_product_attention(*x, is_causal=c.causal, **shared)
    with sdpa_kernel(BACKENDS[backend]):
        try:
            inner = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
            o = attend(*inner)
            backward = lambda: torch.autograd.grad(o, inner, inputs.d_o, retain_graph=True)
            gradients = backward()
            with torch.no_grad():
                forward_ms = milliseconds(lambda: attend(inputs.q, inputs.k, inputs.v))
            return [o.detach(), *gradients], (forward_ms, milliseconds(backward))
        except RuntimeError:
            return None


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def row(runner, case, engines):
    inputs = Inputs(case, runner.machine.device, by_token=False)
    line, theirs = {"time": str(case)}, None
    for backend in BACKENDS:
        if answer := of_pytorch(inputs, backend):
            theirs = theirs or answer[0]
            line[f"{backend} forward"], line[f"{backend} backward"] = answer[1]
    pairs = case.q_len * (case.q_len + 1) / 2 if case.causal else case.q_len * case.kv_len
    flops = 4 * case.batch * case.heads * pairs * case.dim
    for engine in engines:
        passes = Passes(runner, inputs, True, engine)
        passes.run()
        ours = [passes.o, passes.dq, passes.dk, passes.dv]
        if theirs:
            line[f"{engine} differs by"] = max(distance(a, b) for a, b in zip(ours, theirs))
            line["ok"] = line.get("ok", True) and line[f"{engine} differs by"] <= TOLERANCE[case.dtype]
        for name, run, factor in (("forward", passes.forward, 1), ("backward", passes.backward, 2.5)):
            line[f"{engine} {name}"] = ms = milliseconds(run)
            line[f"{engine} {name} TFLOP/s"] = flops * factor / ms / 1e9
            best = [x for b in BACKENDS if (x := line.get(f"{b} {name}"))]
            if flash := line.get(f"flash {name}"):
                line[f"flash / {engine}, {name}"] = flash / ms
            if best:
                line[f"best / {engine}, {name}"] = min(best) / ms
    return line


def run(runner, dtypes, report):
    for case in cases(dtypes):
        engines = ["mma"] if case.dtype == "f32" or runner.machine.capability != (9, 0) else ["wgmma", "mma"]
        try:
            report(row(runner, case, engines))
        except (RuntimeError, torch.OutOfMemoryError) as failure:
            report({"time": str(case), "failed": str(failure)[:300]})
        torch.cuda.empty_cache()
