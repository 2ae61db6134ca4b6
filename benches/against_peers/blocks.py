"""Transformer blocks."""

from dataclasses import dataclass

import torch

from attention import LAYERS, attention_flops
from case import Case, normals
from modules import BLOCK, TorchModule


@dataclass(frozen=True)
class Blocks(Case):
    """Blocks with layer norms, GELU and biases, one after the other. PyTorch has one, `nn.TransformerEncoderLayer`."""

    batch: int
    length: int
    width: int
    heads: int
    norm_first: bool
    backward: bool
    count: int = 1
    recompute: bool = False

    group = "blocks"

    @property
    def name(self):
        return "pre-norm block" if self.norm_first else "post-norm block"

    @property
    def shape(self):
        return [self.batch, self.length, self.width, self.heads]

    def flops(self):
        # Of four projections and two products with four times as many columns, or rows.
        products = 24 * self.batch * self.length * self.width**2 * (3 if self.backward else 1)
        head_dim = self.width // self.heads
        shape = (self.batch, self.heads, self.length, self.length, head_dim)
        return self.count * (attention_flops(*shape, causal=False, backward=self.backward) + products)

    def parameters(self, prefix):
        width, hidden = self.width, 4 * self.width
        shapes = {f"attention.{part}_proj": (width, width) for part in "qkvo"}
        shapes |= {"mlp.up": (hidden, width), "mlp.down": (width, hidden)}
        shapes |= {"attention_norm": (width,), "mlp_norm": (width,)}
        return {f"{prefix}.{name}": shape for name, shape in shapes.items()}

    def inputs(self):
        normal, inputs = normals(), {}
        for i in range(self.count):
            for name, shape in self.parameters(f"blocks.{i}").items():
                # Near 1 for a norm. Otherwise the outputs are about as large as the inputs.
                inputs[f"{name}.weight"] = 1 + normal(*shape) / 10 if len(shape) == 1 else normal(*shape) / shape[1] ** 0.5
                inputs[f"{name}.bias"] = normal(shape[0]) / 10
        return inputs | {name: normal(self.batch, self.length, self.width) for name in ("x", "grad_output")}

    def description(self):
        of_case = {name: getattr(self, name) for name in ("count", "norm_first", "backward", "recompute")}
        return {"kind": "blocks", "num_heads": self.heads, **of_case}

    def on_torch(self, inputs, compiled=False):
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": self.norm_first}
        module = torch.nn.TransformerEncoderLayer(self.width, self.heads, 4 * self.width, **options)
        return TorchModule(module, lambda module, x: module(x), inputs, BLOCK, self.backward, compiled)

    def peers(self, inputs, arguments):
        peers = {"torch": self.on_torch(inputs)}
        return peers | ({"compiled": self.on_torch(inputs, compiled=True)} if arguments.compile else {})


def cases():
    for norm_first in (False, True):
        for shape in LAYERS:
            yield from (Blocks(*shape, norm_first, backward) for backward in (False, True))
