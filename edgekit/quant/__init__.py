"""Quantization arithmetic: what is wished for (spec), what was chosen (params), and how ranges are found."""
