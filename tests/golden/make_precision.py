"""Write precision.json: how far PyTorch's attention is from the truth in each dtype.

    pip install -r tests/golden/requirements.txt && python tests/golden/make_precision.py

Every case is computed in float32, float16 and bfloat16 by torch's own function, with
the kernel that it picks by itself, and in float64 by its plain formula (SDPBackend.MATH)
from the same rounded inputs. What is written for the context and each gradient: the
largest and the root of the mean square of the errors, and as a check that others compute
from the same inputs, the root of the mean square of the truth itself.

The inputs are not stored: `draw` below is exact in every language that has IEEE numbers,
and is rounded to float32 before it is rounded to a half type.
"""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FILE = Path(__file__).resolve().parent / "precision.json"


@dataclass(frozen=True)
class Case:
    """One problem. `bias` is None, "constant" or "trained", over (heads, q_len, kv_len)."""

    name: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 197
    kv_len: int = 197
    head_dim: int = 64
    is_causal: bool = False
    bias: str | None = None
    key_lengths: tuple[int, ...] | None = None


CASES = [
    Case("full"),
    Case("full_d40", head_dim=40),
    Case("full_d128_l512", q_len=512, kv_len=512, head_dim=128),
    Case("causal", is_causal=True),
    Case("causal_gqa_l512", heads=4, kv_heads=2, q_len=512, kv_len=512, is_causal=True),
    Case("bias_constant", bias="constant"),
    Case("bias_trained_d40", head_dim=40, bias="trained"),
    Case("padding", batch=2, key_lengths=(197, 61)),
    Case("cross_odd", q_len=113, kv_len=301, head_dim=111),
    Case("decode_gqa", heads=8, kv_heads=2, q_len=1, kv_len=1023, head_dim=128),
]  # fmt: skip


def draw(seed, *shape):
    """Near-normal numbers: sums of four uniforms, from SplitMix64, as in tests/common."""
    with np.errstate(over="ignore"):
        places = np.arange(1, 4 * int(np.prod(shape)) + 1, dtype=np.uint64)
        z = np.uint64(seed) + places * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(11)).astype(np.float64) / 2.0**53
    a, b, c, d = uniform.reshape(-1, 4).T
    numbers = (a + b + c + d - 2.0) * 1.7320508075688772
    return torch.from_numpy(numbers).reshape(shape).float()


def inputs_of(case, dtype):
    """Query, key, value, bias if there is one, and the gradient of the context."""
    kv = case.batch, case.kv_heads, case.kv_len, case.head_dim
    query = case.batch, case.heads, case.q_len, case.head_dim
    shapes = {"query": query, "key": kv, "value": kv, "grad_context": query}
    if case.bias:
        shapes["bias"] = case.heads, case.q_len, case.kv_len
    return {
        name: draw(seed, *shape).to(dtype)
        for seed, (name, shape) in enumerate(shapes.items(), start=1)
    }


def results(case, inputs):
    """The context and the gradients, all as float64."""
    trained = ["query", "key", "value"] + (["bias"] if case.bias == "trained" else [])
    leaves = {name: inputs[name].clone().requires_grad_() for name in trained}
    mask = leaves.get("bias", inputs.get("bias"))
    if mask is not None:
        mask = mask[None]  # torch's kernels want four axes
    if case.key_lengths:
        mask = torch.arange(case.kv_len) < torch.tensor(case.key_lengths)[:, None, None, None]
    context = F.scaled_dot_product_attention(
        leaves["query"], leaves["key"], leaves["value"],
        attn_mask=mask, is_causal=case.is_causal, enable_gqa=case.heads != case.kv_heads,
    )  # fmt: skip
    grads = torch.autograd.grad(context, list(leaves.values()), inputs["grad_context"])
    named = {"context": context.detach()} | dict(zip(leaves, grads))
    return {name: tensor.double() for name, tensor in named.items()}


def rms(x):
    return x.square().mean().sqrt().item()


def measure(case, dtype):
    inputs = inputs_of(case, dtype)
    with sdpa_kernel(SDPBackend.MATH):
        truth = results(case, {name: x.double() for name, x in inputs.items()})
    computed = results(case, inputs)
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
        asdict(case) | {"errors": {label: measure(case, d) for label, d in DTYPES.items()}}
        for case in CASES
    ]
    machine = torch.backends.cpu.get_cpu_capability()
    origin = {"torch": torch.__version__.split("+")[0], "cpu": f"{platform.machine()} {machine}"}
    FILE.write_text(json.dumps(origin | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
