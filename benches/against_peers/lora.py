"""Fine-tuning: a block whose weights are constants, with LoRA on every linear layer, against PEFT; and one on quantised weights."""

from dataclasses import dataclass, replace

import torch

from attention import LAYERS
from blocks import Blocks
from case import DTYPES, error
from memory import Memory, peak
from peers import Torch, rotate

# Our linear layers, and those of a BertLayer.
LINEAR = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


@dataclass(frozen=True)
class Lora(Blocks):
    """Forward and backward for the matrices of the adapter."""

    rank: int = 8
    # Of the weights, if they are quantised.
    format: str | None = None
    dtype: str = "f32"

    group = "lora"

    @property
    def name(self):
        return "LoRA block" + (f" on {self.format}" if self.format else "")

    def missing(self):
        try:
            import peft  # noqa: F401
        except ImportError:
            return "LoRA isn't timed: peft isn't installed"

    def flops(self):
        # No gradient of a weight is computed: a third of the products of a training step.
        return super().flops() - self.count * 24 * self.batch * self.length * self.width**2

    def matrices(self):
        shapes = {name: shape for name, shape in self.parameters("blocks.0").items() if len(shape) == 2}
        for name, (outputs, inputs) in shapes.items():
            yield f"{name}.lora_A.weight", (self.rank, inputs)
            yield f"{name}.lora_B.weight", (outputs, self.rank)

    def inputs(self):
        inputs = super().inputs()
        generator = torch.Generator().manual_seed(2)
        for i in range(self.count):
            for name, shape in self.matrices():
                inputs[name.replace("blocks.0", f"blocks.{i}")] = torch.randn(*shape, generator=generator) / shape[1] ** 0.5
        return {name: x.to(DTYPES[self.dtype]) for name, x in inputs.items()}

    def description(self):
        return super().description() | {"lora": self.rank, "format": self.format}

    def peers(self, inputs, arguments):
        return {} if self.format else {"torch": self.on_peft(inputs)}

    def expected(self, answers, inputs):
        if self.dtype == "f32" or self.format:
            return super().expected(answers, inputs)
        return replace(self, dtype="f32").on_peft({name: x.float() for name, x in inputs.items()}).answer()

    def allowed(self, key, answers, expected):
        # At (8, 128, 384, 12) in bf16, PyTorch's gradients of the queries' and the keys' lora_B are 0.15 and 0.10 from those of f32.
        allowed = super().allowed(key, answers, expected)
        return max(allowed, error(answers["torch"][key], expected[key])) if "torch" in answers else allowed

    def on_peft(self, inputs):
        """A BertLayer with PEFT's modules."""
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertLayer

        sizes = {"hidden_size": self.width, "intermediate_size": 4 * self.width, "num_attention_heads": self.heads}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(**sizes, **dropout, layer_norm_eps=1e-5, attn_implementation="sdpa")
        layer = BertLayer(config).to(DTYPES[self.dtype])
        state = {}
        for ours, theirs in (LINEAR | NORMS).items():
            state |= {f"{theirs}.{kind}": inputs[f"blocks.0.{ours}.{kind}"] for kind in ("weight", "bias")}
        layer.load_state_dict(state)
        lora = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=list(LINEAR.values()))
        layer = inject_adapter_in_model(lora, layer).train()
        trained = {}
        for ours, theirs in LINEAR.items():
            module = layer.get_submodule(theirs)
            for matrix in ("lora_A", "lora_B"):
                parameter = getattr(module, matrix)["default"].weight
                name = f"blocks.0.{ours}.{matrix}.weight"
                parameter.data.copy_(inputs[name])
                trained[name] = parameter
        output = lambda: first(layer(inputs["x"]))
        return Torch(output, trained, inputs["grad_output"])


def first(output):
    return output[0] if isinstance(output, tuple) else output


class OfQuantised(Memory):
    """A training step on weights in blocks, over one on f32: its time for one block, and its memory for twelve."""

    backward = True

    def __init__(self, format):
        self.format, self.name = format, f"LoRA on {format}"
        self.case = Lora(*LAYERS[1], False, True)
        self.deep = Lora(1, 64, 768, 12, False, True, count=12)

    def words(self):
        return super().words() | {"lora"}

    def measure(self, bench, path):
        from safetensors.torch import save_file

        cases = {"ours": replace(self.case, format=self.format), "f32": self.case}
        jobs = {name: bench.ours.load(path, case.description()) for name, case in cases.items()}
        times = rotate({name: bench.ours.timer(job, "ours") for name, job in jobs.items()}, bench.rounds, bench.pause)
        for job in jobs.values():
            bench.ours.ask(do="forget", id=job)
        save_file(self.deep.inputs(), path)
        deep = {"ours": replace(self.deep, format=self.format), "f32": self.deep}
        peaks = {name: peak(bench, path, case, "ours") for name, case in deep.items()}
        ratios = {"memory_ratio": peaks["ours"] / peaks["f32"], "time_ratio": times["ours"] / times["f32"]}
        return {f"{name}_peak_bytes": bytes for name, bytes in peaks.items()} | ratios | {f"{name}_ms": ms for name, ms in times.items()}


class OfTraining(Memory):
    """A training step of adapters, over one of all parameters less the gradients of the weights and biases. The optimiser's moments are in
    neither."""

    name, backward = "LoRA memory", True

    def __init__(self, *shape, count):
        self.case = Lora(*shape, False, True, count=count)

    def words(self):
        return super().words() | {"lora"}

    def measure(self, bench, path):
        from safetensors.torch import save_file

        every = Blocks(*self.case.shape, False, True, count=self.case.count)
        held = peak(bench, path, self.case, "ours")
        inputs = every.inputs()
        save_file(inputs, path)
        gradients = sum(4 * x.numel() for name, x in inputs.items() if name.startswith("blocks."))
        of_every = peak(bench, path, every, "ours") - gradients
        return {"peak_bytes": held, "every_peak_bytes": of_every, "memory_ratio": held / of_every}


def cases():
    for dtype in ("f32", "bf16"):
        yield from (Lora(*shape, False, True, dtype=dtype) for shape in LAYERS)
    yield OfTraining(1, 64, 768, 12, count=12)
    yield OfTraining(*LAYERS[1], count=2)
    yield from (OfQuantised(format) for format in ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "q4_0", "nf4"))
