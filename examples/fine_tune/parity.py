"""Fine-tune all-MiniLM-L6-v2 with PEFT on rated sentences of product reviews: praise or complaint?

    pip install numpy peft safetensors tokenizers torch tqdm transformers
    python parity.py --model target/minilm --data target/reviews/amazonReviewSnippets_GroundTruth.txt

For each seed it trains a LoRA adapter and a linear head, and prints one JSON line: the loss and the accuracy on the held-out
sentences of the frozen model and of the trained one, the seconds of a step and the loss of every step. A last line has the means
and standard deviations over the seeds. `--write-start FOLDER` and `--write-end FOLDER` save each seed's initial and trained
numbers as PEFT does: FOLDER/seed0/adapter_model.safetensors.

The recipe, for a program that wants the same numbers:

- Data. A line of the file is `REVIEW_SENTENCE <tab> MEAN RATING <tab> TEXT`, with CRLF at its end (none at the end of the file), in
  ASCII. Nothing is quoted. Sentences with a rating within 0.5 of zero are left out (|rating| < 0.5). The label is 1 (praise) for a
  rating above 0 and 0 (complaint) below. A sentence is held out if 5 divides the number of its review, so no review is in both parts.
- Tokens. tokenizer.json, `[CLS]` and `[SEP]` included, cut to --max-tokens. A batch is padded to its longest sentence, and no token
  looks at padding.
- Model. The mean of the last states of all tokens but padding, not normalised, then a linear head (2, 384) with a bias. Dropout is 0.
- LoRA. y = W x + b + (alpha / rank) B A x on the targets of all six layers. The rest of the model doesn't train.
- Random numbers. SplitMix64, as in examples/common/src/random.rs, is a function of seed, purpose and step. A, the head's weight and the
  head's bias are uniform in +-1/sqrt(384): the numbers, row by row, are (2 u - 1) / sqrt(384) in f64, rounded to f32, with u the next
  `unit()` of the generator of (seed, name, 0). The names are those in PEFT's file. B is 0.
- Order. Epoch e goes through the training sentences, which are in the order of the file, in the order that Fisher and Yates's shuffle
  gives: for i from n - 1 down to 1, swap items i and `below(i + 1)` of the generator of (seed, "order", e). Batches take the next --batch
  sentences of the epochs in a row; a batch may end one epoch and begin the next.
- Loss. Cross-entropy, the mean over the batch.
- AdamW. betas (0.9, 0.999), eps 1e-8, no weight decay, no clipping. A linear warm-up over the first tenth of the steps, then a line to 0
  (`Schedule::warm_up_linear(lr, 0.0, steps / 10, steps)`).

The frozen model is judged three times: by the same head, trained alone by the same recipe ("head"); by the best that a linear head
can do, logistic regression to convergence with a penalty of 0.01 |weight|^2 ("regression"); and by which of two sentences is nearer
("zero_shot_accuracy").
"""

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import BertModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))
from splitmix import Random  # noqa: E402

HELD_OUT_EVERY = 5
CLEAR = 0.5
# The endings of the modules' names. W_O also ends in "output.dense", so the MLP's is named with its layer.
TARGETS = {
    "q_proj": ["query"],
    "k_proj": ["key"],
    "v_proj": ["value"],
    "o_proj": ["attention.output.dense"],
    "up": ["intermediate.dense"],
    "down": [f"layer.{layer}.output.dense" for layer in range(6)],
}


def read(file):
    """The training part and the held-out part: lists of (text, label)."""
    train, held_out = [], []
    with open(file, encoding="utf-8", newline="") as lines:
        for line in lines:
            name, rating, text = line.rstrip("\r\n").split("\t")
            if abs(float(rating)) < CLEAR:
                continue
            part = held_out if int(name.split("_")[0]) % HELD_OUT_EVERY == 0 else train
            part.append((text, int(float(rating) > 0)))
    return train, held_out


class Classifier(torch.nn.Module):
    """The encoder, the mean over the tokens and a linear head. The names are those of `BertForSequenceClassification`."""

    def __init__(self, folder):
        super().__init__()
        self.bert = BertModel.from_pretrained(
            folder, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.classifier = torch.nn.Linear(self.bert.config.hidden_size, 2)

    def embed(self, ids, mask):
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        mask = mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, ids, mask):
        return self.classifier(self.embed(ids, mask))


class Reader:
    def __init__(self, folder, max_tokens):
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.enable_padding()  # To the longest of the batch, with token 0.

    def batch(self, sentences):
        encodings = self.tokenizer.encode_batch([text for text, _ in sentences])
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        return ids, mask, torch.tensor([label for _, label in sentences])


def initial(seed, name, like):
    """The numbers of A and of the head; B is 0."""
    if "lora_B" in name:
        return torch.zeros_like(like)
    random, bound = Random(seed, name, 0), 1 / math.sqrt(384)
    numbers = [(2 * random.unit() - 1) * bound for _ in range(like.numel())]
    return torch.tensor(numbers, dtype=torch.float64).float().view_as(like)


def file_name(name):
    """The name that a parameter has in PEFT's file."""
    return name.replace(".default", "").replace(".modules_to_save", "")


def order(seed, count):
    """Indexes of training sentences, epoch after epoch, without end."""
    epoch = 0
    while True:
        random, items = Random(seed, "order", epoch), list(range(count))
        for i in range(count - 1, 0, -1):
            j = random.below(i + 1)
            items[i], items[j] = items[j], items[i]
        yield from items
        epoch += 1


def learning_rate(arguments, step):
    warm_up = arguments.steps // 10
    if step < warm_up:
        return arguments.lr * (step + 1) / warm_up
    return arguments.lr * (1 - (step - warm_up) / (arguments.steps - warm_up))


