"""Write tests/golden/peft/: LoRA adapters as PEFT saves them, and what small models do with them.

    pip install -r tests/golden/requirements-peft.txt && python tests/golden/make_peft.py

The numbers come from peft 0.21.2, transformers 5.23.0 and torch 2.15.0. One folder for each kind holds

    config.json, model.safetensors   the base model as transformers saves it: two layers, random parameters, float32
    adapter/adapter_config.json      as PeftModel.save_pretrained writes it, but for lists that were sets: they are sorted
    adapter/adapter_model.safetensors  as PeftModel.save_pretrained writes it, with random A and B
    cases.safetensors                what follows

Both layers are called one after the other, the second on what the first gave, with eager attention, without padding and,
for decoders, causally:

    input                            hidden states for layer 0, (batch, len, dim)
    active.0, active.1               the outputs of the layers with the adapter
    disabled.0, disabled.1           without it
    merged.0, merged.1               after merge_and_unload
    target                           what the training is to make of the input
    train.<dtype>.losses             the mean squared error before each step of AdamW on A and B
    train.<dtype>.grad.<name>        the gradients of the first step, under the names in adapter_model.safetensors
    train.<dtype>.end.<name>         A and B after the last step

The outputs are computed and stored in float64, the training in float32 (f32) and in float64 (f64). The metadata holds
`layers`, the names of the two layers in the base model, and `train`, the options of AdamW.
"""

import contextlib
import json
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import safetensors.torch
import torch
import transformers as hf
from make_blocks import float64_for_float32, watch
from make_golden import FOLDER, SEED, Draw, sorted_header
from make_transformers import rope
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open

OUT = FOLDER / "peft"
BATCH, LENGTH, VOCABULARY = 2, 5, 12
TRAIN = {"steps": 50, "lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
PRECISIONS = {"f32": torch.float32, "f64": torch.float64}


@dataclass(frozen=True)
class Kind:
    """A base model and an adapter for it."""

    name: str
    model: type
    config: Callable
    layers: str
    lora: dict


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
UNTIED = SMALL | {"tie_word_embeddings": False}
GROUPED = UNTIED | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
NO_DROPOUT_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**others):
    return hf.BertConfig(**SMALL, **NO_DROPOUT_BERT, **others)


