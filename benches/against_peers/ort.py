"""ONNX Runtime, in this process."""

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from peers import median_ms


class OnnxRuntime:
    """Its fused attention, over (batch, len, num_heads * head_dim) as it wants it. f32, forward."""

    def __init__(self, case, inputs, threads):
        merge = lambda x: np.ascontiguousarray(x.transpose(1, 2).flatten(2).numpy())
        self.case = case
        self.feed = {name: merge(inputs[name]) for name in ("query", "key", "value")}
        if "bias" in inputs:
            self.feed["bias"] = inputs["bias"][None, None].numpy()
        if "key_mask" in inputs:
            self.feed["key_mask"] = inputs["key_mask"].to(torch.int32).numpy()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        model = self.model().SerializeToString()
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def model(self):
        case, feed = self.case, self.feed
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
        (output,) = self.session.run(None, self.feed)
        batch, q_len, _ = output.shape
        return {"output": torch.from_numpy(output).reshape(batch, q_len, self.case.heads, -1).transpose(1, 2)}

    def time(self, warm_up_ms, time_ms):
        return median_ms(warm_up_ms, time_ms, lambda: self.session.run(None, self.feed))
