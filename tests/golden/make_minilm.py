"""Write minilm.json: cosine similarities of sentence pairs from sentence-transformers, for tests/minilm.

    pip install -r tests/golden/requirements-minilm.txt && scripts/minilm && python tests/golden/make_minilm.py target/minilm

The folder holds sentence-transformers/all-MiniLM-L6-v2; its weights' checksum is written beside the numbers.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer

LONG = " ".join(f"The {thing} was warm and so was everything near it." for thing in [
    "mat", "cat", "stove", "street", "house", "roof", "harbour", "garden", "loaf", "kettle", "engine", "blanket",
    "sand", "stone", "wall", "bench", "train", "lamp", "river", "valley", "meadow", "barn", "kitchen", "cellar", "sky",
])

# Alike and not, short, longer than the 256 tokens that the model reads, with punctuation, accents, other scripts,
# words of many pieces, and a word that the vocabulary hasn't.
PAIRS = [
    ("The cat sat on the mat because it is warm", "A cat lies on the rug since it is cosy there"),
    ("The cat sat on the mat because it is warm", "Stocks fell sharply on Monday morning"),
    ("How do I bake bread?", "What is a good recipe for a loaf?"),
    ("The trophy doesn't fit in the suitcase, because it is too big.", "the trophy does not fit: it is too large"),
    ("warm", "cold"),
    ("Ein Haus am See", "A house by the lake"),
    ("Crème brûlée, naïvely flambéed!", "creme brulee, naively flambeed"),
    ("antidisestablishmentarianism and electroencephalography", "long words"),
    ("東京は日本の首都です 🙂", "Tokyo is the capital of Japan"),
    (LONG, "It was a hot day"),
]


def main():
    folder = Path(sys.argv[1])
    model = SentenceTransformer(str(folder), device="cpu")
    first, second = ([pair[i] for pair in PAIRS] for i in (0, 1))
    # One sentence at a time, and in float64 from there on: no padding, no rounding of the sum.
    a, b = (model.encode(side, batch_size=1, convert_to_tensor=True).double() for side in (first, second))
    cosines = torch.nn.functional.cosine_similarity(a, b)
    golden = {
        "versions": {
            module.__name__: module.__version__.split("+")[0] for module in (sentence_transformers, transformers, torch)
        },
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "pairs": [[*pair, cosine] for pair, cosine in zip(PAIRS, cosines.tolist())],
    }
    text = json.dumps(golden, indent=1, ensure_ascii=False) + "\n"
    Path(__file__).with_name("minilm.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
