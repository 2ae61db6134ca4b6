"""The arguments of every kernel, as kernels/src/cuda/device/problem.cuh has them, from PyTorch's tensors; and attention in f64."""

import ctypes
import re
from ctypes import c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

import torch
from variants import DEVICE

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FAR = 2**30  # more than any position


class Strided(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]

    @classmethod
    def of(cls, x):
        assert x.stride(3) == 1
        return cls(x.data_ptr(), *x.stride()[:3])


class MaskRule(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("offsets", "lengths", "query_documents", "key_documents")),
        ("documents_batch", c_int64), ("table", c_void_p), ("table_strides", c_int64 * 4),
        ("map", c_void_p), ("map_strides", c_int64 * 2),
        *((name, c_int) for name in ("offset", "below", "above", "keys", "always", "reserved")),
    ]  # fmt: skip


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, Strided) for name in ("q", "k", "v", "o", "d_o", "dq", "dk", "dv")),
        *((name, c_void_p) for name in ("largest", "log_total", "lse", "delta", "d_lse", "bias")),
        ("bias_strides", c_int64 * 4), ("d_bias", c_void_p), ("slopes", c_void_p), ("slopes_batch", c_int64),
        *((name, c_void_p) for name in ("slope_rows", "sinks", "sink_rows", "careful", "partial")),
        ("mask", MaskRule), ("seed", c_uint64), ("dropout_first", c_uint64), ("bias_dims", c_int * 4),
        *((name, c_int) for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")),
        ("scale", c_float), ("softcap", c_float), ("dropout_keep", c_float), ("dropout_threshold", c_uint32),
        *((name, c_int) for name in ("careful_queries", "careful_keys", "splits")),
    ]  # fmt: skip


def check_sizes():
    """The kernels' own file asserts these sizes of its structs."""
    source = (DEVICE / "problem.cuh").read_text()
    expected = {name: int(size) for name, size in re.findall(r"sizeof\((\w+)\) == (\d+)", source)}
    got = {struct.__name__: ctypes.sizeof(struct) for struct in (Strided, MaskRule, Problem)}
    assert got == expected, f"problem.py has structs of {got} bytes, problem.cuh of {expected}"


check_sizes()


@dataclass(frozen=True)
class Case:
    """One call of attention. The options need the general kernels."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    value_dim: int
    dtype: str
    causal: bool = False
    window: int = 0  # keys before the query's own; 0 is all
    options: bool = False  # softcap, bias, ALiBi, sinks, a gradient of the log-sum-exp
    magnitude: float = 1.0  # of the query

    def __str__(self):
        words = [f"{self.batch}x{self.heads}/{self.kv_heads}x{self.q_len}/{self.kv_len}x{self.dim}/{self.value_dim}", self.dtype]
        words += ["causal"] * self.causal + [f"window {self.window}"] * bool(self.window) + ["options"] * self.options
        return " ".join(words + [f"query x {self.magnitude:g}"] * (self.magnitude != 1))

    @property
    def scale(self):
        return self.dim**-0.5

    def mask(self):
        below, above = self.window or FAR, 0 if self.causal else FAR
        return MaskRule(offset=self.kv_len - self.q_len, below=below, above=above, keys=self.kv_len, always=self.kv_len)

    def visible(self, device):
        distance = self.distance(device)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen &= distance <= 0
        if self.window:
            seen &= distance >= -self.window
        return seen

    def distance(self, device):
        rows, columns = torch.arange(self.q_len, device=device)[:, None], torch.arange(self.kv_len, device=device)
        return columns - rows - (self.kv_len - self.q_len)


class Inputs:
    """Seeded inputs of a case. By token: (batch, len, heads, dim) in memory, as a projection makes them."""

    def __init__(self, case, device, by_token=True):
        generator = torch.Generator("cpu").manual_seed(1)
        self.case = case
        normal = lambda *shape: torch.randn(shape, generator=generator)
        c = case

        def tensor(heads, length, dim):
            x = normal(c.batch, length, heads, dim).to(device=device, dtype=DTYPES[c.dtype]).transpose(1, 2)
            return x if by_token else x.contiguous()

        self.q = tensor(c.heads, c.q_len, c.dim) * c.magnitude
        self.k, self.v = tensor(c.kv_heads, c.kv_len, c.dim), tensor(c.kv_heads, c.kv_len, c.value_dim)
        self.d_o = tensor(c.heads, c.q_len, c.value_dim)
        self.softcap, self.bias, self.slopes, self.sinks, self.d_lse = 0.0, None, None, None, None
        if c.options:
            self.softcap = 5.0
            self.bias = normal(1, c.heads, c.q_len, c.kv_len).to(device)
            self.slopes, self.sinks = (normal(c.heads).abs() / 8).to(device), normal(c.heads).to(device)
            self.d_lse = normal(c.batch, c.heads, c.q_len).to(device)

    def all(self):
        return [x for x in (self.q, self.k, self.v, self.d_o, self.bias, self.slopes, self.sinks, self.d_lse) if x is not None]


def exact(inputs):
    """By name: context, log-sum-exp and every gradient, in f64."""
    case, device = inputs.case, inputs.q.device
    double = lambda x: x.detach().double().requires_grad_()
    q, k, v = map(double, (inputs.q, inputs.k, inputs.v))
    trained = {"dq": q, "dk": k, "dv": v}
    repeat = case.heads // case.kv_heads
    s = q @ k.repeat_interleave(repeat, 1).mT * case.scale
    sums = s
    if case.options:
        bias, slopes, sinks = map(double, (inputs.bias, inputs.slopes, inputs.sinks))
        trained |= {"bias": bias, "slopes": slopes, "sinks": sinks}
        distance = case.distance(device).abs().double()
        sums = inputs.softcap * (s / inputs.softcap).tanh() + bias - slopes[:, None, None] * distance
    sums = sums.masked_fill(~case.visible(device), float("-inf"))
    terms = sums
    if case.options:
        terms = torch.cat([sums, sinks[None, :, None, None].expand(*sums.shape[:3], 1)], 3)
    seen = terms.detach().isfinite().any(3)
    lse = terms.masked_fill(~seen[..., None], 0).logsumexp(3)
    weights = (sums - lse[..., None]).exp() * seen[..., None]
    o = weights @ v.repeat_interleave(repeat, 1)
    loss = (o * inputs.d_o.double()).sum()
    if inputs.d_lse is not None:
        loss = loss + (lse * inputs.d_lse.double()).sum()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    lse = torch.where(seen, lse, float("-inf"))
    return {"o": o.detach(), "lse": lse.detach()} | dict(zip(trained, gradients))
