"""Write the golden files that the integration tests compare with PyTorch.

    pip install -r tests/golden/requirements.txt && python tests/golden/make_golden.py

The safetensors files are written beside this script. Every case is stored in
float32 and float64 from the same inputs, under `<case>.<f32|f64>.<tensor>`; the
parameters of the cases are JSON in the metadata entry `cases`. Each case draws
from its own seed, so that adding one leaves the others as they were.

The context and gradients of an attention case come from torch's own function
where its `source` is `torch`, and from the formula below where it is `formula`;
`weights` and `logsumexp`, which torch does not return, always come from the latter.
"""

import json
import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

SEED = 20
DTYPES = {"f32": torch.float32, "f64": torch.float64}
FOLDER = Path(__file__).resolve().parent


class Draw:
    """The random tensors of one case: float64 values that float32 holds exactly."""

    def __init__(self, file, case):
        seed = zlib.crc32(f"{SEED}/{file}/{case}".encode())
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, mean=0.0, std=1.0):
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (mean + std * values).float().double()

    def mask(self, *shape):
        """Booleans, about half of them true, with at least one true in each row."""
        width = shape[-1]
        allowed = torch.rand(shape, generator=self.generator) < 0.5
        sure = torch.randint(width, shape[:-1], generator=self.generator)
        return allowed | F.one_hot(sure, width).bool()


def keep_first(lengths, width):
    """(batch, width) booleans: row b is true on its first `lengths[b]` places."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def leaves(inputs, dtype):
    """Copies of the inputs for autograd: floats as `dtype` leaves, masks as they are."""
    return {
        name: tensor.to(dtype).requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def gradients(output, cotangent, inputs):
    """`grad_<name>` of sum(output * cotangent) for each named input."""
    grads = torch.autograd.grad((output * cotangent).sum(), list(inputs.values()))
    return {f"grad_{name}": grad for name, grad in zip(inputs, grads)}


# --- scaled dot-product attention ---------------------------------------------


@dataclass(frozen=True)
class SdpaCase:
    """One attention case; `bias` and `mask` name the axes kept of (b, h, q, k)."""

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 4
    kv_len: int = 4
    head_dim: int = 6
    value_dim: int = 6
    scale: float | None = None
    softcap: float | None = None
    is_causal: bool = False
    window: int | None = None
    bias: str | None = None
    mask: str | None = None
    alibi: bool = False
    sinks: bool = False
    gain: float = 1.0

    @property
    def by_formula(self):
        """Whether torch's own function lacks what the case needs."""
        return self.softcap is not None or self.window is not None or self.sinks

    def score_shape(self, axes="bhqk"):
        sizes = {"b": self.batch, "h": self.heads, "q": self.q_len, "k": self.kv_len}
        return [size if axis in axes else 1 for axis, size in sizes.items()]

    def metadata(self):
        kept = ("name", "scale", "softcap", "is_causal", "window")
        source = "formula" if self.by_formula else "torch"
        return {key: getattr(self, key) for key in kept} | {"source": source}


