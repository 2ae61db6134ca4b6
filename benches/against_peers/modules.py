"""PyTorch's modules with our parameters."""

import torch

from peers import Torch

# Which of our parameters stand, one after the other, in each of PyTorch's. "{}" is weight or bias.
ATTENTION = {"in_proj_{}": [f"{part}_proj.{{}}" for part in "qkv"], "out_proj.{}": ["o_proj.{}"]}
BLOCK = {
    "self_attn.in_proj_{}": [f"blocks.0.attention.{part}_proj.{{}}" for part in "qkv"],
    "self_attn.out_proj.{}": ["blocks.0.attention.o_proj.{}"],
    "linear1.{}": ["blocks.0.mlp.up.{}"],
    "linear2.{}": ["blocks.0.mlp.down.{}"],
    "norm1.{}": ["blocks.0.attention_norm.{}"],
    "norm2.{}": ["blocks.0.mlp_norm.{}"],
}


class TorchModule(Torch):
    """`call(module, x)`, with the gradients of all parameters if there is a backward pass."""

    def __init__(self, module, call, inputs, names, backward, compiled=False):
        kinds = ("weight", "bias")
        self.names = {theirs.format(kind): [name.format(kind) for name in ours] for theirs, ours in names.items() for kind in kinds}
        module.load_state_dict({theirs: torch.cat([inputs[name] for name in ours]) for theirs, ours in self.names.items()})
        trained = dict(module.named_parameters()) if backward else {}
        module = module.train(backward)
        if compiled:
            module = torch.compile(module, dynamic=False)
        super().__init__(lambda: call(module, inputs["x"]), trained, inputs["grad_output"])

    def answer(self):
        answer = self.run()
        for theirs, ours in self.names.items():
            if (grad := answer.pop(f"grad_{theirs}", None)) is not None:
                answer |= {f"grad_{name}": part for name, part in zip(ours, grad.chunk(len(ours)))}
        return answer
