"""Time this crate on an NVIDIA GPU against PyTorch's attention and candle's, and print one table.

    pip install -r benches/requirements.txt && python benches/on_gpu.py

`ours` is candle-attention with `Backend::Fused`, `candle` is matmul, softmax and matmul, and the others are the backends of
PyTorch's scaled_dot_product_attention. Every answer is compared with attention in f64 before it is timed.

The contenders take turns on one GPU. All times are wall-clock times. A turn queues runs one after another, as a training loop
does, waits for the GPU at their end, and takes the mean time of a run. A time in the table is the median of the turns. (CUDA's
events would leave out the time that candle's process spends on the CPU.) TFLOP/s count the multiplications and additions of
the scores and the context that the mask allows, and 3.5 times as many for forward and backward together.

Peak memory counts inputs, output, gradients and everything between. For PyTorch it comes from its allocator. For
candle-attention and candle it is the driver's free memory, in a fresh process for each.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "against_peers"))
from peers import Ours, TorchAttention, build, queued_ms, rotate  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Of the error of 64 rows, as a part of their length. PyTorch's unfused attention (bf16, 4,096 tokens) errs by 0.009 of it,
# and one wrong row by 0.12.
TOLERANCE = {"bf16": 3e-2, "f16": 1e-2, "f32": 1e-4}
# candle's kernels are started with a 32-bit count of entries.
CANDLE_ENTRIES = 2**32


@dataclass(frozen=True)
class Plan:
    """What is timed on one device: the same number of tokens for every length, the same number of features for every head_dim."""

    tokens: int
    lengths: tuple
    heads: dict
    backends: dict

    def cases(self, quick):
        for dim, heads in self.heads.items():
            if quick and dim != 128:
                continue
            for length in self.lengths[:: 3 if quick else 1]:
                for dtype in DTYPES:
                    for causal in (False, True):
                        for backward in (False, True):
                            yield Case(self.tokens // length, heads, length, dim, dtype, causal, backward)


PLANS = {
    "cuda": Plan(
        tokens=16384,
        lengths=(1024, 2048, 4096, 8192, 16384),
        heads={64: 32, 128: 16},
        backends={
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
        },
    ),
    # A test of this program itself.
    "cpu": Plan(
        tokens=512,
        lengths=(64, 128, 256, 512),
        heads={64: 4, 128: 2},
        backends={"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    ),
}


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    length: int
    dim: int
    dtype: str
    causal: bool
    backward: bool
    name: str = "plain"

    # As `TorchAttention` asks.
    @property
    def kv_heads(self):
        return self.heads

    @property
    def shape(self):
        return (self.batch, self.heads, self.length, self.dim)

    @property
    def pass_(self):
        return "forward+backward" if self.backward else "forward"

    def flops(self):
        pairs = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        return 4 * self.batch * self.heads * pairs * self.dim * (3.5 if self.backward else 1)

    def bytes(self):
        """The size of the query, or of another tensor of its shape."""
        return self.batch * self.heads * self.length * self.dim * DTYPES[self.dtype].itemsize


MEMORY = Case(1, 8, 65536, 128, "bf16", causal=True, backward=True)


class Absent(Exception):
    """Why a contender has no time: what stands in its cell, and the reason."""

    def __init__(self, cell, reason):
        self.cell, self.reason = cell, reason


def absent(error):
    text = str(error).strip().splitlines()[0]
    memory = ["out of memory", "ALLOC_FAILED"]
    return Absent("does not fit" if any(word in text for word in memory) else "-", text)


class Served:
    """This crate or candle, in the process that serves them."""

    def __init__(self, server, job, contender, path, device):
        self.server, self.job, self.contender, self.path, self.device = server, job, contender, path, device
        self.time = server.queued_timer(job, contender)

    def answer(self):
        self.server.ask(do="answer", id=self.job, contender=self.contender, to=str(self.path))
        return load_file(self.path, device=self.device)


class OnTorch(TorchAttention):
    """PyTorch's scaled_dot_product_attention by one of its backends."""

    def __init__(self, case, inputs, backend, synchronize):
        super().__init__(case, inputs)
        self.backend, self.synchronize = backend, synchronize

    def answer(self):
        with warnings.catch_warnings(record=True) as told, sdpa_kernel(self.backend):
            warnings.simplefilter("always")
            try:
                return super().answer()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # PyTorch warns of why each backend won't do, those that are switched off too.
                texts = [str(warning.message).split(" (Triggered")[0] for warning in told]
                texts = [text for text in texts if "not used because" not in text and "disabled" not in text]
                raise Absent("-", " ".join(texts) or str(error).splitlines()[0]) from error

    def time(self, warm_up_ms, time_ms):
        with sdpa_kernel(self.backend):
            return queued_ms(self.synchronize, warm_up_ms, time_ms, self.run)