def gpt2():
    return hf.GPT2Config(**SMALL, n_inner=20, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def llama():
    return hf.LlamaConfig(**GROUPED, rope_parameters=rope(500.0))


def qwen3():
    return hf.Qwen3Config(**GROUPED, head_dim=6, rope_parameters=rope(1e4))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = ATTENTION + ["gate_proj", "up_proj", "down_proj"]

KINDS = [
    Kind(
        "bert", hf.BertModel, bert, "encoder.layer",
        {
            # "output.dense" alone would be the end of "attention.output.dense", too.
            "task_type": TaskType.FEATURE_EXTRACTION, "r": 4, "lora_alpha": 8,
            "target_modules": ["query", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        },
    ),
    Kind(
        # A regular expression that must match a module's whole name. No task, so there is an `auto_mapping`.
        "bert_regex", hf.BertModel, bert, "encoder.layer",
        {
            "r": 3, "lora_alpha": 4, "use_rslora": True,
            "target_modules": r"encoder\.layer\.\d+\.(attention\.self\.(query|key)|output\.dense)",
        },
    ),
    Kind(
        # The prefix of a model for a task, and a whole module saved beside A and B: PEFT adds "classifier" by itself.
        "bert_classifier", hf.BertForSequenceClassification, lambda: bert(num_labels=3), "bert.encoder.layer",
        {"task_type": TaskType.SEQ_CLS, "r": 2, "lora_alpha": 2, "target_modules": ["query", "value"]},
    ),
    Kind(
        # Conv1D: weights of (in, out), and one matrix for q, k and v. "c_proj" is in attention and in the MLP.
        "gpt2", hf.GPT2LMHeadModel, gpt2, "transformer.h",
        {
            "task_type": TaskType.CAUSAL_LM, "r": 2, "lora_alpha": 5, "fan_in_fan_out": True,
            "target_modules": ["c_attn", "c_proj", "c_fc"],
        },
    ),
    Kind(
        "llama", hf.LlamaForCausalLM, llama, "model.layers",
        {"task_type": TaskType.CAUSAL_LM, "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": LINEAR},
    ),
    Kind(
        # The prefix of a model without a head. PEFT writes the names of the modules that "all-linear" stood for.
        "llama_all_linear", hf.LlamaModel, llama, "layers",
        {"task_type": TaskType.FEATURE_EXTRACTION, "r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    ),
    Kind(
        "qwen3", hf.Qwen3ForCausalLM, qwen3, "model.layers",
        {
            "task_type": TaskType.CAUSAL_LM, "r": 2, "lora_alpha": 4, "target_modules": LINEAR,
            # The first key that matches serves: in layer 0, q_proj has rank 5, not 3.
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "q_proj": 3, r"mlp\.(gate|up)_proj": 1},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 7, "down_proj": 3},
        },
    ),
    Kind(
        "qwen3_one_layer", hf.Qwen3ForCausalLM, qwen3, "model.layers",
        {
            "task_type": TaskType.CAUSAL_LM, "r": 2, "lora_alpha": 4, "target_modules": ATTENTION,
            "exclude_modules": ["k_proj"], "layers_to_transform": [0], "layers_pattern": "layers",
        },
    ),
]  # fmt: skip


@contextlib.contextmanager
def no_warnings():
    """PEFT only warns of missing tensors and of settings that don't fit the model."""
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        yield


def adapter_parameters(model):
    """A and B of a PEFT model, under the names that they have in a file."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def write_base(kind, draw):
    """Every parameter is drawn: vectors around what they start at, matrices so that they about keep the variance."""
    torch.manual_seed(SEED)
    model = kind.model(kind.config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(parameter.round() + draw.normal(*parameter.shape, std=0.2))
            else:
                parameter.copy_(draw.normal(*parameter.shape, std=1.2 * min(parameter.shape) ** -0.5))
    model.save_pretrained(OUT / kind.name)
    (OUT / kind.name / "generation_config.json").unlink(missing_ok=True)


def load_base(kind, dtype):
    """The base model from its files. In float64, the rotary angles are, too."""
    model = kind.model.from_pretrained(OUT / kind.name, dtype=torch.float32, attn_implementation="eager").eval()
    if dtype == torch.float64:
        with float64_for_float32():
            wide = kind.model(model.config).double().eval()
        wide.load_state_dict(model.state_dict())
        model = wide
    return model


def write_adapter(kind, draw):
    model = load_base(kind, torch.float32)
    model.name_or_path = f"tiny-{kind.name}"
    with no_warnings():
        model = get_peft_model(model, LoraConfig(**kind.lora))
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            std = parameter.shape[1] ** -0.5
            if ".lora_B." in name:
                std *= 0.5 / model.get_submodule(name.split(".lora_B.")[0]).scaling["default"]
            parameter.copy_(draw.normal(*parameter.shape, std=std))
    folder = OUT / kind.name / "adapter"
    with no_warnings():
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    # PEFT keeps these as sets, whose order changes from run to run.
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config[name], list):
            config[name].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True))


def load_adapter(kind, dtype, **options):
    with no_warnings():
        return PeftModel.from_pretrained(load_base(kind, dtype), OUT / kind.name / "adapter", **options)


def layer_names(kind):
    return [f"{kind.layers}.{i}" for i in range(2)]


def layers_of(kind, model):
    """The two layers as functions of hidden states. `model` is the base model, with an adapter or without, and the mask and the
    rotary angles that it hands to its layers belong to the functions."""
    seen = watch(model, layer_names(kind))
    with torch.no_grad():
        model(input_ids=torch.ones(BATCH, LENGTH, dtype=torch.long), use_cache=False)

    def function(name, args, kwargs):
        args = args[1:] if args else args
        kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        def run(x):
            output = model.get_submodule(name)(x, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        return run

    return [function(name, *seen[name]) for name in layer_names(kind)]


def run_layers(layers, x):
    """The outputs of the layers, each on that of the one before."""
    outputs = []
    for layer in layers:
        x = layer(x)
        outputs.append(x)
    return outputs


def output_tensors(kind, x):
    model = load_adapter(kind, torch.float64)
    ways = {}
    with float64_for_float32(), torch.no_grad():
        ways["active"] = run_layers(layers_of(kind, model.get_base_model()), x)
        with model.disable_adapter():
            ways["disabled"] = run_layers(layers_of(kind, model.get_base_model()), x)
        ways["merged"] = run_layers(layers_of(kind, model.merge_and_unload()), x)
    for active, disabled, merged in zip(*ways.values()):
        assert (active - merged).abs().max() < 1e-12, f"{kind.name}: merging changes the output"
        assert (active - disabled).abs().max() > 0.1, f"{kind.name}: the adapter does little"
    return {f"{way}.{i}": output for way, outputs in ways.items() for i, output in enumerate(outputs)}


def train(kind, model, x, target):
    layers = layers_of(kind, model.get_base_model())
    parameters = adapter_parameters(model)
    assert all(parameter.requires_grad for parameter in parameters.values())
    options = {name: value for name, value in TRAIN.items() if name != "steps"}
    optimizer = torch.optim.AdamW(parameters.values(), **options)
    losses, tensors = [], {}
    for step in range(TRAIN["steps"]):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(run_layers(layers, x)[-1], target)
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            tensors |= {f"grad.{name}": parameter.grad.clone() for name, parameter in parameters.items()}
        optimizer.step()
    tensors |= {f"end.{name}": parameter.detach() for name, parameter in parameters.items()}
    return {"losses": torch.stack(losses)} | tensors


def training_tensors(kind, x, target):
    runs = {}
    for label, dtype in PRECISIONS.items():
        model = load_adapter(kind, dtype, is_trainable=True).eval()
        with float64_for_float32() if label == "f64" else contextlib.nullcontext():
            runs[label] = train(kind, model, x.to(dtype), target.to(dtype))
    losses, apart = runs["f64"]["losses"], {}
    for part in ("losses", "grad", "end"):
        apart[part] = max(
            (runs["f32"][name] - runs["f64"][name]).abs().max().item() for name in runs["f64"] if name.startswith(part)
        )
    apart = ", ".join(f"{part} {difference:.1e}" for part, difference in apart.items())
    print(f"{kind.name}: loss {losses[0]:.3f} to {losses[-1]:.3f}; f32 from f64: {apart}")
    assert losses[-1] < 0.8 * losses[0], f"{kind.name}: the training learns little"
    return {f"train.{label}.{name}": tensor for label, tensors in runs.items() for name, tensor in tensors.items()}


def write(kind):
    draw = Draw("peft", kind.name)
    write_base(kind, draw)
    write_adapter(kind, draw)
    shape = BATCH, LENGTH, SMALL["hidden_size"]
    x, target = draw.normal(*shape), draw.normal(*shape)
    tensors = {"input": x, "target": target} | output_tensors(kind, x) | training_tensors(kind, x, target)
    with safe_open(OUT / kind.name / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = {name for name in file.keys() if ".lora_" in name}
    assert names == {name.removeprefix("train.f32.end.") for name in tensors if name.startswith("train.f32.end.")}
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), f"{kind.name}: {name} is not finite"
    metadata = {
        "layers": json.dumps(layer_names(kind)),
        "train": json.dumps(TRAIN),
        "torch": torch.__version__.split("+")[0],
        "transformers": hf.__version__,
        "peft": peft.__version__,
        "seed": str(SEED),
    }
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    (OUT / kind.name / "cases.safetensors").write_bytes(sorted_header(data))


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    hf.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    chosen = sys.argv[1:]
    for kind in KINDS:
        if not chosen or kind.name in chosen:
            write(kind)


if __name__ == "__main__":
    main()
