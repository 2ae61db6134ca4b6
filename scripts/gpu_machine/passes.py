"""The launches of a forward and a backward pass, as kernels/src/cuda makes them."""

import ctypes
import dataclasses

import torch
from problem import Problem, Strided
from variants import ELEMENTS

NAN = float("nan")
CAREFUL_BLOCKS = 512


class Tiles:
    """A variant's tiles: what the launch of one of its kernels needs."""

    def __init__(self, variant):
        self.variant, d = variant, variant.defines
        self.rows = 16 * d.get("WARPS", 4) * d.get("ROW_TILES", 1)
        # A specialised kernel has a warp group more, which copies, and two mbarriers for each stage of its keys, values and queries.
        self.specialised = bool(d.get("SPECIALISED"))
        self.threads = 32 * d.get("WARPS", 4) + 128 * self.specialised
        self.others = d.get("OTHERS", 0)

    def shared(self, kernel):
        d = self.variant.defines
        both = d["HEAD_DIM"] + d["VALUE_DIM"]
        own = d["HEAD_DIM"] if kernel in ("attention_forward", "decode_split") else both
        barriers = (32 * d["STAGES"] + 16) * self.specialised
        return (4 if d["ELEMENT"] == 0 else 2) * (self.rows * own + d["STAGES"] * self.others * both) + barriers


def tiles(length, rows):
    return (length + rows - 1) // rows


