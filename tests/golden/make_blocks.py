"""Write tests/golden/transformers/blocks/: whole transformer blocks of Hugging Face transformers, with gradients.

    pip install -r tests/golden/requirements.txt && python tests/golden/make_blocks.py

One safetensors file for each kind of model, all of them small, with random parameters and eager attention. A file holds

    <name>                           the parameters of the blocks, under the names they have in the model
    golden.<block>.input             what came into the block in a forward pass of the whole model
    golden.<block>.output            what the block gave for it
    golden.<block>.cotangent         the gradient of the output
    golden.<block>.grad_input        the gradient of the input
    golden.<block>.grad.<parameter>  the gradient of each parameter
    golden.attention_mask            1 where a token is no padding, (batch, len), for the kinds that are no decoders

and in its metadata the model's `config` as JSON, and `layers`, the names of the blocks. Everything is computed and stored in
float64.
"""

import contextlib
import json
import sys
from unittest import mock

import safetensors.torch
import torch
import transformers as hf
from make_golden import FOLDER, SEED, Draw, gradients, keep_first, sorted_header, stored
from make_transformers import BATCH, SMALL, VOCABULARY, Kind, build, of_two, rope

LENGTH, REAL = 7, [7, 5]

# So narrow that the files stay small.
NARROW = SMALL | {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
GROUPED = NARROW | {"num_key_value_heads": 2}

KINDS = [
    Kind("bert", hf.BertModel, lambda: hf.BertConfig(**NARROW), ("encoder.layer.0",), feed="padded"),
    Kind("gpt2", hf.GPT2Model, lambda: hf.GPT2Config(**NARROW, n_inner=20), ("h.0",), feed="whole"),
    Kind(
        "llama", hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GROUPED, rms_norm_eps=1e-3, rope_parameters=rope(500.0)),
        ("model.layers.0",), feed="whole",
    ),
    Kind(
        "qwen3", hf.Qwen3ForCausalLM,
        lambda: hf.Qwen3Config(**GROUPED, head_dim=6, rms_norm_eps=1e-3, rope_parameters=rope(1e6)),
        ("model.layers.0",), feed="whole",
    ),
    Kind(
        "gemma2", hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(
            **GROUPED | {"num_hidden_layers": 2}, head_dim=6, query_pre_attn_scalar=7, attn_logit_softcapping=2.0,
            sliding_window=3, layer_types=["sliding_attention", "full_attention"], rms_norm_eps=1e-3,
            rope_parameters=rope(10000.0),
        ),
        of_two("model.layers.{}"), feed="whole",
    ),
    Kind(
        "phi3", hf.Phi3Model,
        lambda: hf.Phi3Config(
            **GROUPED, rms_norm_eps=1e-3, rope_parameters=rope(300.0, partial_rotary_factor=0.5),
        ),
        ("layers.0",), feed="whole",
    ),
]  # fmt: skip


@contextlib.contextmanager
def float64_for_float32():
    """Softmax, RMS norms and rotary angles in float64, which transformers computes in float32 whatever the dtype. Their code
    names the dtype, and means another one here."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def watch(model, names):
    """A dict that a forward pass fills with the arguments of the blocks of these names."""
    seen = {}

    def hook(name):
        def note(_module, args, kwargs):
            seen[name] = (args, kwargs)

        return note

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
    return seen


def block_tensors(block, args, kwargs, draw):
    """The input of a block, its output, and gradients."""
    args = list(args)
    x = args.pop(0) if args else kwargs["hidden_states"]
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    x = x.detach().requires_grad_()
    output = block(x, *args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    assert output.dtype == torch.float64
    cotangent = draw.normal(*output.shape)
    parameters = dict(block.named_parameters())
    of = gradients(output, cotangent, {"input": x} | {f".{name}": p for name, p in parameters.items()})
    grads = {name.replace("grad_.", "grad."): grad for name, grad in of.items()}
    return {"input": x, "output": output, "cotangent": cotangent} | grads


def write(kind):
    draw = Draw("blocks", kind.name)
    model = build(kind, draw)
    tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=draw.generator)
    inputs, mask = {"input_ids": tokens}, {}
    if kind.feed == "padded":
        inputs["attention_mask"] = keep_first(REAL, LENGTH).long()
        mask = {"golden.attention_mask": inputs["attention_mask"]}
    seen = watch(model, kind.layers)
    model(**inputs, use_cache=False)
    tensors = mask | {n: p for n, p in model.named_parameters() if n.startswith(tuple(f"{x}." for x in kind.layers))}
    for name in kind.layers:
        args, kwargs = seen[name]
        parts = block_tensors(model.get_submodule(name), args, kwargs, draw)
        tensors |= {f"golden.{name}.{part}": tensor for part, tensor in parts.items()}
    tensors = {name: stored(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), f"{kind.name}: {name} is not finite"
    metadata = {
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "layers": json.dumps(kind.layers),
        "torch": torch.__version__.split("+")[0],
        "transformers": hf.__version__,
        "seed": str(SEED),
    }
    data = sorted_header(safetensors.torch.save(tensors, metadata))
    (FOLDER / "transformers" / "blocks" / f"{kind.name}.safetensors").write_bytes(data)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    (FOLDER / "transformers" / "blocks").mkdir(exist_ok=True)
    chosen = sys.argv[1:]
    for kind in KINDS:
        if not chosen or kind.name in chosen:
            with float64_for_float32():
                write(kind)


if __name__ == "__main__":
    main()