def exact_attention(query, key, value, grad_output, causal):
    """Attention and its gradients in f64, by blocks of queries of one head: all scores at once would not fit."""
    batch, heads, length, dim = query.shape
    names = ["output", "grad_query", "grad_key", "grad_value"]
    exact = {name: torch.empty(query.shape, dtype=torch.float64, device=query.device) for name in names}
    positions = torch.arange(length, device=query.device)
    blocks = [slice(start, start + 1024) for start in range(0, length, 1024)]
    for head in [(b, h) for b in range(batch) for h in range(heads)]:
        q, k, v = (x[head].double().requires_grad_() for x in (query, key, value))
        for rows in blocks:
            scores = q[rows] @ k.T / dim**0.5
            if causal:
                scores = scores.masked_fill(positions > positions[rows, None], float("-inf"))
            output = scores.softmax(-1) @ v
            output.backward(grad_output[head][rows].double())
            exact["output"][head][rows] = output.detach()
        for name, x in zip(names[1:], (q, k, v)):
            exact[name][head] = x.grad
    return exact


def error(got, exact):
    """The largest, over blocks of 64 rows, of the difference's length as a part of the exact block's."""
    blocks = lambda x: x.reshape(-1, 64 * x.shape[-1])
    return ((blocks(got.double()) - blocks(exact)).norm(dim=1) / blocks(exact).norm(dim=1)).max().item()


