"""Attention, decoding, and a layer with its projections."""

from dataclasses import dataclass

import torch

from case import DTYPES, Case, normals
from modules import ATTENTION, TorchModule
from ort import OrtAttention
from peers import TorchAttention

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


def attention_flops(batch, heads, q_len, kv_len, dim, causal, backward):
    """Multiplications and additions of the scores and the context that the mask allows."""
    pairs = q_len * (q_len + 1) // 2 if causal else q_len * kv_len
    return 4 * batch * heads * pairs * dim * (3.5 if backward else 1)


@dataclass(frozen=True)
class Attention(Case):
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

    group = "attention"
    ours = "ours_fused"

    @property
    def pass_(self):
        return "decode" if self.name == "decode" else super().pass_

    @property
    def shape(self):
        if self.name == "decode":
            return [self.batch, self.heads, self.kv_heads, self.kv_len, self.dim]
        return [self.batch, self.heads, self.q_len, self.dim]

    def words(self):
        return super().words() | {"causal" if self.causal else "full"}

    def flops(self):
        return attention_flops(self.batch, self.heads, self.q_len, self.kv_len, self.dim, self.causal, self.backward)

    def bytes(self):
        return 2 * self.batch * self.kv_heads * self.kv_len * self.dim * 4 if self.name == "decode" else 0

    def inputs(self):
        normal = normals()
        inputs = {
            "query": normal(self.batch, self.heads, self.q_len, self.dim),
            "key": normal(self.batch, self.kv_heads, self.kv_len, self.dim),
            "value": normal(self.batch, self.kv_heads, self.kv_len, self.dim),
        }
        if self.backward:
            inputs["grad_output"] = normal(self.batch, self.heads, self.q_len, self.dim)
        inputs = {name: x.to(DTYPES[self.dtype]) for name, x in inputs.items()}
        if self.name == "bias":
            inputs["bias"] = normal(self.q_len, self.kv_len)
        if self.name == "padding":
            # The shorter sequences of a batch end in padding. All but the first keep at least half of their keys.
            lengths = [self.kv_len * (4 - b % 3) // 4 - b % 2 for b in range(1, self.batch + 1)]
            inputs["key_mask"] = (torch.arange(self.kv_len) < torch.tensor(lengths)[:, None]).to(torch.uint8)
        return inputs

    def description(self):
        return {"kind": "attention", "causal": self.causal, "backward": self.backward}

    def candle(self):
        if self.name != "plain" or self.dtype != "f32" or self.kv_len > 2048:
            return {}
        return {"candle": "candle"} | ({} if self.backward else {"candle_flash": "candle_flash"})

    def peers(self, inputs, arguments):
        if self.name == "threads":
            return {}
        peers = {"torch": TorchAttention(self, inputs)}
        if self.dtype == "f32" and not self.backward:
            peers["ort"] = OrtAttention(self, inputs, arguments.threads)
        return peers


@dataclass(frozen=True)
class Layer(Case):
    batch: int
    length: int
    width: int
    heads: int
    backward: bool

    group, name = "attention", "layer"

    @property
    def shape(self):
        return [self.batch, self.length, self.width, self.heads]

    def words(self):
        return super().words() | {"full"}

    def flops(self):
        projections = 8 * self.batch * self.length * self.width**2 * (3 if self.backward else 1)
        head_dim = self.width // self.heads
        shape = (self.batch, self.heads, self.length, self.length, head_dim)
        return attention_flops(*shape, causal=False, backward=self.backward) + projections

    def inputs(self):
        normal, width = normals(), self.width
        parts = {f"{part}_proj.weight": normal(width, width) / width**0.5 for part in "qkvo"}
        parts |= {f"{part}_proj.bias": normal(width) for part in "qkvo"}
        return parts | {name: normal(self.batch, self.length, width) for name in ("x", "grad_output")}

    def description(self):
        return {"kind": "layer", "num_heads": self.heads, "backward": self.backward}

    def peers(self, inputs, arguments):
        module = torch.nn.MultiheadAttention(self.width, self.heads, batch_first=True)
        call = lambda module, x: module(x, x, x, need_weights=False)[0]
        return {"torch": TorchModule(module, call, inputs, ATTENTION, self.backward)}


def cases():
    attention = lambda name, shape, **rest: Attention(name, shape[0], shape[1], shape[1], shape[2], *shape[2:], **rest)
    both = [False, True]
    for shape in [*SHAPES, ONE_HEAD]:
        yield from (attention("plain", shape, causal=c, backward=b) for b in both for c in both)
    for name in ["bias", "padding"]:
        yield from (attention(name, shape, backward=b) for shape in SHAPES for b in both)
    for dtype in ["bf16", "f16"]:
        yield from (attention("plain", shape, dtype=dtype, backward=b) for shape in SHAPES for b in both)
    for batch, heads, kv_heads, kv_len, dim in DECODES:
        yield Attention("decode", batch, heads, kv_heads, 1, kv_len, dim)
    for shape in LAYERS:
        yield from (Layer(*shape, backward=b) for b in both)
    for shape in [s for s in SHAPES if s[2] >= 512] + [ONE_HEAD]:
        yield from (attention("threads", shape, backward=b) for b in both)
