"""The ONNX graph: reading and writing it, what its operators mean, and the quant attributes of its tensors."""
