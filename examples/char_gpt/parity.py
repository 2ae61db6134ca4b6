"""Train char_gpt's model with PyTorch, from the same initial parameters and on the same batches, and compare.

    pip install safetensors torch tqdm && python examples/char_gpt/parity.py

Two things are compared, in f32, on two threads each. The first is the loss of every step: 200 steps must agree within
1e-3. The second is the speed: the contenders train for ten steps in turns, and the table has the medians.

With `--dtype bf16` our model is in bf16, with copies of its parameters in f32 in the optimiser, and PyTorch's in f32 under autocast
to bf16. Then the first comparison is of our loss on the held-out text with that of our run in f32, after 1000 steps: they must
agree within 1%.

Initial parameters come from a run of zero steps. Batches, learning rates and AdamW's settings follow the rules of
src/text.rs, ../common/src/random.rs and src/training.rs.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))
from splitmix import Random  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(__file__).with_name("persuasion.txt")
TOLERANCE = 1e-3
# Of the loss on the held-out text in bf16.
TOLERANCE_OF_BF16 = 0.01


class Gpt:
    """The model of src/model.rs, in PyTorch."""

    def __init__(self, config, parameters):
        self.config = config
        self.parameters = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        half = config["width"] // config["heads"] // 2
        angles = torch.arange(config["len"], dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def norm(self, name, x):
        return F.rms_norm(x, x.shape[-1:], self.parameters[f"{name}.weight"], eps=1e-5)

    def linear(self, name, x):
        return F.linear(x, self.parameters[f"{name}.weight"])

    def rotate(self, x):
        if self.config["positions"] != "rotary":
            return x
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1)

    def attention(self, name, x):
        heads = lambda part: self.linear(f"{name}.{part}", x).unflatten(-1, (self.config["heads"], -1)).transpose(1, 2)
        query, key, value = self.rotate(heads("q_proj")), self.rotate(heads("k_proj")), heads("v_proj")
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.linear(f"{name}.o_proj", context.transpose(1, 2).flatten(2))

    def forward(self, tokens):
        x = F.embedding(tokens, self.parameters["tokens.weight"])
        if self.config["positions"] == "learned":
            x = x + self.parameters["positions.weight"]
        for layer in range(self.config["layers"]):
            block = f"blocks.{layer}"
            x = x + self.attention(f"{block}.attention", self.norm(f"{block}.attention_norm", x))
            hidden = F.relu(self.linear(f"{block}.mlp.up", self.norm(f"{block}.mlp_norm", x))).square()
            x = x + self.linear(f"{block}.mlp.down", hidden)
        return self.linear("head", self.norm("norm", x))


class Peer:
    """A training with PyTorch that follows the rules of the example."""

    def __init__(self, header, parameters, steps):
        self.run, self.steps, self.step = header["run"], steps, 0
        self.is_bf16 = self.run["dtype"] == "bf16"
        text = TEXT.read_text(encoding="utf-8")
        ids = {character: token for token, character in enumerate(header["vocabulary"])}
        tokens = torch.tensor([ids[character] for character in text])
        self.tokens = tokens[: len(tokens) - len(tokens) // 10]
        self.model = Gpt(self.run["model"], parameters)
        trained = self.model.parameters.values()
        self.optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)

    def batch(self):
        length = self.run["model"]["len"]
        random = Random(self.run["model"]["seed"], "batch", self.step)
        starts = [random.next() % (len(self.tokens) - length) for _ in range(self.run["batch"])]
        part = lambda shift: torch.stack([self.tokens[start + shift : start + shift + length] for start in starts])
        return part(0), part(1)

    def learning_rate(self):
        warm_up = min(100, self.steps // 10)
        if self.step < warm_up:
            return self.run["lr"] * (self.step + 1) / warm_up
        done = (self.step - warm_up) / max(self.steps - warm_up, 1)
        return self.run["lr"] * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def train(self, steps):
        """The losses of the next steps, and the tokens trained on each second."""
        losses, start = [], time.perf_counter()
        for _ in range(steps):
            inputs, targets = self.batch()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
                loss = F.cross_entropy(self.model.forward(inputs).flatten(0, 1), targets.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.param_groups[0]["lr"] = self.learning_rate()
            self.optimizer.step()
            losses.append(loss.item())
            self.step += 1
        tokens = steps * self.run["batch"] * self.run["model"]["len"]
        return losses, tokens / (time.perf_counter() - start)


def build():
    command = ["cargo", "build", "--quiet", "--release", "-p", "char_gpt", "--message-format", "json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    messages = [json.loads(line) for line in lines]
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "char_gpt")


def ours(program, flags, *more):
    command = [program, "--json", "--sample", "0", *flags, *more]
    # Without it candle asks the operating system for the number of threads at every matrix product.
    environment = {**os.environ, "RAYON_NUM_THREADS": "2"}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return json.loads(result.stdout)


def start(program, flags, file):
    """The header and the initial parameters that a run of zero steps saves."""
    ours(program, flags, "--steps", "0", "--out", file)
    with safe_open(file, "pt") as saved:
        header = json.loads(saved.metadata()["char_gpt"])
        names = [name for name in saved.keys() if name.startswith("model.")]
        return header, {name.removeprefix("model."): saved.get_tensor(name).float() for name in names}


def compare_losses(program, flags, steps, file):
    """The largest difference of a step's losses, and our last loss."""
    theirs = Peer(*start(program, flags, file), steps).train(steps)[0]
    losses = ours(program, flags, "--steps", str(steps), "--out", file, "--save-every", str(steps))["losses"]
    return max(abs(a - b) for a, b in zip(losses, theirs, strict=True)), losses[-1]


