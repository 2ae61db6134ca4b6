"""The hot loops of a cubin, from its machine code (`cuobjdump --dump-sass`)."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);")
SHAPE = re.compile(r"HGMMA\.64x(\d+)x(\d+)")


@dataclass
class Loop:
    """A loop with matrix instructions and no other such loop in it."""

    first: int
    last: int
    instructions: int
    matrix: float  # products of 16 x 8 with 32 bytes of the inner axis
    local: int  # reads and writes of local memory, that is, of spilled registers
    mix: Counter

    @property
    def per_matrix(self):
        return self.instructions / self.matrix


@dataclass
class Kernel:
    name: str
    registers: int
    stack: int
    loops: list

    @property
    def hot(self):
        """Of the loops with the most products, one over tiles with and one without a mask, the shorter."""
        return min(self.loops, key=lambda loop: (-loop.matrix, loop.instructions), default=None)


def products(op):
    """How many products of 16 x 8 with 32 bytes of the inner axis a warp gets from the instruction: 1 of `mma.m16n8k16` (half types)
    or `mma.m16n8k8` (tf32). A `wgmma` of 64 rows is one of four warps with 16 rows each."""
    if op.startswith("HMMA"):
        return 0.5 if "1688.F32" in op and "TF32" not in op or "1684" in op else 1
    if shape := SHAPE.match(op):
        columns, inner = map(int, shape.groups())
        return columns / 8 * inner / (8 if "TF32" in op else 16)
    return 0


def loops(code):
    code = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(code)]
    found = []
    for at, op, operands in code:
        target = op.startswith("BRA") and re.search(r"\b0x([0-9a-f]+)", operands)
        if not target or int(target[1], 16) >= at:
            continue
        first = int(target[1], 16)
        body = [op for where, op, _ in code if first <= where <= at]
        matrix = sum(map(products, body))
        if matrix >= 8:
            mix = Counter(op.split(".")[0] for op in body)
            found.append(Loop(first, at, len(body), matrix, mix["LDL"] + mix["STL"], mix))
    within = lambda a, b: a is not b and b.first <= a.first and a.last <= b.last
    # What waits in a loop behind the kernel, and comes back into one of these.
    enters = lambda a, b: b.first < a.first <= b.last < a.last
    found = [loop for loop in found if not any(enters(loop, other) for other in found)]
    return [loop for loop in found if not any(within(other, loop) for other in found)]


def run(*command):
    return subprocess.run(["cuobjdump", *command], capture_output=True, text=True, check=True).stdout


def kernels(cubin):
    """Every kernel of a cubin file."""
    usage = run("--dump-resource-usage", str(cubin))
    usage = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    for part in re.split(r"\n\s+Function : ", run("--dump-sass", str(cubin)))[1:]:
        name = part.split("\n")[0].strip()
        yield Kernel(name, *usage[name], loops(part))