SDPA_CASES = [
    SdpaCase("plain"),
    SdpaCase("odd_sizes", heads=3, kv_heads=3, q_len=5, kv_len=7, head_dim=11, value_dim=11),
    SdpaCase("one_token", q_len=1, kv_len=1),
    SdpaCase("causal", q_len=5, kv_len=5, is_causal=True),
    SdpaCase("scale", scale=0.7),
    SdpaCase("scale_negative", scale=-0.3),
    SdpaCase("mask", q_len=5, kv_len=6, mask="bqk"),
    SdpaCase("mask_key_padding", q_len=4, kv_len=6, mask="bk"),
    SdpaCase("bias_full", q_len=4, kv_len=5, bias="bhqk"),
    SdpaCase("bias_per_head", q_len=4, kv_len=5, bias="hqk"),
    SdpaCase("bias_per_key", q_len=4, kv_len=5, bias="bk"),
    SdpaCase("gqa", heads=6, kv_heads=2, q_len=3, kv_len=5, head_dim=4, value_dim=4),
    SdpaCase("mqa", heads=4, kv_heads=1, q_len=3, kv_len=5, head_dim=4, value_dim=4),
    SdpaCase("value_dim", head_dim=6, value_dim=3),
    SdpaCase("q_shorter", q_len=3, kv_len=6),
    SdpaCase("q_longer", q_len=6, kv_len=3),
    SdpaCase("causal_q_shorter", q_len=3, kv_len=6, is_causal=True),
    SdpaCase("causal_one_query", q_len=1, kv_len=6, is_causal=True),
    SdpaCase(
        "alibi", heads=4, kv_heads=4, q_len=3, kv_len=5, head_dim=4, value_dim=4, alibi=True
    ),
    SdpaCase("large_scores", gain=8.0),
    SdpaCase("softcap", softcap=1.5),
    SdpaCase("sinks", q_len=4, kv_len=5, sinks=True),
    SdpaCase(
        "sliding_window", q_len=7, kv_len=7, head_dim=4, value_dim=4, is_causal=True, window=3
    ),
    SdpaCase(
        "sliding_window_q_shorter", q_len=4, kv_len=7, head_dim=4, value_dim=4, is_causal=True,
        window=3,
    ),
    SdpaCase(
        "everything", heads=4, q_len=4, kv_len=6, value_dim=5, scale=0.5, softcap=2.0,
        is_causal=True, bias="bhqk", sinks=True,
    ),
]  # fmt: skip


def sdpa_inputs(case, draw):
    kv_shape = case.batch, case.kv_heads, case.kv_len
    std = case.gain
    inputs = {
        "query": draw.normal(case.batch, case.heads, case.q_len, case.head_dim, std=std),
        "key": draw.normal(*kv_shape, case.head_dim, std=std),
        "value": draw.normal(*kv_shape, case.value_dim),
    }
    if case.bias is not None:
        inputs["attn_bias"] = draw.normal(*case.score_shape(case.bias))
    if case.mask == "bk":
        lengths = [case.kv_len - 2 * row for row in range(case.batch)]
        inputs["attn_mask"] = keep_first(lengths, case.kv_len)[:, None, None]
    elif case.mask is not None:
        inputs["attn_mask"] = draw.mask(*case.score_shape(case.mask))
    if case.sinks:
        inputs["sinks"] = draw.normal(case.heads)
    return inputs


def distances(case):
    """(q_len, kv_len): how far key j lies before query i, last query on last key."""
    queries = torch.arange(case.q_len) + case.kv_len - case.q_len
    return queries[:, None] - torch.arange(case.kv_len)


def alibi_slopes(heads):
    return torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)


def alibi_bias(case, dtype):
    slopes = alibi_slopes(case.heads).to(dtype)
    return -slopes[:, None, None] * distances(case).abs()


