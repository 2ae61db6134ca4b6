"""Time candle-attention against PyTorch, ONNX Runtime and candle, and print one table.

    pip install -r benches/requirements.txt && python benches/against_peers.py

There are rows for attention, for the other operations of a transformer at 2048 rows of some width, for transformer blocks, for
fine-tuning of a block by LoRA, for a whole model, and for memory. `--only operations` or `--only rms_norm` leaves out the others.

Every row is checked before it is timed: all contenders must give the same numbers. They are timed in rotation. After a call
ONNX Runtime's threads spin for 40 ms and PyTorch's for 8 ms, which would take a core from the next contender. So each turn
waits for 80 ms, warms up for 30 ms and measures for 30 ms. A time is the median over the rounds of a turn's median.

This crate's side, and candle's, keep freed memory, as `train::keep_freed_memory` tells training programs to.

`compiled` is torch.compile's, with `--compile`. GFLOP/s count the multiplications and additions of matrix products, and of the
scores and the context that the mask allows: 3 and 3.5 times as many for forward and backward together. `of sgemm` is their share of
a matmul's GFLOP/s (PyTorch's or candle's, the faster one) in the same rotation. For decode it is the time of reading as many bytes
as the keys and values have, divided by our time.

`memory` is the peak of one run: of attention over the size of its inputs, its output and the gradients of both; of blocks that
recompute over blocks that keep everything, with the ratio of their times; of cross-entropy over candle's, without the logits.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "against_peers"))
import attention  # noqa: E402
import blocks  # noqa: E402
import lora  # noqa: E402
import memory  # noqa: E402
import models  # noqa: E402
import operations  # noqa: E402
from machine import machine  # noqa: E402
from peers import REPOSITORY, Ours, build, median_ms, rotate  # noqa: E402
from served import Served  # noqa: E402

# Rows and columns of the matrices of the matmul.
MATMUL = 1536
# Seconds before each turn.
PAUSE = 0.08


def cases(arguments):
    for rows in (attention.cases(), operations.cases(), blocks.cases(), lora.cases(), models.cases(arguments.minilm), memory.cases()):
        yield from rows


class Bench:
    pause = PAUSE

    def __init__(self, arguments):
        self.arguments, self.rounds, self.threads = arguments, arguments.rounds, arguments.threads
        self.program = build()
        self.ours, self.one_thread = self.serve(), Ours(self.program, 1)
        # What is measured of memory is measured in other processes.
        for server in (self.ours, self.one_thread):
            server.ask(do="keep_freed_memory")
        self.folder = tempfile.TemporaryDirectory()
        torch.set_num_threads(self.threads)
        matmuls = self.matmuls()
        self.best_matmul, _ = min(rotate(matmuls, 3, PAUSE).items(), key=lambda item: item[1])
        self.matmul = matmuls[self.best_matmul]

    def serve(self):
        return Ours(self.program, self.threads)

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

    def served(self, server, job, contender):
        return Served(server, job, contender, Path(self.folder.name) / "answer.safetensors")

    def contenders(self, case, inputs, path):
        """By the names of their columns."""
        job = self.ours.load(path, case.description())
        all = {"ours": self.served(self.ours, job, case.ours)}
        if case.name == "threads":
            one_thread = self.one_thread.load(path, case.description())
            all["one_thread"] = self.served(self.one_thread, one_thread, case.ours)
        if not self.arguments.without_candle:
            all |= {name: self.served(self.ours, job, contender) for name, contender in case.candle().items()}
        return all | case.peers(inputs, self.arguments)

    def row(self, case):
        # What has been compiled for other rows counts against a limit, beyond which nothing is compiled.
        torch.compiler.reset()
        inputs = case.inputs()
        path = Path(self.folder.name) / "inputs.safetensors"
        save_file(inputs, path)
        row = {"shape": case.shape, "dtype": case.dtype, "causal": case.causal, "case": case.name, "pass": case.pass_}
        if case.group == "memory":
            return row | case.measure(self, path)
        contenders = self.contenders(case, inputs, path)
        case.check({name: contender.answer() for name, contender in contenders.items()}, inputs)
        timers = {name: contender.time for name, contender in contenders.items()}
        if case.flops():
            timers["sgemm"] = self.matmul
        if case.bytes():
            timers["read"] = self.reading(case.bytes())
        times = rotate(timers, self.rounds, PAUSE)
        for server, job in {(x.server, x.job) for x in contenders.values() if isinstance(x, Served)}:
            server.ask(do="forget", id=job)
        row |= {f"{name}_ms": times.get(name) for name in ["ours", "torch", "ort"]}
        row |= {f"{name}_ms": ms for name, ms in times.items() if name != "sgemm"}
        if case.flops():
            row["sgemm_gflops"] = 2 * MATMUL**3 / times["sgemm"] / 1e6
            row["gflops"] = case.flops() / times["ours"] / 1e6
            row["sgemm_fraction"] = row["gflops"] / row["sgemm_gflops"]
        if case.bytes():
            row["gigabytes_per_second"] = case.bytes() / times["ours"] / 1e6
            row["bandwidth_fraction"] = times["read"] / times["ours"]
        return row


HEAD = ["shape", "case", "pass", "ours ms", "torch ms", "torch / ours", "compiled / ours", "ort / ours", "candle / ours"]
HEAD += ["flash_attn / ours", "1 / 2 threads", "GFLOP/s", "of sgemm", "memory"]
RATIOS = ["torch", "compiled", "ort", "candle", "candle_flash", "one_thread"]
MEMORY = {"memory_ratio": "", "time_ratio": " the time"}


def line(row):
    number = lambda x, digits=2: "" if x is None else f"{x:.{digits}f}"
    ratio = lambda name: number(row[f"{name}_ms"] / row["ours_ms"] if row.get(f"{name}_ms") else None)
    memory = [f"{row[key]:.2f} x{what}" for key, what in MEMORY.items() if key in row]
    return [
        "x".join(map(str, row["shape"])), " ".join([row["case"], row["dtype"], *["causal"] * row["causal"]]), row["pass"],
        number(row.get("ours_ms")), number(row.get("torch_ms")), *map(ratio, RATIOS), number(row.get("gflops"), 0),
        number(row.get("bandwidth_fraction") or row.get("sgemm_fraction")), ", ".join(memory),
    ]  # fmt: skip


WORDS = "`attention`, `operations`, `blocks`, `lora`, `models` or `memory`; a case, pass, dtype, `full` or `causal`"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    parser.add_argument("--shape", action="append", metavar="1x8x512x64", help="only this shape, as in the table's first column")
    parser.add_argument("--only", action="append", metavar="WORD", help=f"only rows with this word: {WORDS}; given twice, both words")
    parser.add_argument("--without-candle", action="store_true", help="leave out candle, which takes longest")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile, for operations, blocks and models")
    folder = REPOSITORY / "target/minilm"
    parser.add_argument("--minilm", type=Path, metavar="DIR", default=folder, help="the folder that `scripts/minilm` makes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def wanted(case, arguments):
    shape = "x".join(map(str, case.shape))
    return (not arguments.shape or shape in arguments.shape) and set(arguments.only or []) <= case.words()


def main():
    arguments = parse()
    chosen = [case for case in cases(arguments) if wanted(case, arguments)]
    for reason in dict.fromkeys(filter(None, (case.missing() for case in chosen))):
        print(reason, file=sys.stderr)
    chosen = [case for case in chosen if not case.missing()]
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
    bench.close()
    everything = machine(arguments.threads)
    print("\n" + "; ".join(f"{key} {value}" for key, value in everything.items()))
    if speeds := [row["sgemm_gflops"] for row in rows if "sgemm_gflops" in row]:
        everything["sgemm_gflops"] = median(speeds)
        print(f"sgemm ({bench.best_matmul}'s) {everything['sgemm_gflops']:.0f} GFLOP/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(everything | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