def optimizer_of(arguments, parameters):
    return torch.optim.AdamW(parameters, lr=arguments.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def step(arguments, optimizer, number, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.param_groups[0]["lr"] = learning_rate(arguments, number)
    optimizer.step()


def score(logits, labels):
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}


@torch.no_grad()
def outputs(function, reader, sentences, size=32):
    """A function of (ids, mask) for all sentences, in their order. Sentences of a like length are computed together."""
    by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i][0]))
    rows = [None] * len(sentences)
    for start in range(0, len(by_length), size):
        chosen = by_length[start : start + size]
        ids, mask, _ = reader.batch([sentences[i] for i in chosen])
        for i, row in zip(chosen, function(ids, mask)):
            rows[i] = row
    return torch.stack(rows)


def labels_of(sentences):
    return torch.tensor([label for _, label in sentences])


class Frozen:
    """The untouched model: embeddings of both parts, and the heads on them."""

    COMPLAINT_AND_PRAISE = ["I am unhappy with this product.", "I am happy with this product."]

    def __init__(self, arguments, reader, train, held_out):
        model = Classifier(arguments.model).eval()
        self.arguments = arguments
        self.x, self.y = outputs(model.embed, reader, train), labels_of(train)
        self.held_x, self.held_y = outputs(model.embed, reader, held_out), labels_of(held_out)
        self.anchors = outputs(model.embed, reader, [(text, 0) for text in self.COMPLAINT_AND_PRAISE])

    def zero_shot(self):
        """The accuracy of the nearer of two sentences, by the cosine."""
        cosines = F.normalize(self.held_x, dim=1) @ F.normalize(self.anchors, dim=1).T
        return (cosines.argmax(1) == self.held_y).double().mean().item()

    def head(self, start, indexes):
        """The head alone, from the same start, by the same recipe."""
        weight, bias = (tensor.clone().requires_grad_() for tensor in start)
        optimizer = optimizer_of(self.arguments, [weight, bias])
        for number in range(self.arguments.steps):
            batch = [next(indexes) for _ in range(self.arguments.batch)]
            loss = F.cross_entropy(F.linear(self.x[batch], weight, bias), self.y[batch])
            step(self.arguments, optimizer, number, loss)
        with torch.no_grad():
            return score(F.linear(self.held_x, weight, bias), self.held_y)

    def regression(self):
        """Logistic regression to convergence."""
        weight, bias = torch.zeros(2, self.x.shape[1], requires_grad=True), torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(self.x, weight, bias), self.y) + 0.01 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            return score(F.linear(self.held_x, weight, bias), self.held_y)


def adapted(arguments, seed):
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=0.0,
        target_modules=[name for target in arguments.targets.split(",") for name in TARGETS[target]],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(Classifier(arguments.model), config)
    trained = {file_name(name): tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(initial(seed, name, tensor))
    return model, trained


def run(arguments, seed, reader, train, held_out, frozen):
    """One seed: the line of the report."""
    model, trained = adapted(arguments, seed)
    if arguments.write_start:
        model.save_pretrained(Path(arguments.write_start) / f"seed{seed}")
    result = {"seed": seed, "trained_numbers": sum(tensor.numel() for tensor in trained.values())}
    if frozen:
        names = ["base_model.model.classifier.weight", "base_model.model.classifier.bias"]
        result["head"] = frozen.head([trained[name].detach() for name in names], order(seed, len(train)))
    optimizer = optimizer_of(arguments, list(trained.values()))
    indexes, losses, seconds = order(seed, len(train)), [], []
    for number in tqdm(range(arguments.steps), desc=f"seed {seed}", leave=False, disable=None):
        start = time.perf_counter()
        ids, mask, labels = reader.batch([train[next(indexes)] for _ in range(arguments.batch)])
        loss = F.cross_entropy(model(ids, mask), labels)
        step(arguments, optimizer, number, loss)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    if arguments.write_end:
        model.save_pretrained(Path(arguments.write_end) / f"seed{seed}")
    result["tuned"] = score(outputs(model, reader, held_out), labels_of(held_out))
    if seconds:
        result["seconds_per_step"] = {"median": statistics.median(seconds), "mean": statistics.mean(seconds)}
        result["seconds"] = sum(seconds)
    result["losses"] = losses
    return result


def spread(values):
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="target/minilm", help="folder with config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--data", default="target/reviews/amazonReviewSnippets_GroundTruth.txt")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj", help=f"some of {','.join(TARGETS)}")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write-start", metavar="FOLDER", help="save what each seed starts from")
    parser.add_argument("--write-end", metavar="FOLDER", help="save what each seed ends with")
    parser.add_argument("--no-frozen", action="store_true", help="don't judge the frozen model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.stdout.reconfigure(line_buffering=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    train, held_out = read(arguments.data)
    reader = Reader(arguments.model, arguments.max_tokens)
    frozen = None if arguments.no_frozen else Frozen(arguments, reader, train, held_out)
    results = []
    for seed in map(int, arguments.seeds.split(",")):
        results.append(run(arguments, seed, reader, train, held_out, frozen))
        print(json.dumps(results[-1]))

    praise = labels_of(held_out).double().mean().item()
    summary = {
        "train": len(train),
        "held_out": len(held_out),
        "share_of_larger_class": max(praise, 1 - praise),
    }
    if frozen:
        summary["zero_shot_accuracy"] = frozen.zero_shot()
        summary["regression"] = frozen.regression()
    for what in ["head", "tuned"] if frozen else ["tuned"]:
        summary[what] = {kind: spread([result[what][kind] for result in results]) for kind in ("loss", "accuracy")}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