def sdpa_torch(case, inputs):
    """The context by torch's own function."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    square = case.q_len == case.kv_len
    mask = inputs.get("attn_bias", inputs.get("attn_mask"))
    if case.alibi:
        mask = alibi_bias(case, query.dtype)
    elif case.is_causal and not square:
        mask = causal_lower_right(case.q_len, case.kv_len)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value,
            attn_mask=mask,
            is_causal=case.is_causal and square,
            scale=case.scale,
            enable_gqa=case.kv_heads != case.heads,
        )  # fmt: skip


def sdpa_formula(case, inputs):
    """Context, weights and logsumexp: scale, softcap, bias, mask, softmax."""
    group = case.heads // case.kv_heads
    key = inputs["key"].repeat_interleave(group, dim=1)
    value = inputs["value"].repeat_interleave(group, dim=1)
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    scores = inputs["query"] @ key.transpose(-2, -1) * scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if "attn_bias" in inputs:
        scores = scores + inputs["attn_bias"]
    if case.alibi:
        scores = scores + alibi_bias(case, scores.dtype)
    if "attn_mask" in inputs:
        scores = scores.masked_fill(~inputs["attn_mask"], -math.inf)
    if case.is_causal:
        scores = scores.masked_fill(distances(case) < 0, -math.inf)
    if case.window is not None:
        scores = scores.masked_fill(distances(case) >= case.window, -math.inf)
    if "sinks" in inputs:
        sink = inputs["sinks"][:, None, None].expand(case.score_shape("bhq"))
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : case.kv_len]
    return weights @ value, weights, scores.logsumexp(-1)


def sdpa_tensors(case, dtype):
    draw = Draw("sdpa", case.name)
    inputs = leaves(sdpa_inputs(case, draw), dtype)
    context, weights, logsumexp = sdpa_formula(case, inputs)
    if not case.by_formula:
        by_torch = sdpa_torch(case, inputs)
        torch.testing.assert_close(context, by_torch, rtol=1e-4, atol=1e-5)
        context = by_torch
    cotangent = draw.normal(*context.shape).to(dtype)
    floats = {name: t for name, t in inputs.items() if t.is_floating_point()}
    outputs = {
        "context": context,
        "weights": weights,
        "logsumexp": logsumexp,
        "grad_context": cotangent,
        **gradients(context, cotangent, floats),
    }
    if case.alibi:
        outputs["alibi_slopes"] = alibi_slopes(case.heads).to(dtype)
    return inputs | outputs


# --- multi-head attention -----------------------------------------------------


@dataclass(frozen=True)
class MultiHeadCase:
    """One nn.MultiheadAttention case; self-attention where `kv_len` is None.

    Values have a memory of their own where `value_dim` is given, the `vdim` of PyTorch.
    """

    name: str
    embed_dim: int = 8
    num_heads: int = 2
    bias: bool = True
    is_causal: bool = False
    kv_dim: int | None = None
    value_dim: int | None = None
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    q_len: int = 5
    kv_len: int | None = None
    batch: int | None = 2
    mask: str | tuple[str, ...] | None = None

    def metadata(self):
        kept = ("name", "embed_dim", "num_heads", "bias", "is_causal", "kv_dim", "value_dim")
        kept += ("add_bias_kv", "add_zero_attn")
        shape = {"cross": self.kv_len is not None, "batched": self.batch is not None}
        return {key: getattr(self, key) for key in kept} | shape


def small(name, **options):
    return MultiHeadCase(name, **({"embed_dim": 4, "q_len": 3} | options))


MULTI_HEAD_CASES = [
    MultiHeadCase("bias"),
    MultiHeadCase("no_bias", bias=False),
    MultiHeadCase("causal", is_causal=True),
    MultiHeadCase("key_padding", mask="key_padding_mask"),
    MultiHeadCase("blocked", mask="blocked_mask"),
    MultiHeadCase("attn_bias", num_heads=4, mask="attn_bias"),
    MultiHeadCase("unbatched", batch=None),
    MultiHeadCase("cross", q_len=4, kv_len=6),
    MultiHeadCase("cross_kv_dim", q_len=4, kv_len=6, kv_dim=6),
    small("bias_kv", add_bias_kv=True),
    small("bias_kv_no_bias", add_bias_kv=True, bias=False),
    small("bias_kv_causal", add_bias_kv=True, is_causal=True),
    small("bias_kv_unbatched", add_bias_kv=True, batch=None, mask="key_padding_mask"),
    small("zero_attn", add_zero_attn=True),
    small("zero_attn_all_padding", add_zero_attn=True, mask="all_padding"),
    small("bias_kv_zero_attn", add_bias_kv=True, add_zero_attn=True, mask="all_padding"),
    small("bias_kv_attn_bias", add_bias_kv=True, mask="attn_bias"),
    small("attn_bias_3d", mask="attn_bias_3d"),
    small("attn_bias_3d_unbatched", batch=None, mask="attn_bias_3d"),
    small("blocked_3d", mask="blocked_mask_3d"),
    small("float_padding", mask="float_padding"),
    small("two_masks", add_zero_attn=True, mask=("key_padding_mask", "blocked_mask_3d")),
    small("two_float_masks", add_bias_kv=True, mask=("float_padding", "attn_bias_3d")),
    small("key_value", kv_len=4, kv_dim=6, value_dim=3),
    small("key_value_no_bias", kv_len=4, kv_dim=6, value_dim=3, bias=False),
    small("key_value_unbatched", kv_len=4, kv_dim=5, value_dim=4, batch=None),
    small(
        "key_value_everything", kv_len=4, kv_dim=6, value_dim=3, add_bias_kv=True,
        add_zero_attn=True, mask=("key_padding_mask", "attn_bias_3d"),
    ),
]  # fmt: skip


def multi_head_inputs(case, draw):
    """The differentiated inputs, and the stored mask where there is one."""
    batch = () if case.batch is None else (case.batch,)
    inputs = {"query": draw.normal(*batch, case.q_len, case.embed_dim)}
    if case.kv_len is not None:
        kv_dim = case.kv_dim or case.embed_dim
        inputs["memory"] = draw.normal(*batch, case.kv_len, kv_dim)
        if case.value_dim is not None:
            inputs["value"] = draw.normal(*batch, case.kv_len, case.value_dim)
    kinds = (case.mask,) if isinstance(case.mask, str) else case.mask or ()
    masks = {}
    for kind in kinds:
        masks |= multi_head_mask(case, kind, draw)
    return inputs, masks


def multi_head_mask(case, kind, draw):
    """A mask as nn.MultiheadAttention takes it, under the name of what it is."""
    batch, kv_len = case.batch or 1, case.kv_len or case.q_len
    rows = (batch * case.num_heads, case.q_len, kv_len)
    if kind in ("key_padding_mask", "all_padding"):
        step = kv_len if kind == "all_padding" else 2
        padding = ~keep_first([kv_len - step * row for row in range(batch)], kv_len)
        return {"key_padding_mask": padding[0] if case.batch is None else padding}
    if kind == "float_padding":
        return {"float_padding": draw.normal(batch, kv_len)}
    if kind == "blocked_mask":
        return {"blocked_mask": ~draw.mask(case.q_len, kv_len)}
    if kind == "blocked_mask_3d":
        return {"blocked_mask": ~draw.mask(*rows)}
    if kind == "attn_bias_3d":
        return {"attn_bias": draw.normal(*rows)}
    return {"attn_bias": draw.normal(case.q_len, kv_len)}


def multi_head_module(case, draw, dtype):
    """A module whose parameters, biases too, are drawn and far from zero."""
    module = torch.nn.MultiheadAttention(
        case.embed_dim, case.num_heads, dropout=0.0, bias=case.bias,
        add_bias_kv=case.add_bias_kv, add_zero_attn=case.add_zero_attn, kdim=case.kv_dim,
        vdim=case.value_dim or case.kv_dim, batch_first=True, dtype=dtype,
    )  # fmt: skip
    state = {}
    for name, parameter in module.state_dict().items():
        std = parameter.shape[-1] ** -0.5 if name.endswith("weight") else 0.5
        state[name] = draw.normal(*parameter.shape, std=std)
    module.load_state_dict(state)
    return module


def multi_head_forward(case, module, inputs, masks):
    """The output, the weights of each head, and their mean over the heads."""
    query = inputs["query"]
    memory = inputs.get("memory", query)
    value = inputs.get("value", memory)
    attn_mask = masks.get("blocked_mask", masks.get("attn_bias"))
    if case.is_causal:
        attn_mask = torch.ones(case.q_len, case.q_len, dtype=torch.bool).triu(1)
    options = {
        "key_padding_mask": masks.get("key_padding_mask", masks.get("float_padding")),
        "attn_mask": attn_mask,
        "is_causal": case.is_causal,
    }
    output, weights = module(query, memory, value, average_attn_weights=False, **options)
    _, weights_mean = module(query, memory, value, **options)
    return output, weights, weights_mean


def multi_head_tensors(case, dtype):
    draw = Draw("multi_head", case.name)
    inputs, masks = multi_head_inputs(case, draw)
    inputs = leaves(inputs, dtype)
    masks = {n: t.to(dtype) if t.is_floating_point() else t for n, t in masks.items()}
    module = multi_head_module(case, draw, dtype)
    output, weights, weights_mean = multi_head_forward(case, module, inputs, masks)
    cotangent = draw.normal(*output.shape).to(dtype)
    state = {f"state.{name}": tensor for name, tensor in module.named_parameters()}
    return {
        **inputs,
        **masks,
        **state,
        "output": output,
        "weights": weights,
        "weights_mean": weights_mean,
        "grad_output": cotangent,
        **gradients(output, cotangent, inputs | state),
    }


# --- rotary embedding and query-key norm --------------------------------------


@dataclass(frozen=True)
class RotaryCase:
    """One rotary embedding of the first `rotary_dim` of HEAD_DIM features."""

    name: str
    pairing: str
    base: float = 10000.0
    rotary_dim: int = 8
    offset: int = 0

    def metadata(self):
        return {"kind": "rotary"} | asdict(self)


@dataclass(frozen=True)
class RmsNormCase:
    """One RMS norm over the features of each head."""

    name: str
    eps: float = 1e-6

    def metadata(self):
        return {"kind": "rms_norm"} | asdict(self)


HEAD_DIM = 8
PART_SHAPE = (2, 2, 5, HEAD_DIM)
PAIRINGS = ("half_split", "interleaved")
LAYER_PART_CASES = [
    *(RotaryCase(f"{pairing}_full", pairing) for pairing in PAIRINGS),
    *(RotaryCase(f"{pairing}_partial", pairing, rotary_dim=4) for pairing in PAIRINGS),
    *(RotaryCase(f"{pairing}_offset", pairing, offset=5) for pairing in PAIRINGS),
    *(RotaryCase(f"{pairing}_base_500000", pairing, base=500000.0) for pairing in PAIRINGS),
    RmsNormCase("rms_norm"),
]


def rotary(case, x):
    """Turns pair i of position p by (p + offset) * base^(-2i / rotary_dim)."""
    exponents = torch.arange(0, case.rotary_dim, 2, dtype=torch.float64) / case.rotary_dim
    positions = torch.arange(x.shape[-2], dtype=torch.float64) + case.offset
    angles = positions[:, None] * case.base**-exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned, passed = x[..., : case.rotary_dim], x[..., case.rotary_dim :]
    if case.pairing == "half_split":
        first, second = turned.chunk(2, dim=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
    pair = first * cos - second * sin, second * cos + first * sin
    if case.pairing == "half_split":
        return torch.cat([*pair, passed], dim=-1)
    return torch.cat([torch.stack(pair, dim=-1).flatten(-2), passed], dim=-1)


def layer_part_tensors(case, dtype):
    draw = Draw("layer_parts", case.name)
    inputs = {"x": draw.normal(*PART_SHAPE)}
    if isinstance(case, RmsNormCase):
        inputs["weight"] = draw.normal(HEAD_DIM, mean=1.0, std=0.3)
    inputs = leaves(inputs, dtype)
    if isinstance(case, RmsNormCase):
        out = F.rms_norm(inputs["x"], (HEAD_DIM,), inputs["weight"], case.eps)
    else:
        out = rotary(case, inputs["x"])
    cotangent = draw.normal(*out.shape).to(dtype)
    return {**inputs, "out": out, "grad_out": cotangent, **gradients(out, cotangent, inputs)}


# --- files --------------------------------------------------------------------


def stored(tensor):
    """The tensor as it goes to disk: detached, contiguous, booleans as bytes."""
    tensor = tensor.detach().contiguous()
    return tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor


def sorted_header(data):
    """The same safetensors bytes with the keys of the JSON header in order."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":"))
    header += " " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header.encode() + data[start:]


def write(file, cases, make_tensors):
    tensors = {
        f"{case.name}.{label}.{name}": stored(tensor)
        for case in cases
        for label, dtype in DTYPES.items()
        for name, tensor in make_tensors(case, dtype).items()
    }
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), f"{file}: {name} is not finite"
    metadata = {
        "cases": json.dumps([case.metadata() for case in cases]),
        "torch": torch.__version__.split("+")[0],
        "seed": str(SEED),
    }
    data = sorted_header(safetensors.torch.save(tensors, metadata))
    (FOLDER / f"{file}.safetensors").write_bytes(data)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    write("sdpa", SDPA_CASES, sdpa_tensors)
    write("multi_head", MULTI_HEAD_CASES, multi_head_tensors)
    write("layer_parts", LAYER_PART_CASES, layer_part_tensors)


if __name__ == "__main__":
    main()
