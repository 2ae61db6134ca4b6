"""Write block_precision.json: how far PyTorch's norms and activations are from the truth in each dtype.

    pip install -r tests/golden/requirements.txt && python tests/golden/make_block_precision.py

Every case is computed in float32, float16 and bfloat16 by torch's own functions, and in float64 from the same rounded
inputs. What is written for the output and each gradient: the largest and the root of the mean square of the errors, and
as a check that others compute from the same inputs, the root of the mean square of the truth itself.

The inputs are not stored: `draw` of make_precision.py is exact in every language that has IEEE numbers, and is rounded
to float32 before it is rounded to a half type. The seeds are 1 (x or gate), 2 (weight or up), 3 (bias), 4 (gradient).
"""

import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from make_precision import DTYPES, draw, rms

FILE = Path(__file__).resolve().parent / "block_precision.json"
EPS = 1e-5

OPERATIONS = {
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS),
    "rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
}
NORMS = {"layer_norm": ["weight", "bias"], "rms_norm": ["weight"]}
GATED = {"swiglu": ["up"], "geglu": ["up"]}
SHAPES = [(300, 64), (64, 321)]


def inputs_of(operation, rows, n, dtype):
    """The operation's tensors by name, and the gradient of its result."""
    others = NORMS.get(operation) or GATED.get(operation, [])
    shape_of_others = (n,) if operation in NORMS else (rows, n)
    tensors = {"x": draw(1, rows, n).to(dtype)}
    tensors |= {name: draw(seed, *shape_of_others).to(dtype) for seed, name in enumerate(others, start=2)}
    return tensors, draw(4, rows, n).to(dtype)


def results(operation, tensors, grad):
    """The output and the gradients, all as float64."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    output = OPERATIONS[operation](*leaves.values())
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    named = {"output": output.detach()} | dict(zip(leaves, grads))
    return {name: tensor.double() for name, tensor in named.items()}


def measure(operation, rows, n, dtype):
    tensors, grad = inputs_of(operation, rows, n, dtype)
    truth = results(operation, {name: x.double() for name, x in tensors.items()}, grad.double())
    computed = results(operation, tensors, grad)
    return {
        name: {
            "max": (computed[name] - x).abs().max().item(),
            "rms": rms(computed[name] - x),
            "truth": rms(x),
        }
        for name, x in truth.items()
    }


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    cases = [
        {
            "operation": operation,
            "rows": rows,
            "n": n,
            "errors": {label: measure(operation, rows, n, dtype) for label, dtype in DTYPES.items()},
        }
        for operation in OPERATIONS
        for rows, n in SHAPES
    ]
    machine = torch.backends.cpu.get_cpu_capability()
    origin = {"torch": torch.__version__.split("+")[0], "cpu": f"{platform.machine()} {machine}"}
    FILE.write_text(json.dumps(origin | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
