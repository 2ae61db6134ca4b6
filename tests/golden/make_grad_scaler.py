"""Write grad_scaler.json: how torch.amp.GradScaler's scale follows finite and other gradients.

    pip install -r tests/golden/requirements.txt && python tests/golden/make_grad_scaler.py

Each case has a config and the gradient of each step, as a word of f (finite), i (infinite) and n (NaN). What is written
for each step: the scale after it, and whether the parameter has moved. No number is drawn at random but the words, from
the seed. The last case starts where float32 has hardly room above it.
"""

import json
import random
from pathlib import Path

import torch

SEED = 4
FILE = Path(__file__).resolve().parent / "grad_scaler.json"
GRADIENTS = {"f": 1.0, "i": float("-inf"), "n": float("nan")}

CONFIGS = [
    {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
    {"init_scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3},
    {"init_scale": 1000.1, "growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 2},
    {"init_scale": 2.0**125, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 1},
]


def run(config, word):
    """The scale after each step, and whether the step was taken."""
    scaler = torch.amp.GradScaler("cpu", **config)
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scales, stepped = [], []
    for letter in word:
        before = parameter.detach().clone()
        scaler.scale(torch.zeros(()))
        parameter.grad = torch.tensor([1.0, GRADIENTS[letter], 1.0])
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        stepped.append(not torch.equal(before, parameter))
    return {"scales": scales, "stepped": stepped}


def main():
    generator = random.Random(SEED)
    cases = []
    for config in CONFIGS:
        word = "f" * 6 + "".join(generator.choices("fin", weights=(6, 1, 1), k=60))
        cases.append({"config": config, "gradients": word, **run(config, word)})
    lines = ",\n".join(json.dumps(case) for case in cases)
    FILE.write_text(f'{{"torch": "{torch.__version__.split("+")[0]}", "seed": {SEED}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
