"""The contenders and how they take turns: candle-attention and candle in one process, PyTorch in this one."""

import json
import math
import os
import subprocess
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[2]


def median_ms(warm_up_ms, time_ms, run):
    """As the Rust side times: runs for the warm-up, then for `time_ms`, each at least once."""
    start = time.perf_counter()
    while (time.perf_counter() - start) * 1e3 < warm_up_ms:
        run()
    times = []
    start = time.perf_counter()
    while not times or (time.perf_counter() - start) * 1e3 < time_ms:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2] * 1e3


def queued_ms(synchronize, warm_up_ms, time_ms, run):
    """As the Rust side's `queued_ms`: the mean time of runs that are queued one after another for about `time_ms`."""

    def time_of(runs):
        start = time.perf_counter()
        for _ in range(runs):
            run()
        synchronize()
        return (time.perf_counter() - start) * 1e3

    runs, ms = 1, time_of(1)
    while ms < warm_up_ms:
        runs *= 2
        ms = time_of(runs)
    runs = max(1, math.ceil(runs * time_ms / ms))
    return time_of(runs) / runs


def rotate(timers, rounds, pause):
    """The median over the rounds for each contender, with a pause in seconds before each turn; a slow one gets fewer."""
    times = {name: [] for name in timers}
    for turn in range(rounds):
        for name, timer in timers.items():
            if turn >= 3 and times[name][0] > 1000:
                continue
            time.sleep(pause)
            times[name].append(timer(30, 30))
    return {name: median(of) for name, of in times.items()}


def build(*options):
    """Build `main.rs` with these options of cargo and return the path of the program. With `CANDLE_ATTENTION_PROGRAMS` it is ready
    in that folder, for a machine without Rust."""
    if ready := os.environ.get("CANDLE_ATTENTION_PROGRAMS"):
        return str(Path(ready) / "against_peers")
    command = ["cargo", "build", "--release", "-p", "attention-benches", "--message-format=json-render-diagnostics"]
    command += options
    lines = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    programs = [json.loads(line).get("executable") for line in lines]
    return next(program for program in programs if program)


class Ours:
    """The process that runs candle-attention's and candle's jobs."""

    def __init__(self, program, threads):
        # It sets the number of threads of candle-attention's tasks and of candle's matmul.
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([program], env=environment, text=True, **pipes)
        self.jobs = 0

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"expected a reply from {self.process.args[0]}, which ended with {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def load(self, inputs, job, device="cpu"):
        self.jobs += 1
        self.ask(do="load", id=self.jobs, inputs=str(inputs), job=job, device=device)
        return self.jobs

    def timer(self, job, contender):
        def time_it(warm_up_ms, time_ms):
            request = {"id": job, "contender": contender, "warm_up_ms": warm_up_ms, "time_ms": time_ms}
            return self.ask(do="time", **request)["median_ms"]

        return time_it

    def queued_timer(self, job, contender):
        def time_it(warm_up_ms, time_ms):
            request = {"id": job, "contender": contender, "warm_up_ms": warm_up_ms, "time_ms": time_ms}
            return self.ask(do="time_queued", **request)["mean_ms"]

        return time_it

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Torch:
    """A function in PyTorch, and the gradients of its `trained` tensors, if there are any, from that of its output."""

    def __init__(self, output, trained={}, grad_output=None):
        self.output, self.trained, self.grad_output = output, trained, grad_output

    def run(self):
        if not self.trained:
            with torch.no_grad():
                return {"output": self.output()}
        for parameter in self.trained.values():
            parameter.grad = None
        output = self.output()
        output.backward(self.grad_output)
        return {"output": output.detach()} | {f"grad_{name}": x.grad for name, x in self.trained.items()}

    def answer(self):
        """What `run` gives, under the names of the Rust side."""
        return self.run()

    def time(self, warm_up_ms, time_ms):
        return median_ms(warm_up_ms, time_ms, self.run)


class TorchAttention(Torch):
    """scaled_dot_product_attention."""

    def __init__(self, case, inputs):
        names = ("query", "key", "value")
        trained = {name: inputs[name].clone().requires_grad_() for name in names} if case.backward else {}
        query, key, value = (trained.get(name, inputs[name]) for name in names)
        attn_mask = inputs.get("bias")
        if "key_mask" in inputs:
            attn_mask = inputs["key_mask"].bool()[:, None, None, :]
        options = {"attn_mask": attn_mask, "is_causal": case.causal, "enable_gqa": case.kv_heads != case.heads}
        output = lambda: F.scaled_dot_product_attention(query, key, value, **options)
        super().__init__(output, trained, inputs.get("grad_output"))