class Passes:
    """Inputs, results and everything between of one call. Every result starts as NaN, and every mark of a block as 255."""

    def __init__(self, runner, inputs, plain, engine):
        self.runner, self.inputs, self.case, self.plain, self.engine = runner, inputs, inputs.case, plain, engine
        c, like = self.case, lambda x: torch.full(x.shape, NAN, dtype=x.dtype, device=x.device)
        self.o, self.dq, self.dk, self.dv = map(like, (inputs.d_o, inputs.q, inputs.k, inputs.v))
        rows = lambda dtype: torch.full((c.batch, c.heads, c.q_len), NAN, dtype=dtype, device=inputs.q.device)
        self.largest, self.log_total, self.lse, self.delta = (rows(t) for t in (torch.float32,) * 2 + (torch.float64, torch.float32))
        self.slope_rows, self.sink_rows = (rows(torch.float32) for _ in range(2)) if c.options else (None, None)
        self.d_bias = like(inputs.bias) if c.options else None
        self.forward_tiles = self.pick("attention_forward")[0]
        self.key_tiles, self.query_tiles = self.pick("backward_keys"), self.pick("backward_queries")[0]
        self.marks = lambda blocks: torch.full((blocks,), 255, dtype=torch.uint8, device=inputs.q.device)
        self.problem = self.arguments()

    def pick(self, kernel):
        """The tiles of the variants for this case; those of the gradients of keys may be two."""
        bucket = lambda dim: next(x for x in (64, 128, 256) if dim <= x)
        dims = {"HEAD_DIM": bucket(self.case.dim), "VALUE_DIM": bucket(self.case.value_dim)}
        engine = "mma" if kernel == "decode_split" else self.engine
        hopper, names = engine == "wgmma", self.runner.machine.architectures(engine)
        return [Tiles(v) for v in self.find(kernel, dims, lambda v: v.hopper == hopper and set(names) & set(v.architectures))]

    def find(self, kernel, dims, fits):
        element = ELEMENTS.index(self.case.dtype)
        # The table has few rows of f16: its tiles are those of bf16.
        for like in dict.fromkeys((element, 1 if element == 2 else element)):
            wanted = {"ELEMENT": like, "PLAIN": int(self.plain)} | dims
            found = [v for v in self.runner.variants if kernel in v.kernels and wanted.items() <= v.defines.items() and fits(v)]
            if found:
                return [dataclasses.replace(v, defines=v.defines | {"ELEMENT": element}) for v in found]
        raise RuntimeError(f"the table of variants has no {kernel} for {wanted}, {self.engine}")

    def arguments(self):
        c, i, pointer = self.case, self.inputs, lambda x: None if x is None else x.data_ptr()
        strided = {"q": i.q, "k": i.k, "v": i.v, "o": self.o, "d_o": i.d_o, "dq": self.dq, "dk": self.dk, "dv": self.dv}
        numbers = {name: getattr(self, name) for name in ("largest", "log_total", "lse", "delta", "d_bias", "slope_rows", "sink_rows")}
        numbers |= {"d_lse": i.d_lse, "bias": i.bias, "slopes": i.slopes, "sinks": i.sinks}
        self.tensors = [x for x in (*strided.values(), *numbers.values()) if x is not None]
        p = Problem(**{name: Strided.of(x) for name, x in strided.items()}, **{name: pointer(x) for name, x in numbers.items()})
        if i.bias is not None:
            strides = [0 if n == 1 else s for n, s in zip(i.bias.shape, i.bias.stride())]
            p.bias_strides, p.bias_dims = (ctypes.c_int64 * 4)(*strides), (ctypes.c_int * 4)(*i.bias.shape)
        p.mask, p.scale, p.softcap, p.dropout_keep = c.mask(), c.scale, i.softcap, 1.0
        p.batch, p.heads, p.kv_heads, p.q_len, p.kv_len = c.batch, c.heads, c.kv_heads, c.q_len, c.kv_len
        p.head_dim, p.value_dim = c.dim, c.value_dim
        return p

    def launch(self, tiles, kernel, grid, small=False):
        threads, shared = (128, 0) if small else (tiles.threads, tiles.shared(kernel))
        self.runner.machine.launch(tiles.variant, kernel, grid, threads, shared, self.problem, [*self.tensors, self.careful])

    def careful_pass(self, kernel, blocks):
        self.launch(Tiles(self.find(kernel, {}, lambda v: True)[0]), kernel, min(blocks, CAREFUL_BLOCKS), small=True)

    def mark(self, blocks):
        self.careful = self.marks(blocks)
        self.problem.careful = self.careful.data_ptr()

    def decode(self):
        """A few queries: the keys are split, and the parts merged."""
        c, p, t = self.case, self.problem, self.pick("decode_split")[0]
        row_tiles = tiles(c.heads // c.kv_heads * c.q_len, t.rows)
        p.splits = min(tiles(256, row_tiles * c.kv_heads * c.batch), tiles(tiles(c.kv_len, t.others), 2))
        numbers = p.splits * c.batch * c.heads * c.q_len * (t.variant.defines["VALUE_DIM"] + 2)
        self.partial = torch.full((numbers,), NAN, device=self.o.device)
        p.partial = self.partial.data_ptr()
        self.tensors.append(self.partial)
        self.mark(c.heads * c.batch)
        p.careful_queries = c.q_len
        self.launch(t, "decode_split", row_tiles * p.splits * c.kv_heads * c.batch)
        self.launch(t, "decode_merge", c.heads * c.batch, small=True)
        self.careful_pass("careful_forward", c.heads * c.batch)

    def forward(self):
        c, p, t = self.case, self.problem, self.forward_tiles
        if c.q_len <= 8 and c.kv_len >= 256:
            return self.decode()
        grid = tiles(c.q_len, t.rows) * c.heads * c.batch
        self.mark(grid)
        p.careful_queries = t.rows
        self.launch(t, "attention_forward", self.grid(t, grid))
        self.careful_pass("careful_forward", grid)

    def grid(self, t, blocks):
        """A specialised kernel does any number of blocks of queries with a block of threads, which pays where all have the same work."""
        is_even = t.specialised and not self.case.causal and not self.case.window
        return min(blocks, self.runner.machine.multiprocessors) if is_even else blocks

    def backward(self):
        c, p, q = self.case, self.problem, self.query_tiles
        p.careful_queries, p.careful_keys = q.rows, self.key_tiles[0].rows
        key_grid = tiles(c.kv_len, p.careful_keys) * c.kv_heads * c.batch
        query_grid = tiles(c.q_len, q.rows) * c.heads * c.batch
        self.mark(key_grid)
        self.launch(q, "backward_delta", tiles(c.q_len * c.heads * c.batch, 4), small=True)
        for t in self.key_tiles:
            self.launch(t, "backward_keys", key_grid)
        self.careful_pass("careful_keys", key_grid)
        self.mark(query_grid)
        self.launch(q, "backward_queries", query_grid)
        if self.slope_rows is not None:
            t = self.pick("backward_slopes")[0]
            self.launch(t, "backward_slopes", tiles(c.q_len, t.rows) * c.heads * c.batch)
        self.careful_pass("careful_queries", query_grid)
        if self.d_bias is not None:
            t = self.pick("backward_bias")[0]
            *outer, rows, columns = self.inputs.bias.shape
            blocks = outer[0] * outer[1] * tiles(rows, t.rows) * tiles(columns, t.others)
            p.careful_queries, p.careful_keys = t.rows, t.others
            self.mark(blocks)
            self.launch(t, "backward_bias", blocks)
            self.careful_pass("careful_bias", blocks)

    def run(self):
        for x in (self.o, self.dq, self.dk, self.dv, self.lse):
            x.fill_(NAN)
        self.forward()
        self.backward()
        self.runner.machine.wait()

    def results(self):
        named = {"o": self.o, "lse": self.lse, "dq": self.dq, "dk": self.dk, "dv": self.dv}
        if self.case.options:
            named |= {"bias": self.d_bias, "slopes": self.slope_rows, "sinks": self.sink_rows}
        return named

    def summed(self, results):
        """With the parts of the rows summed."""
        rows = {name: x.double().sum((0, 2)) for name, x in results.items() if name in ("slopes", "sinks")}
        return results | rows
