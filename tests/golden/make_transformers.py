"""Write tests/golden/transformers/: attention layers, and whole small decoders, of Hugging Face transformers.

    pip install -r tests/golden/requirements.txt && python tests/golden/make_transformers.py

One safetensors file for each kind of model, all of them small, with random parameters and eager attention. A file holds

    <name>                         the model's parameters, under the names they have there
    golden.<module>.input          what came into an attention layer in a forward pass of the whole model
    golden.<module>.memory         the other sequence, in cross-attention
    golden.<module>.output         what came out after its output projection
    golden.<module>.weights        its attention weights
    golden.attention_mask          1 where a token is no padding, (batch, len)
    golden.greedy.prompt, .tokens  what `generate` gave without sampling, for those kinds that decode
    golden.greedy.memory           the encoder's output meanwhile

and in its metadata the model's `config` as JSON, and `layers`, the names of the modules above. Everything is computed in
float64 (but for the softmax and the rotary angles, which transformers has in float32 whatever the dtype) and stored in
float32.
"""

import json
import sys
from dataclasses import dataclass
from itertools import count
from typing import Callable

import safetensors.torch
import torch
import transformers as hf
from make_golden import FOLDER, SEED, Draw, keep_first, sorted_header, stored

BATCH, LENGTH, REAL = 2, 12, [12, 9]
VOCABULARY, PROMPT, NEW_TOKENS = 96, 3, 200
# Of two logits this far apart, rounding to float32 doesn't swap which is the greater.
SURE = 1e-3
# A decoder that goes round in a short circle would hide what its cache forgets.
VARIED = 20


@dataclass(frozen=True)
class Kind:
    """A model, the attention layers to watch, and what to feed it."""

    name: str
    model: type
    config: Callable
    layers: tuple[str, ...]
    feed: str = "padded_tokens"
    # How the names of the parameters begin that a whole decoder needs; None where none is run.
    decoder: tuple[str, ...] | None = None


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ONE_LAYER = SMALL | {"num_hidden_layers": 1}
GROUPED = SMALL | {"num_key_value_heads": 2}
SCALED = GROUPED | {"num_hidden_layers": 1}


def rope(theta, rope_type="default", **others):
    return {"rope_type": rope_type, "rope_theta": theta, **others}


def of_two(pattern):
    return tuple(pattern.format(i) for i in range(2))