def compare_held_out(program, file):
    """The losses on the held-out text after 1000 steps, in bf16 and in f32."""
    flags = ["--steps", "1000", "--out", file, "--save-every", "1000"]
    return [ours(program, ["--dtype", dtype], *flags)["validation_loss"] for dtype in ("bf16", "f32")]


def compare_speed(program, flags, rounds, file):
    """Tokens per second of both: the medians of turns of ten steps."""
    header, parameters = start(program, flags, file)
    speeds = []
    for _ in tqdm(range(rounds), desc=" ".join(flags) or "default", leave=False, disable=None):
        mine = ours(program, flags, "--steps", "10", "--out", file)["tokens_per_second"]
        speeds.append((mine, Peer(header, parameters, 10).train(10)[1]))
    return [median(column) for column in zip(*speeds)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps whose losses are compared")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender in the timing")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    sys.stdout.reconfigure(line_buffering=True)
    program = build()
    failure = None
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "run.safetensors")
        if arguments.dtype == "bf16":
            bf16, f32 = compare_held_out(program, file)
            print(f"held out after 1000 steps: {bf16:.4f} in bf16, {f32:.4f} in f32")
            if abs(bf16 - f32) > TOLERANCE_OF_BF16 * f32:
                failure = f"expected a loss within {TOLERANCE_OF_BF16:.0%} of {f32}, got {bf16}"
        for positions in ["rotary", "learned"] if arguments.dtype == "f32" else []:
            difference, last = compare_losses(program, ["--positions", positions], arguments.steps, file)
            print(f"{positions}: {arguments.steps} losses, the last {last:.4f}, differ by at most {difference:.1e}")
            if difference > TOLERANCE:
                failure = f"expected losses within {TOLERANCE}, got a difference of {difference}"
        print("\n| flags | tokens/s | PyTorch | ratio |\n|---|---|---|---|")
        for flags in ["", "--width 256 --heads 8", "--len 512 --batch 4"]:
            of_dtype = [*flags.split(), "--dtype", arguments.dtype]
            mine, theirs = compare_speed(program, of_dtype, arguments.rounds, file)
            print(f"| {flags or 'default'} | {mine:.0f} | {theirs:.0f} | {mine / theirs:.2f} |")
    if failure:
        sys.exit(failure)


if __name__ == "__main__":
    main()
