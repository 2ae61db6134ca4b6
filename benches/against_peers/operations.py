"""The operations of a transformer beside attention, one by one, and a step of AdamW."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from case import DTYPES, Case, normals
from peers import Torch

ROWS = 2048
WIDTHS = [256, 1024]
VOCABULARY = 50257
# As in `operation.rs`.
HEAD_DIM, EPS, DROPOUT_P = 64, 1e-5, 0.1
# The matrices of one optimiser, and the vectors. The rate is so large that a step that is wrong, or left out, shows.
MATRICES, LEARNING_RATE = 12, 1.0


def rotate(x, cos, sin):
    """As transformers rotates: entry i with entry i + dim / 2."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


# For each operation its inputs at width d, in PyTorch's order, and PyTorch's function of them. An input is a shape; or a range from
# which whole numbers are drawn, one for each row; or a function of the angles of all positions.
OPERATIONS = {
    "linear": (lambda d: {"x": (ROWS, d), "weight": (d, d), "bias": (d,)}, F.linear),
    "rms_norm": (
        lambda d: {"x": (ROWS, d), "weight": (d,)},
        lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    ),
    "layer_norm": (
        lambda d: {"x": (ROWS, d), "weight": (d,), "bias": (d,)},
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS),
    ),
    "rotary": (lambda d: {"x": (1, d // HEAD_DIM, ROWS, HEAD_DIM), "cos": torch.cos, "sin": torch.sin}, rotate),
    "gelu": (lambda d: {"x": (ROWS, d)}, F.gelu),
    "gelu_tanh": (lambda d: {"x": (ROWS, d)}, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (lambda d: {"x": (ROWS, d)}, F.silu),
    "squared_relu": (lambda d: {"x": (ROWS, d)}, lambda x: F.relu(x).square()),
    "swiglu": (lambda d: {"gate": (ROWS, d), "up": (ROWS, d)}, lambda gate, up: F.silu(gate) * up),
    "geglu": (lambda d: {"gate": (ROWS, d), "up": (ROWS, d)}, lambda gate, up: F.gelu(gate) * up),
    "add_dropped": (
        lambda d: {"x": (ROWS, d), "branch": (ROWS, d)},
        lambda x, branch: x + F.dropout(branch, DROPOUT_P),
    ),
    "embedding": (lambda d: {"ids": range(VOCABULARY), "weight": (VOCABULARY, d)}, F.embedding),
    "cross_entropy": (lambda d: {"logits": (ROWS, d), "labels": range(d)}, F.cross_entropy),
    "linear_cross_entropy": (
        lambda d: {"x": (ROWS, d), "weight": (VOCABULARY, d), "labels": range(VOCABULARY)},
        lambda x, weight, labels: F.cross_entropy(F.linear(x, weight), labels),
    ),
}
OTHER_WIDTHS = {"cross_entropy": [*WIDTHS, VOCABULARY], "linear_cross_entropy": [256]}


class InHalfTypesToo(Case):
    """A row whose answer in a half type is compared with PyTorch's in f32: its gradient of a bias of a layer norm in bf16 is off by 7%
    of the largest number."""

    group = "operations"

    @property
    def tolerance(self):
        return {"bf16": 1e-2}.get(self.dtype, super().tolerance)

    def candle(self):
        # In a half type its sums over all rows stop growing.
        return {"candle": "candle"} if self.dtype == "f32" else {}

    def expected(self, answers, inputs):
        if self.dtype == "f32":
            return answers["torch"]
        return self.on_torch({name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}).answer()

    def peers(self, inputs, arguments):
        peers = {"torch": self.on_torch(inputs)}
        return peers | ({"compiled": self.on_torch(inputs, compiled=True)} if arguments.compile else {})


@dataclass(frozen=True)
class Operation(InHalfTypesToo):
    name: str
    width: int
    dtype: str
    backward: bool

    @property
    def shape(self):
        return [ROWS, self.width]

    def flops(self):
        outputs = {"linear": self.width, "linear_cross_entropy": VOCABULARY}.get(self.name, 0)
        return 2 * ROWS * self.width * outputs * (3 if self.backward else 1)

    def specs(self):
        return OPERATIONS[self.name][0](self.width)

    def trained(self):
        return [name for name, spec in self.specs().items() if isinstance(spec, tuple)] if self.backward else []

    def inputs(self):
        normal, dtype = normals(), DTYPES[self.dtype]
        generator = torch.Generator().manual_seed(2)
        frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
        angles = torch.outer(torch.arange(ROWS, dtype=torch.float64), frequencies).repeat(1, 2)

        def input_of(name, spec):
            if isinstance(spec, range):
                return torch.randint(spec.stop, (ROWS,), generator=generator)
            if callable(spec):
                return spec(angles).to(dtype)
            # The outputs of a matrix are about as large as its inputs.
            scale = spec[-1] ** -0.5 if name == "weight" and len(spec) == 2 else 1
            return (normal(*spec) * scale).to(dtype)

        inputs = {name: input_of(name, spec) for name, spec in self.specs().items()}
        if self.backward:
            output = OPERATIONS[self.name][1](*inputs.values())
            # A loss is a mean over the rows: so its gradients are about as large as others.
            grad = normal(*output.shape) if output.dim() else torch.tensor(float(ROWS))
            inputs["grad_output"] = grad.to(dtype)
        return inputs

    def description(self):
        return {"kind": "operation", "name": self.name, "trained": self.trained()}

    def on_torch(self, inputs, compiled=False):
        function = OPERATIONS[self.name][1]
        if compiled:
            function = torch.compile(function, dynamic=False)
        trained = {name: inputs[name].clone().requires_grad_() for name in self.trained()}
        values = [trained.get(name, inputs[name]) for name in self.specs()]
        return Torch(lambda: function(*values), trained, inputs.get("grad_output"))

    def check(self, answers, inputs):
        if self.name != "add_dropped":
            return super().check(answers, inputs)
        # Each contender drops others. Where a number is dropped, the sum is the other one.
        for name, answer in answers.items():
            share = (answer["output"] == inputs["x"]).double().mean().item()
            if abs(share - DROPOUT_P) > 0.02:
                raise SystemExit(f"{self}: {name} drops {share:.2f} of all numbers, expected {DROPOUT_P}")


class TorchAdamW(Torch):
    """The parameters after the next step of PyTorch's AdamW."""

    def __init__(self, inputs, compiled=False):
        self.parameters = {name: x.clone() for name, x in inputs.items() if not name.startswith("grad_")}
        for name, parameter in self.parameters.items():
            parameter.grad = inputs[f"grad_{name}"]
        # What is compiled is the step by tensor operations.
        self.step = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE, fused=not compiled).step
        if compiled:
            self.step = torch.compile(self.step, dynamic=False)

    def run(self):
        self.step()
        return self.parameters

    def answer(self):
        return {name: parameter.clone() for name, parameter in self.run().items()}


@dataclass(frozen=True)
class AdamW(InHalfTypesToo):
    width: int
    dtype: str

    name, pass_ = "adamw", "step"

    @property
    def shape(self):
        return [MATRICES, self.width, self.width]

    def inputs(self):
        normal, shapes = normals(), {"matrix": (self.width, self.width), "vector": (self.width,)}
        parameters = {f"{name}.{i}": shape for name, shape in shapes.items() for i in range(MATRICES)}
        inputs = {f"{prefix}{name}": normal(*shape) for name, shape in parameters.items() for prefix in ("", "grad_")}
        return {name: x.to(DTYPES[self.dtype]) for name, x in inputs.items()}

    def description(self):
        return {"kind": "adamw", "lr": LEARNING_RATE}

    def on_torch(self, inputs, compiled=False):
        return TorchAdamW(inputs, compiled)


def cases():
    for dtype in ["f32", "bf16"]:
        for name in OPERATIONS:
            for width in OTHER_WIDTHS.get(name, WIDTHS):
                yield from (Operation(name, width, dtype, backward) for backward in (False, True))
        yield from (AdamW(width, dtype) for width in WIDTHS)