KINDS = [
    Kind("bert", hf.BertModel, lambda: hf.BertConfig(**SMALL), of_two("encoder.layer.{}.attention")),
    Kind(
        "gpt2", hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**SMALL, n_inner=48),
        of_two("transformer.h.{}.attn"), decoder=("",),
    ),
    Kind(
        "gptj", hf.GPTJForCausalLM, lambda: hf.GPTJConfig(**ONE_LAYER, n_inner=48, rotary_dim=4),
        ("transformer.h.0.attn",),
    ),
    Kind(
        "gpt_neox", hf.GPTNeoXModel,
        lambda: hf.GPTNeoXConfig(**ONE_LAYER, rope_parameters=rope(300.0, partial_rotary_factor=0.5)),
        ("layers.0.attention",),
    ),
    Kind(
        "bloom", hf.BloomModel,
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=1, n_head=6, pad_token_id=0),
        ("h.0.self_attention",),
    ),
    Kind(
        "falcon", hf.FalconModel,
        # Keys and values of fewer heads, as in Falcon 40B; only when asked for it gives its weights.
        lambda: hf.FalconConfig(
            **ONE_LAYER, num_kv_heads=2, new_decoder_architecture=True, output_attentions=True,
            rope_parameters=rope(300.0),
        ),
        ("h.0.self_attention",),
    ),
    Kind(
        "opt", hf.OPTModel, lambda: hf.OPTConfig(**ONE_LAYER, ffn_dim=48, word_embed_proj_dim=32),
        ("decoder.layers.0.self_attn",),
    ),
    Kind(
        "clip", hf.CLIPVisionModel,
        lambda: hf.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=12,
            patch_size=4,
        ),
        ("encoder.layers.0.self_attn",), feed="image",
    ),
    Kind(
        "llama", hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GROUPED, rope_parameters=rope(500.0)),
        of_two("model.layers.{}.self_attn"), decoder=("",),
    ),
    Kind(
        "qwen2", hf.Qwen2Model, lambda: hf.Qwen2Config(**GROUPED, rope_parameters=rope(1e6)),
        of_two("layers.{}.self_attn"),
    ),
    Kind(
        "qwen3", hf.Qwen3ForCausalLM,
        lambda: hf.Qwen3Config(**GROUPED, head_dim=12, rms_norm_eps=1e-3, rope_parameters=rope(1e6)),
        of_two("model.layers.{}.self_attn"), decoder=("",),
    ),
    Kind(
        "gemma2", hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(
            **GROUPED, head_dim=12, query_pre_attn_scalar=7, attn_logit_softcapping=2.0, final_logit_softcapping=9.0,
            sliding_window=5, layer_types=["sliding_attention", "full_attention"], rope_parameters=rope(10000.0),
        ),
        of_two("model.layers.{}.self_attn"), decoder=("",),
    ),
    Kind(
        "gpt_oss", hf.GptOssForCausalLM,
        # One expert for all tokens, since it is the attention that is tested. The rotary embedding is its own: YaRN.
        lambda: hf.GptOssConfig(
            **GROUPED, head_dim=12, sliding_window=5, layer_types=["sliding_attention", "full_attention"],
            num_local_experts=1, num_experts_per_tok=1,
        ),
        of_two("model.layers.{}.self_attn"), decoder=("",),
    ),
    Kind(
        "phi3", hf.Phi3Model, lambda: hf.Phi3Config(**GROUPED, rope_parameters=rope(300.0, partial_rotary_factor=0.5)),
        of_two("layers.{}.self_attn"),
    ),
    # Rotary embeddings that are scaled: for each the original length is so short that some pairs are scaled and some are not.
    Kind(
        "llama_linear", hf.LlamaForCausalLM,
        lambda: hf.LlamaConfig(**SCALED, rope_parameters=rope(500.0, "linear", factor=4.0)),
        ("model.layers.0.self_attn",),
    ),
    Kind(
        "llama3", hf.LlamaForCausalLM,
        lambda: hf.LlamaConfig(
            **SCALED, rope_parameters=rope(
                500.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        ("model.layers.0.self_attn",), decoder=("",),
    ),
    Kind(
        "qwen3_yarn", hf.Qwen3ForCausalLM,
        # With the attention factor of DeepSeek-V2.
        lambda: hf.Qwen3Config(
            **SCALED, head_dim=16, rope_parameters=rope(
                100.0, "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=1.0,
                mscale=0.707, mscale_all_dim=1.0,
            ),
        ),
        ("model.layers.0.self_attn",),
    ),
    Kind(
        "phi3_longrope", hf.Phi3Model,
        # The sequences are longer than the original ones, so that the long factors serve.
        lambda: hf.Phi3Config(
            **SCALED, original_max_position_embeddings=8, rope_parameters=rope(
                300.0, "longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.2],
                long_factor=[1.05, 2.5, 20.0],
            ),
        ),
        ("layers.0.self_attn",),
    ),
    Kind(
        "modernbert", hf.ModernBertModel,
        lambda: hf.ModernBertConfig(
            **SMALL, local_attention=6, layer_types=["full_attention", "sliding_attention"],
            rope_parameters={"full_attention": rope(700.0), "sliding_attention": rope(50.0)},
        ),
        of_two("layers.{}.attn"),
    ),
    Kind(
        # Six heads, since ALiBi's slopes are another matter where their number is no power of two.
        "mpt", hf.MptModel, lambda: hf.MptConfig(vocab_size=VOCABULARY, d_model=24, n_heads=6, n_layers=1, max_seq_len=64),
        ("blocks.0.attn",),
    ),
    Kind(
        "whisper", hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            vocab_size=VOCABULARY, d_model=32, num_mel_bins=8, max_source_positions=10, max_target_positions=256,
            encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48, decoder_layers=2,
            decoder_attention_heads=4, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=None, eos_token_id=None,
            decoder_start_token_id=1,
        ),
        (
            "model.encoder.layers.0.self_attn",
            *of_two("model.decoder.layers.{}.self_attn"),
            *of_two("model.decoder.layers.{}.encoder_attn"),
        ),
        feed="sound", decoder=("model.decoder.",),
    ),
    Kind(
        "t5", hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=10, d_ff=48, num_layers=2, num_heads=4,
            relative_attention_num_buckets=32, relative_attention_max_distance=100, tie_word_embeddings=False,
            eos_token_id=None, pad_token_id=0, decoder_start_token_id=0,
        ),
        (
            *of_two("encoder.block.{}.layer.0.SelfAttention"),
            *of_two("decoder.block.{}.layer.0.SelfAttention"),
            *of_two("decoder.block.{}.layer.1.EncDecAttention"),
        ),
        feed="two_texts", decoder=("decoder.", "shared."),
    ),
]  # fmt: skip


def build(kind, draw):
    """The model, with every parameter drawn so that none can be left out unnoticed: vectors (biases, norms, sinks) around
    what they start at, matrices so large that attention is sharp and a decoder's tokens vary."""
    config = kind.config()
    torch.manual_seed(SEED)
    config._attn_implementation = config._experts_implementation = "eager"
    model = kind.model(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if parameter.dim() == 1:
                parameter.copy_(parameter.round() + draw.normal(*shape, std=0.3))
            else:
                parameter.copy_(draw.normal(*shape, std=gain(kind, name) * min(shape[-2:]) ** -0.5))
    return model


def gain(kind, name):
    """By how much more than keeps the variance a matrix multiplies: the first part that is in the name says it."""
    gains = {".fc": 4.0, "embed_positions": 4.0, "embed": 1.0, "wte": 1.0, "wpe": 1.0, "": 2.0}
    if kind.name == "t5":
        # Nothing but the relative positions tells repeated tokens apart, so they must weigh more than the content.
        gains = {".q.": 0.3, "EncDecAttention.o": 0.3, "shared": 0.3, "relative_attention_bias": 6.0, "": 3.0}
    return next(value for part, value in gains.items() if part in name)


def feed(kind, draw):
    """The arguments of a forward pass of the whole model."""
    tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=draw.generator)
    padded = {"input_ids": tokens, "attention_mask": keep_first(REAL, LENGTH).long()}
    decoder_ids = torch.randint(1, VOCABULARY, (BATCH, 7), generator=draw.generator)
    return {
        "padded_tokens": lambda: padded,
        "image": lambda: {"pixel_values": draw.normal(BATCH, 3, 12, 12)},
        "sound": lambda: {"input_features": draw.normal(BATCH, 8, 20), "decoder_input_ids": decoder_ids},
        "two_texts": lambda: padded | {"decoder_input_ids": decoder_ids},
    }[kind.feed]()


