"""What the rows of the table have in common."""

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# The largest difference, relative to the largest number. Gradients are sums of many rounded numbers, and those of a layer's
# k_proj.bias cancel.
TOLERANCE = {"f32": 2e-4, "bf16": 6e-2, "f16": 1e-2}


def error(answer, expected):
    """The largest difference, relative to the largest number."""
    exact = expected.double()
    return ((answer.double() - exact).abs().max() / exact.abs().max().clamp(min=1)).item()


class Case:
    """A row. Its kinds are in `attention`, `operations`, `blocks`, `models` and `memory`. Each has a `name`, and as its `shape` a
    list of numbers."""

    # A word for `--only`.
    group = None
    dtype, causal, backward = "f32", False, False
    # This crate's contender.
    ours = "ours"

    @property
    def tolerance(self):
        return TOLERANCE[self.dtype]

    @property
    def pass_(self):
        return "forward+backward" if self.backward else "forward"

    def words(self):
        """What `--only` finds the row by."""
        return {self.group, self.name, self.pass_, self.dtype}

    def missing(self):
        """Why the row can't be timed here, if it can't."""
        return None

    def inputs(self):
        """Named tensors, for the file that the Rust side reads and for PyTorch."""
        raise NotImplementedError

    def description(self):
        """What the Rust side does with them: its `job::Description`."""
        raise NotImplementedError

    def candle(self):
        """Contenders of the Rust side, by the names of their columns."""
        return {}

    def peers(self, inputs, arguments):
        """Contenders in this process, by the names of their columns."""
        raise NotImplementedError

    def flops(self):
        """Of matrix products; 0 if they aren't most of the work."""
        return 0

    def bytes(self):
        """Those that must be read from memory, if this is most of the work."""
        return 0

    def allowed(self, key, answers, expected):
        """The largest error of an answer's tensor."""
        return self.tolerance

    def expected(self, answers, inputs):
        return answers.get("torch", answers["ours"])

    def check(self, answers, inputs):
        """Compares the answers with what is expected. ONNX Runtime gives no gradients."""
        expected = self.expected(answers, inputs)
        for name in answers.keys() - {"torch"}:
            for key in expected.keys() & answers[name].keys():
                difference = error(answers[name][key], expected[key])
                if not difference <= self.allowed(key, answers, expected):
                    raise SystemExit(f"{self}: {key} of {name} is {difference:.2g} from what was expected")


def normals():
    """A function that draws tensors of a shape, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator)