@contextmanager
def least_free():
    """A list whose first number becomes the fewest bytes that were free on the GPU meanwhile, whoever took them."""
    least, done = [torch.cuda.mem_get_info()[0]], threading.Event()

    def watch():
        while not done.wait(0.001):
            least[0] = min(least[0], torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield least
    finally:
        done.set()
        watcher.join()


class Bench:
    def __init__(self, device, rounds):
        self.device, self.rounds, self.gpu = device, rounds, device == "cuda"
        self.backends = PLANS[device].backends
        self.program = build(*["--features", "cuda"] if self.gpu else [])
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.server = self.serve()
        # By contender and reason, the cases.
        self.absent = {}
        self.wrong = False

    def serve(self):
        return Ours(self.program, os.cpu_count())

    def close(self):
        self.server.close()
        self.folder.cleanup()

    def synchronize(self):
        if self.gpu:
            torch.cuda.synchronize()

    def give_back(self):
        """What PyTorch keeps for itself of the GPU's memory, for the other process to use."""
        if self.gpu:
            torch.cuda.empty_cache()

    @lru_cache(maxsize=1)
    def inputs(self, shape, dtype):
        """Here, and in a file for the other process."""
        generator = torch.Generator(self.device).manual_seed(1)
        normal = lambda: torch.randn(shape, generator=generator, device=self.device).to(DTYPES[dtype])
        inputs = {name: normal() for name in ("query", "key", "value", "grad_output")}
        save_file(inputs, self.path / "inputs.safetensors")
        return inputs

    @lru_cache(maxsize=1)
    def exact(self, shape, dtype, causal):
        return exact_attention(**self.inputs(shape, dtype), causal=causal)

    def load(self, server, case):
        self.inputs(case.shape, case.dtype)
        description = {"kind": "attention", "causal": case.causal, "backward": case.backward}
        return server.load(self.path / "inputs.safetensors", description, self.device)

    def served(self, server, job, contender):
        # With `Backend::Fused`, a case that this crate's kernels don't serve is an error, and not the reference's time.
        contender = {"ours": "ours_fused"}.get(contender, contender)
        return Served(server, job, contender, self.path / "answer.safetensors", self.device)

    def on_torch(self, case, backend):
        return OnTorch(case, self.inputs(case.shape, case.dtype), self.backends[backend], self.synchronize)

    def prove(self, case, name, contender):
        """The contender's largest error, and what stands in its cell if it can't do this or is wrong. One that is right has run
        as it will be timed."""
        exact = self.exact(case.shape, case.dtype, case.causal)
        self.give_back()
        largest = None
        try:
            if name == "candle" and case.batch * case.heads * case.length**2 >= CANDLE_ENTRIES:
                raise Absent("-", "its kernels count entries with 32 bits, too few for these scores")
            errors = {key: error(tensor, exact[key]) for key, tensor in contender.answer().items()}
            largest = max(errors.values())
            # Not `>`, which NaN never is.
            if off := [key for key, by in errors.items() if not by <= TOLERANCE[case.dtype]]:
                self.wrong |= name == "ours"
                raise Absent("wrong", f"{', '.join(off)} off by more than {TOLERANCE[case.dtype]:.2%}")
            self.give_back()
            contender.time(0, 0)
            return largest, None
        except (Absent, RuntimeError) as reason:
            reason = reason if isinstance(reason, Absent) else absent(reason)
            self.absent.setdefault((name, reason.cell, reason.reason), []).append(case)
            return largest, reason.cell

    def row(self, case):
        job = self.load(self.server, case)
        contenders = {name: self.served(self.server, job, name) for name in ("ours", "candle")}
        contenders |= {name: self.on_torch(case, name) for name in self.backends}
        proofs = {name: self.prove(case, name, contender) for name, contender in contenders.items()}
        cells = {name: cell for name, (_, cell) in proofs.items() if cell}

        def turn(contender):
            def time_it(warm_up_ms, time_ms):
                self.give_back()
                return contender.time(warm_up_ms, time_ms)

            return time_it

        timers = {name: turn(contender) for name, contender in contenders.items() if name not in cells}
        # On a CPU the threads of PyTorch spin on for a while after a turn.
        times = rotate(timers, self.rounds, 0 if self.gpu else 0.08)
        self.server.ask(do="forget", id=job)
        return {
            "shape": case.shape, "dtype": case.dtype, "causal": case.causal, "pass": case.pass_,
            "ms": times, "tflops": {name: case.flops() / ms / 1e9 for name, ms in times.items()},
            "error": {name: largest for name, (largest, _) in proofs.items()}, "absent": cells,
        }  # fmt: skip

    def memory(self, case, name):
        """Peak bytes of one run, its inputs counted, or why there are none."""
        inputs = 4 * case.bytes()
        if name in self.backends:
            contender = self.on_torch(case, name)
            _, cell = self.prove(case, name, contender)
            if cell:
                return cell
            # Another, without the gradients of the first.
            contender = self.on_torch(case, name)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            contender.time(0, 0)
            return inputs + torch.cuda.max_memory_allocated() - before
        server = self.serve()
        try:
            contender = self.served(server, self.load(server, case), name)
            _, cell = self.prove(case, name, contender)
            if cell:
                return cell
            # The inputs, and what the kernels themselves need, are there by now.
            self.give_back()
            before = torch.cuda.mem_get_info()[0]
            with least_free() as least:
                contender.time(0, 300)
            return inputs + before - least[0]
        finally:
            server.close()

    def head(self):
        times = [f"{name} ms" for name in ("ours", "candle", *self.backends)]
        ratios = ["flash / ours", "best torch / ours", "candle / ours"]
        return ["shape", "case", "pass", *times, *ratios, "TFLOP/s", "of best torch"]

    def line(self, row):
        ms, tflops = row["ms"], row["tflops"]
        best = min((name for name in self.backends if name in ms), key=ms.get, default=None)
        ratio = lambda name: f"{ms[name] / ms['ours']:.2f}" if {name, "ours"} <= ms.keys() else ""
        speed = lambda name: f"{tflops[name]:.1f}" if name in ms else ""
        times = {name: f"{t:.3f}" for name, t in ms.items()} | row["absent"]
        return [
            "x".join(map(str, row["shape"])), " ".join([row["dtype"], *["causal"] * row["causal"]]), row["pass"],
            *(times[name] for name in ("ours", "candle", *self.backends)),
            ratio("flash"), ratio(best), ratio("candle"), speed("ours"), speed(best),
        ]  # fmt: skip

    def machine(self):
        if not self.gpu:
            return {"device": "cpu", "torch": torch.__version__}
        name, cudnn = torch.cuda.get_device_name(), torch.backends.cudnn.version()
        return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn}

    def reasons(self):
        for (name, cell, reason), cases in self.absent.items():
            first = f"{'x'.join(map(str, cases[0].shape))} {cases[0].dtype} {cases[0].pass_}"
            rest = f" and {len(cases) - 1} more" if cases[1:] else ""
            yield f"{name} `{cell}`, {first}{rest}: {reason}"


