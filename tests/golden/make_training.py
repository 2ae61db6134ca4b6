"""Write training.safetensors: PyTorch's losses with their gradients, and its AdamW.

    pip install -r tests/golden/requirements.txt && python tests/golden/make_training.py

Losses and embeddings are computed in each dtype by torch's own functions (`<case>.<dtype>.torch.<name>`), and in float64
from the same rounded inputs (`<case>.<dtype>.truth.<name>`). AdamW takes 200 steps down a quadratic loss in float32 and
float64, once with one decay for all parameters and once with none for vectors, on a falling learning rate.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

SEED = 15
DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
FILE = Path(__file__).resolve().parent / "training.safetensors"

ROWS, VOCABULARY, DIM = 16, 83, 12
STEPS = 200
BETAS, EPS, DECAY = (0.9, 0.99), 1e-8, 0.1

LOSSES = [
    {"name": "mean", "smoothing": 0.0, "ignore_index": None, "reduction": "mean"},
    {"name": "sum_smooth_ignore", "smoothing": 0.1, "ignore_index": -100, "reduction": "sum"},
    {"name": "mean_smooth_ignore", "smoothing": 0.3, "ignore_index": 7, "reduction": "mean"},
]


def loss_of(case, logits, targets):
    index = case["ignore_index"]
    return F.cross_entropy(
        logits,
        targets,
        ignore_index=-100 if index is None else index,
        label_smoothing=case["smoothing"],
        reduction=case["reduction"],
    )


def run(inputs, function):
    """The result of a function and the gradients of its inputs."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    result = function(**leaves)
    result.sum().backward()
    return {"result": result.detach(), **{f"grad_{name}": x.grad for name, x in leaves.items()}}


def both(tensors, case, inputs, function):
    """Stores the inputs, torch's results and the truth, in every dtype."""
    for name, dtype in DTYPES.items():
        rounded = {key: x.to(dtype) for key, x in inputs.items()}
        wide = {key: x.to(torch.float64) for key, x in rounded.items()}
        parts = {"in": rounded, "torch": run(rounded, function), "truth": run(wide, function)}
        for part, results in parts.items():
            for key, x in results.items():
                tensors[f"{case}.{name}.{part}.{key}"] = x.contiguous()


def losses(generator, tensors):
    for case in LOSSES:
        name = case["name"]
        targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
        targets[:3] = 7
        if case["ignore_index"] is not None:
            targets[::4] = case["ignore_index"]
        tensors[f"{name}.targets"] = targets
        logits = 3 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
        both(tensors, f"ce_{name}", {"logits": logits}, lambda logits: loss_of(case, logits, targets))
        inputs = {
            "hidden": torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64),
            "weight": 0.5 * torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64),
            "bias": torch.randn(VOCABULARY, generator=generator, dtype=torch.float64),
        }
        both(
            tensors,
            f"head_{name}",
            inputs,
            lambda hidden, weight, bias: loss_of(case, F.linear(hidden, weight, bias), targets),
        )


def embeddings(generator, tensors):
    ids = torch.randint(9, (ROWS * 8,), generator=generator)
    tensors["embedding.ids"] = ids
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64)
    scale = torch.randn(ROWS * 8, DIM, generator=generator, dtype=torch.float64)
    tensors["embedding.scale"] = scale.to(torch.float16)
    both(
        tensors,
        "embedding",
        {"weight": weight},
        lambda weight: F.embedding(ids, weight) * scale.to(torch.float16).to(weight.dtype),
    )


def learning_rate(step):
    return 0.01 + 0.04 * (1 + math.cos(math.pi * step / STEPS)) / 2


def adamw(generator, tensors):
    shapes = {"matrix": (7, 5), "vector": (6,), "tensor": (2, 3, 2)}
    start = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    goal = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    slope = {name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for name, shape in shapes.items()}
    for case in ("all", "groups"):
        for dtype in ("f32", "f64"):
            params = {name: x.to(DTYPES[dtype]).clone().requires_grad_() for name, x in start.items()}
            goals = {name: x.to(DTYPES[dtype]) for name, x in goal.items()}
            slopes = {name: x.to(DTYPES[dtype]) for name, x in slope.items()}
            for name in shapes:
                for part, x in (("start", start), ("goal", goals), ("slope", slopes)):
                    tensors[f"adamw_{case}.{dtype}.{part}.{name}"] = x[name].to(DTYPES[dtype]).clone()
            plain = [x for x in params.values() if x.dim() < 2 and case == "groups"]
            decaying = [x for x in params.values() if x.dim() >= 2 or case == "all"]
            groups = [{"params": decaying, "weight_decay": DECAY}]
            groups += [{"params": plain, "weight_decay": 0.0}] if plain else []
            optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
            for step in range(STEPS):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                optimizer.zero_grad()
                sum((slopes[name] * (params[name] - goals[name]).square()).sum() for name in shapes).backward()
                optimizer.step()
            for name, x in params.items():
                state = optimizer.state[x]
                parts = {"end": x.detach(), "first": state["exp_avg"], "second": state["exp_avg_sq"]}
                for part, x in parts.items():
                    tensors[f"adamw_{case}.{dtype}.{part}.{name}"] = x.clone()


def clipping(generator, tensors):
    for number, max_norm in enumerate((0.5, 100.0)):
        params = [torch.zeros(shape, requires_grad=True) for shape in ((4, 3), (5,))]
        for index, x in enumerate(params):
            x.grad = torch.randn(x.shape, generator=generator)
            tensors[f"clip_{number}.f32.grad.{index}"] = x.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        tensors[f"clip_{number}.f32.norm"] = norm
        for index, x in enumerate(params):
            tensors[f"clip_{number}.f32.clipped.{index}"] = x.grad


def main():
    generator, tensors = torch.Generator().manual_seed(SEED), {}
    for write in (losses, embeddings, adamw, clipping):
        write(generator, tensors)
    save_file(tensors, FILE, {"cases": json.dumps(LOSSES), "torch": torch.__version__, "seed": str(SEED)})


if __name__ == "__main__":
    main()
