"""Names of what the writer adds: the suffixes of onnxruntime's own quantizer, which debugging tools parse."""

from __future__ import annotations

SCALE = "_scale"
ZERO_POINT = "_zero_point"
QUANTIZED = "_quantized"
QUANTIZE_NODE = "_QuantizeLinear"
DEQUANTIZE_NODE = "_DequantizeLinear"
QUANTIZE_OUTPUT = "_QuantizeLinear_Output"
DEQUANTIZE_OUTPUT = "_DequantizeLinear_Output"
QUANTIZE_INPUT = "_QuantizeLinear_Input"
CLIP_NODE = "_Clip"
CLIP_OUTPUT = "_Clip_Output"
CLIP_LOW = "_clip_min"
CLIP_HIGH = "_clip_max"
BRANCH_PRODUCT = "_branch_Input"