def table_row(cells):
    return "| " + " | ".join(cells) + " |"


def table_head(cells):
    return table_row(cells) + "\n|" + "---|" * len(cells)


def print_memory(bench):
    if not bench.gpu:
        print("Peak memory: on a GPU only.")
        return {}
    own = 8 * MEMORY.bytes()
    print(f"Peak memory of {'x'.join(map(str, MEMORY.shape))} {MEMORY.dtype} causal, forward+backward:\n")
    print(table_head(["contender", "MiB", "of inputs, output and gradients"]))
    peaks = {}
    for name in ("ours", "candle", *bench.backends):
        peaks[name] = peak = bench.memory(MEMORY, name)
        print(table_row([name, *([peak, ""] if isinstance(peak, str) else [f"{peak / 2**20:.0f}", f"{peak / own:.2f} x"])]))
    return {"shape": MEMORY.shape, "dtype": MEMORY.dtype, "own_bytes": own, "peak_bytes": peaks}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    words = "a dtype, pass, `full`, `causal` or `memory`"
    add("--device", choices=PLANS, default="cuda", help="cpu: tiny shapes without a GPU, to test this program itself")
    add("--quick", action="store_true", help="a few of the rows, three rounds")
    add("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    add("--shape", action="append", metavar="1x16x16384x128", help="only this shape, as in the table's first column")
    add("--only", action="append", metavar="WORD", help=f"only rows with this word: {words}; given twice, both words")
    add("--rounds", type=int, help="turns of each contender: 7, or with --quick 3")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not (torch.version.cuda and torch.cuda.is_available()):
        built = "built for CUDA, which sees no GPU here" if torch.version.cuda else "built without CUDA"
        got = f"PyTorch {torch.__version__}, {built}"
        parser.error(f"expected an NVIDIA GPU and a PyTorch for it, got {got}; --device cpu --quick tries the bench without")
    return arguments


def wanted(case, arguments):
    words = {case.dtype, case.pass_, "causal" if case.causal else "full"}
    shape = "x".join(map(str, case.shape))
    return (not arguments.shape or shape in arguments.shape) and set(arguments.only or []) <= words


def main():
    arguments = parse()
    chosen = [case for case in PLANS[arguments.device].cases(arguments.quick) if wanted(case, arguments)]
    with_memory = not arguments.shape and set(arguments.only or []) <= {"memory"}
    if not chosen and not with_memory:
        raise SystemExit("expected --shape and --only to leave something to time, got nothing")
    bench = Bench(arguments.device, arguments.rounds or (3 if arguments.quick else 7))
    warning = "" if bench.gpu else "NOT A GPU MEASUREMENT: tiny shapes on the CPU, to try the bench itself.\n"
    print(warning, end="\n" if warning else "")
    if chosen:
        print(table_head(bench.head()))
    rows = []
    for case in tqdm(chosen, disable=None):
        rows.append(bench.row(case))
        tqdm.write(table_row(bench.line(rows[-1])), file=sys.stdout)
        sys.stdout.flush()
    print()
    memory = print_memory(bench) if with_memory else {}
    machine = bench.machine()
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()) + f"; {bench.rounds} rounds")
    reasons = list(bench.reasons())
    print("".join(f"- {reason}\n" for reason in reasons))
    print(warning, end="")
    bench.close()
    if arguments.json:
        run = {"is_gpu": bench.gpu, "rounds": bench.rounds, "rows": rows, "memory": memory, "reasons": reasons}
        arguments.json.write_text(json.dumps(machine | run, indent=1) + "\n")
    if bench.wrong:
        raise SystemExit("this crate's answer was wrong where its cell says so")


if __name__ == "__main__":
    main()
