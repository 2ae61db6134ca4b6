"""Time candle-attention against PyTorch, ONNX Runtime and candle, and print one table.

    pip install -r benches/requirements.txt && python benches/against_peers.py

Every row is checked before it is timed: all contenders must give the same numbers. They are timed in rotation. After a call
ONNX Runtime's threads spin for 40 ms and PyTorch's for 8 ms, which would take a core from the next contender. So each turn
waits for 80 ms, warms up for 30 ms and measures for 30 ms. A time is the median over the rounds of a turn's median.

GFLOP/s count the multiplications and additions of the scores and the context that the mask allows, and 3.5 times as many for
forward and backward together. `of sgemm` is their share of a matmul's GFLOP/s (PyTorch's or candle's, the faster one) in the
same rotation. For decode it is the time of reading as many bytes as the keys and values have, divided by our time.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "against_peers"))
from ort import OnnxRuntime  # noqa: E402
from peers import Ours, Torch, build, median_ms, rotate  # noqa: E402

SHAPES = [
    (1, 8, 512, 64),
    (1, 8, 2048, 64),
    (8, 12, 128, 64),
    (4, 12, 512, 64),
    (1, 16, 1024, 128),
    (1, 8, 4096, 64),
    (1, 4, 197, 64),
    (1, 8, 512, 80),
    (1, 8, 512, 40),
]
ONE_HEAD = (1, 1, 2048, 64)
# batch, num_heads, kv_heads, kv_len, head_dim
DECODES = [(1, 32, 32, 4096, 128), (1, 32, 8, 4096, 128), (1, 32, 32, 16384, 128), (1, 32, 8, 16384, 128)]
# batch, len, embed_dim, num_heads
LAYERS = [(8, 128, 384, 12), (4, 512, 768, 12), (1, 2048, 512, 8)]
LONG = (1, 8, 16384, 64)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Rows and columns of the matrices of that matmul.
MATMUL = 1536
# Seconds before each turn.
PAUSE = 0.08
# The largest difference, relative to the largest number. Gradients are sums of many rounded numbers, and those of a layer's
# k_proj.bias cancel.
TOLERANCE = {"f32": 2e-4, "bf16": 6e-2, "f16": 1e-2}


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    dtype: str = "f32"
    causal: bool = False
    backward: bool = False

    @property
    def pass_(self):
        return "decode" if self.name == "decode" else "forward+backward" if self.backward else "forward"

    @property
    def shape(self):
        if self.name == "layer":
            return [self.batch, self.q_len, self.heads * self.dim, self.heads]
        if self.name == "decode":
            return [self.batch, self.heads, self.kv_heads, self.kv_len, self.dim]
        return [self.batch, self.heads, self.q_len, self.dim]

    def flops(self):
        pairs = self.q_len * self.kv_len
        if self.causal:
            pairs = self.q_len * (self.q_len + 1) // 2
        attention = 4 * self.batch * self.heads * pairs * self.dim
        width = self.heads * self.dim
        projections = 8 * self.batch * self.q_len * width * width if self.name == "layer" else 0
        return attention * (3.5 if self.backward else 1) + projections * (3 if self.backward else 1)

    def cache_bytes(self):
        return 2 * self.batch * self.kv_heads * self.kv_len * self.dim * 4

    def inputs(self):
        generator = torch.Generator().manual_seed(1)
        normal = lambda *shape: torch.randn(*shape, generator=generator)
        if self.name == "layer":
            width = self.heads * self.dim
            parts = {f"{part}_proj.weight": normal(width, width) / width**0.5 for part in "qkvo"}
            parts |= {f"{part}_proj.bias": normal(width) for part in "qkvo"}
            return parts | {name: normal(self.batch, self.q_len, width) for name in ("x", "grad_output")}
        inputs = {
            "query": normal(self.batch, self.heads, self.q_len, self.dim),
            "key": normal(self.batch, self.kv_heads, self.kv_len, self.dim),
            "value": normal(self.batch, self.kv_heads, self.kv_len, self.dim),
        }
        if self.backward:
            # For the memory case a single number: candle expands it, and the measurement counts only that copy.
            one = self.name == "memory"
            inputs["grad_output"] = normal(*([1] * 4 if one else [self.batch, self.heads, self.q_len, self.dim]))
        inputs = {name: x.to(DTYPES[self.dtype]) for name, x in inputs.items()}
        if self.name == "bias":
            inputs["bias"] = normal(self.q_len, self.kv_len)
        if self.name == "padding":
            # The shorter sequences of a batch end in padding. All but the first keep at least half of their keys.
            lengths = [self.kv_len * (4 - b % 3) // 4 - b % 2 for b in range(1, self.batch + 1)]
            inputs["key_mask"] = (torch.arange(self.kv_len) < torch.tensor(lengths)[:, None]).to(torch.uint8)
        return inputs


def cases():
    attention = lambda name, shape, **rest: Case(name, shape[0], shape[1], shape[1], shape[2], *shape[2:], **rest)
    both = [False, True]
    for shape in [*SHAPES, ONE_HEAD]:
        yield from (attention("plain", shape, causal=c, backward=b) for b in both for c in both)
    for name in ["bias", "padding"]:
        yield from (attention(name, shape, backward=b) for shape in SHAPES for b in both)
    for dtype in ["bf16", "f16"]:
        yield from (attention("plain", shape, dtype=dtype, backward=b) for shape in SHAPES for b in both)
    for batch, heads, kv_heads, kv_len, dim in DECODES:
        yield Case("decode", batch, heads, kv_heads, 1, kv_len, dim)
    for batch, length, width, heads in LAYERS:
        yield from (Case("layer", batch, heads, heads, length, length, width // heads, backward=b) for b in both)
    for shape in [s for s in SHAPES if s[2] >= 512] + [ONE_HEAD]:
        yield from (attention("threads", shape, backward=b) for b in both)
    yield attention("memory", LONG, causal=True, backward=True)


def check(case, name, got, expected):
    for key, tensor in expected.items():
        exact = tensor.double()
        difference = ((got[key].double() - exact).abs().max() / exact.abs().max().clamp(min=1)).item()
        if not difference <= TOLERANCE[case.dtype]:
            raise SystemExit(f"{case}: {key} of {name} is {difference:.2g} from PyTorch's")


class Bench:
    def __init__(self, arguments):
        self.rounds, self.threads = arguments.rounds, arguments.threads
        self.without_candle = arguments.without_candle
        self.program = build()
        self.ours = Ours(self.program, self.threads)
        self.one_thread = Ours(self.program, 1)
        self.folder = tempfile.TemporaryDirectory()
        torch.set_num_threads(self.threads)
        matmuls = self.matmuls()
        self.best_matmul, _ = min(rotate(matmuls, 3, PAUSE).items(), key=lambda item: item[1])
        self.matmul = matmuls[self.best_matmul]

    def close(self):
        self.ours.close()
        self.one_thread.close()
        self.folder.cleanup()

    def matmuls(self):
        """Timers of a matmul, candle's and PyTorch's."""
        a = torch.randn(MATMUL, MATMUL)

        def of_candle(warm_up_ms, time_ms):
            return self.ours.ask(do="matmul", size=MATMUL, warm_up_ms=warm_up_ms, time_ms=time_ms)["median_ms"]

        return {"torch": lambda *times: median_ms(*times, lambda: a @ a), "candle": of_candle}

    def reading(self, bytes):
        """A timer of reading as many bytes."""
        return lambda *times: self.ours.ask(do="read", bytes=bytes, warm_up_ms=times[0], time_ms=times[1])["median_ms"]

    def contenders(self, case, inputs, job):
        """Timers and answers by name; candle only where it has something to compare with."""
        path = Path(self.folder.name) / "answer.safetensors"

        def served(server, job, contender):
            def answer():
                server.ask(do="answer", id=job, contender=contender, to=str(path))
                return load_file(path)

            return server.timer(job, contender), answer

        all = {"ours": served(self.ours, job, "ours_fused")}
        if case.name == "threads":
            inputs_path = Path(self.folder.name) / "inputs.safetensors"
            job = self.one_thread.load(inputs_path, self.description(case))
            return all | {"one_thread": served(self.one_thread, job, "ours_fused")}
        peer = Torch(case, inputs)
        all["torch"] = (peer.time, peer.answer)
        if case.dtype == "f32" and not case.backward and case.name != "layer":
            peer = OnnxRuntime(case, inputs, self.threads)
            all["ort"] = (peer.time, peer.answer)
        if not self.without_candle and case.name == "plain" and case.dtype == "f32" and case.kv_len <= 2048:
            all["candle"] = served(self.ours, job, "candle")
            if not case.backward:
                all["candle_flash"] = served(self.ours, job, "candle_flash")
        return all

    def description(self, case):
        heads = case.heads if case.name == "layer" else None
        return {"causal": case.causal, "backward": case.backward, "num_heads": heads}

    def row(self, case):
        inputs = case.inputs()
        path = Path(self.folder.name) / "inputs.safetensors"
        save_file(inputs, path)
        row = {"shape": case.shape, "dtype": case.dtype, "causal": case.causal, "case": case.name, "pass": case.pass_}
        if case.name == "memory":
            return row | self.memory(path, case)
        job = self.ours.load(path, self.description(case))
        contenders = self.contenders(case, inputs, job)
        answers = {name: answer() for name, (_, answer) in contenders.items()}
        expected = answers.pop("torch", answers["ours"])
        for name, answer in answers.items():
            # ONNX Runtime gives no gradients.
            check(case, name, answer, {key: x for key, x in expected.items() if key in answer})
        del answers, expected
        timers = {name: timer for name, (timer, _) in contenders.items()} | {"sgemm": self.matmul}
        if case.name == "decode":
            timers["read"] = self.reading(case.cache_bytes())
        times = rotate(timers, self.rounds, PAUSE)
        row["sgemm_gflops"] = 2 * MATMUL**3 / times.pop("sgemm") / 1e6
        self.ours.ask(do="forget", id=job)
        if case.name == "threads":
            self.one_thread.ask(do="forget", id=self.one_thread.jobs)
        row |= {f"{name}_ms": times.get(name) for name in ["ours", "torch", "ort"]}
        row |= {f"{name}_ms": ms for name, ms in times.items() if f"{name}_ms" not in row}
        row["gflops"] = case.flops() / times["ours"] / 1e6
        row["sgemm_fraction"] = row["gflops"] / row["sgemm_gflops"]
        if case.name == "decode":
            row["gigabytes_per_second"] = case.cache_bytes() / times["ours"] / 1e6
            row["bandwidth_fraction"] = times["read"] / times["ours"]
        return row

    def memory(self, path, case):
        """Peak memory of one run, over that of the inputs, the output and the gradients of both."""
        server = Ours(self.program, self.threads)
        before = server.ask(do="memory")["now"]
        job = server.load(path, self.description(case))
        server.timer(job, "ours_fused")(0, 0)
        held = server.ask(do="memory")["peak"] - before
        server.close()
        own = 8 * 4 * case.batch * case.heads * case.q_len * case.dim
        return {"peak_bytes": held, "own_bytes": own, "memory_ratio": held / own}


def line(row):
    ratio = lambda name: f"{row[name] / row['ours_ms']:.2f}" if row.get(name) else ""
    number = lambda name: f"{row[name]:.2f}" if row.get(name) else ""
    share = row.get("bandwidth_fraction") or row.get("sgemm_fraction")
    shape = "x".join(map(str, row["shape"]))
    name = " ".join([row["case"], row["dtype"], *(["causal"] if row["causal"] else [])])
    if row["case"] == "memory":
        return [shape, name, row["pass"], *[""] * 8, f"{row['memory_ratio']:.2f} x"]
    return [
        shape, name, row["pass"], number("ours_ms"), number("torch_ms"), ratio("torch_ms"), ratio("ort_ms"),
        ratio("candle_ms"), ratio("candle_flash_ms"), ratio("one_thread_ms"), f"{row['gflops']:.0f}", f"{share:.2f}",
    ]  # fmt: skip


HEAD = ["shape", "case", "pass", "ours ms", "torch ms", "torch / ours", "ort / ours", "candle / ours"]
HEAD += ["flash_attn / ours", "1 / 2 threads", "GFLOP/s", "of sgemm"]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    parser.add_argument("--shape", action="append", metavar="1x8x512x64", help="only this shape, as in the table's first column")
    parser.add_argument("--only", action="append", metavar="WORD", help="only rows with this word: a case, pass, dtype, `full` or `causal`; given twice, both words")
    parser.add_argument("--without-candle", action="store_true", help="leave out candle, which takes longest")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def wanted(case, arguments):
    words = {case.name, case.pass_, case.dtype, "causal" if case.causal else "full"}
    shape = "x".join(map(str, case.shape))
    return (not arguments.shape or shape in arguments.shape) and set(arguments.only or []) <= words


def main():
    arguments = parse()
    chosen = [case for case in cases() if wanted(case, arguments)]
    if not chosen:
        raise SystemExit("expected --shape and --only to leave something to time, got nothing")
    bench = Bench(arguments)
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    rows = []
    for case in tqdm(chosen, disable=None):
        row = bench.row(case)
        rows.append(row)
        tqdm.write("| " + " | ".join(line(row)) + " |", file=sys.stdout)
        sys.stdout.flush()
    sgemm = median([row["sgemm_gflops"] for row in rows if "sgemm_gflops" in row] or [float("nan")])
    print(f"\n{arguments.threads} threads; sgemm ({bench.best_matmul}'s) {sgemm:.0f} GFLOP/s")
    bench.close()
    if arguments.json:
        everything = {"sgemm_gflops": sgemm, "threads": arguments.threads, "rows": rows}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
