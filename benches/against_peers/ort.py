"""ONNX Runtime, in this process. f32, forward."""

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from peers import median_ms


class Ort:
    """A session over `feed`, the arrays of its inputs."""

    def __init__(self, model, feed, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.feed = feed
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self):
        return self.session.run(None, self.feed)[0]

    def answer(self):
        return {"output": torch.from_numpy(self.run())}

    def time(self, warm_up_ms, time_ms):
        return median_ms(warm_up_ms, time_ms, self.run)


class OrtAttention(Ort):
    """Its fused attention, over (batch, len, num_heads * head_dim) as it wants it."""

    def __init__(self, case, inputs, threads):
        merge = lambda x: np.ascontiguousarray(x.transpose(1, 2).flatten(2).numpy())
        self.heads = case.heads
        feed = {name: merge(inputs[name]) for name in ("query", "key", "value")}
        if "bias" in inputs:
            feed["bias"] = inputs["bias"][None, None].numpy()
        if "key_mask" in inputs:
            feed["key_mask"] = inputs["key_mask"].to(torch.int32).numpy()
        super().__init__(self.model(case, feed).SerializeToString(), feed, threads)

    @staticmethod
    def model(case, feed):
        optional = ["bias" if "bias" in feed else "", "key_mask" if "key_mask" in feed else ""]
        if case.kv_heads == case.heads:
            names = ["query", "key", "value", "", optional[1], optional[0]]
            attributes = {"num_heads": case.heads, "unidirectional": int(case.causal)}
            node = helper.make_node("MultiHeadAttention", names, ["output"], domain="com.microsoft", **attributes)
        else:
            attributes = {"q_num_heads": case.heads, "kv_num_heads": case.kv_heads, "is_causal": int(case.causal)}
            node = helper.make_node("Attention", ["query", "key", "value"], ["output"], **attributes)
        types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
        inputs = [helper.make_tensor_value_info(name, types[x.dtype], x.shape) for name, x in feed.items()]
        outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, feed["query"].shape)]
        graph = helper.make_graph([node], "attention", inputs, outputs)
        imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    def answer(self):
        (output,) = super().answer().values()
        batch, q_len, _ = output.shape
        return {"output": output.reshape(batch, q_len, self.heads, -1).transpose(1, 2)}


class States(torch.nn.Module):
    """The last layer's states alone."""

    def __init__(self, model):
        super().__init__()
        # ONNX Runtime 1.32 can't load the optimised graph if this is called `model`: two of its names become the same.
        self.bert = model

    def forward(self, **arguments):
        return self.bert(**arguments).last_hidden_state


class OrtBert:
    """A BERT of transformers, exported, and optimised by ONNX Runtime's own tool if that makes it faster."""

    def __init__(self, model, arguments, threads):
        feed = {name: x.numpy() for name, x in arguments.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with redirect_stdout(io.StringIO()):
                torch.onnx.export(States(model).eval(), (), path, kwargs=arguments, input_names=list(feed), verbose=False)
            sessions = [Ort(graph, feed, threads) for graph in (path, self.optimised(path, model.config)) if graph]
        best = min(sessions, key=lambda session: min(session.time(30, 30) for _ in range(3)))
        self.answer, self.time = best.answer, best.time

    @staticmethod
    def optimised(path, config):
        """The file of the optimised graph, if the tool is installed."""
        try:
            from onnxruntime.transformers import optimizer
        except ImportError:
            return None
        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        optimised = path.with_name("optimised.onnx")
        optimizer.optimize_model(str(path), model_type="bert", **sizes).save_model_to_file(str(optimised))
        return optimised
