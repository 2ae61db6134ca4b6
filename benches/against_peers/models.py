"""Whole models."""

from dataclasses import dataclass
from pathlib import Path

import torch

from case import Case
from ort import OrtBert
from peers import Torch

BATCHES, TOKENS = [1, 32], 21
CLS, SEP = 101, 102


@dataclass(frozen=True)
class MiniLm(Case):
    """all-MiniLM-L6-v2 over sentences of equal length."""

    batch: int
    folder: Path

    group, name = "models", "minilm"

    @property
    def shape(self):
        return [self.batch, TOKENS]

    def missing(self):
        if (self.folder / "model.safetensors").exists():
            return None
        return f"minilm is left out: `scripts/minilm` fetches it to target/minilm, or give its folder with --minilm (not in {self.folder})"

    def inputs(self):
        ids = torch.randint(1000, 30000, (self.batch, TOKENS), generator=torch.Generator().manual_seed(1))
        ids[:, 0], ids[:, -1] = CLS, SEP
        return {"ids": ids}

    def description(self):
        return {"kind": "minilm", "folder": str(self.folder.resolve())}

    def candle(self):
        return {"candle": "candle"}

    def peers(self, inputs, arguments):
        from transformers import AutoModel, logging

        # It reports the weights of the pooler, which sentence embeddings don't use.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        ids = inputs["ids"]
        arguments_of_model = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model = AutoModel.from_pretrained(self.folder, add_pooling_layer=False).eval()
        call = lambda model: lambda: model(**arguments_of_model).last_hidden_state
        peers = {"torch": Torch(call(model)), "ort": OrtBert(model, arguments_of_model, arguments.threads)}
        if arguments.compile:
            peers["compiled"] = Torch(call(torch.compile(model, dynamic=False)))
        return peers


def cases(folder):
    return [MiniLm(batch, folder) for batch in BATCHES]