def watch(model, names):
    """A dict that a forward pass fills with what the layers of these names took and gave."""
    seen = {}

    def note_attention(name):
        def hook(_module, args, kwargs, output):
            seen[f"{name}.input"] = args[0] if args else kwargs["hidden_states"]
            if kwargs.get("key_value_states") is not None:
                seen[f"{name}.memory"] = kwargs["key_value_states"]
            seen.setdefault(f"{name}.output", output[0])
            seen[f"{name}.weights"] = output[-1]

        return hook

    def note_output(name):
        def hook(_module, _args, output):
            seen[f"{name}.output"] = output

        return hook

    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, hf.models.bert.modeling_bert.BertAttention):
            # Its output has the residual and the norm in it; ours ends with the projection, which runs later.
            module.output.dense.register_forward_hook(note_output(name))
            module = module.self
        if isinstance(module, hf.models.bloom.modeling_bloom.BloomAttention):
            # Here too the output has the residual in it.
            module.dense.register_forward_hook(note_output(name))
        module.register_forward_hook(note_attention(name), with_kwargs=True)
    return seen


def greedy(kind, model, draw, inputs):
    """What `generate` gives without sampling, or None where rounding could decide or the tokens don't vary."""
    prompt = torch.randint(1, VOCABULARY, (BATCH, PROMPT), generator=draw.generator)
    arguments, memory = {"input_ids": prompt}, {}
    if model.config.is_encoder_decoder:
        source = {name: inputs[name] for name in ("input_features", "input_ids") if name in inputs}
        arguments = source | {"decoder_input_ids": prompt}
        memory = {"golden.greedy.memory": model.get_encoder()(**source).last_hidden_state}
    # Whisper has a `generate` of its own, for long recordings.
    result = hf.GenerationMixin.generate(
        model, **arguments, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    # T5's prompt now begins with its start token.
    prompt, tokens = result.sequences[:, :-NEW_TOKENS], result.sequences[:, -NEW_TOKENS:]
    top = torch.stack(result.scores, dim=1).topk(2).values
    gap = (top[..., 0] - top[..., 1]).min().item()
    varied = min(len(set(row[NEW_TOKENS // 2 :].tolist())) for row in tokens)
    print(f"{kind.name}: the two greatest logits at least {gap:.1e} apart, {varied} tokens in the second half")
    if gap < SURE or varied < VARIED:
        return None
    return {"golden.greedy.prompt": prompt, "golden.greedy.tokens": tokens} | memory


def tensors_of(kind, seed):
    """All that the file of this kind holds, and the model's config, or None where the seed doesn't serve."""
    draw = Draw("transformers", f"{kind.name}/{seed}")
    model = build(kind, draw)
    inputs = feed(kind, draw)
    seen = watch(model, kind.layers)
    model(**inputs)
    layers = {f"golden.{name}": tensor for name, tensor in seen.items()}
    if "attention_mask" in inputs:
        layers["golden.attention_mask"] = inputs["attention_mask"]
    tokens = {}
    if kind.decoder is not None:
        tokens = greedy(kind, model, draw, inputs)
        if tokens is None:
            return None
    kept = tuple(f"{name}." for name in kind.layers) + (kind.decoder or ())
    state = {name: tensor for name, tensor in model.named_parameters() if name.startswith(kept)}
    return state | layers | tokens, model.config


def write(kind):
    tensors, config = next(found for seed in count() if (found := tensors_of(kind, seed)))
    tensors = {name: stored(t.float() if t.is_floating_point() else t) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), f"{kind.name}: {name} is not finite"
    metadata = {
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "layers": json.dumps(kind.layers),
        "torch": torch.__version__.split("+")[0],
        "transformers": hf.__version__,
        "seed": str(SEED),
    }
    data = sorted_header(safetensors.torch.save(tensors, metadata))
    (FOLDER / "transformers" / f"{kind.name}.safetensors").write_bytes(data)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    (FOLDER / "transformers").mkdir(exist_ok=True)
    chosen = sys.argv[1:]
    for kind in KINDS:
        if not chosen or kind.name in chosen:
            with torch.no_grad():
                write(kind)


if __name__ == "__main__":
    main()
