"""Which of torch's functions only move elements, and which are plain arithmetic; by their names in ATen."""

from __future__ import annotations

# fmt: off
#: Functions that move elements, or select some of them, and so keep a grid.
MOVES = frozenset([
    "_to_copy", "_unsafe_view", "adaptive_max_pool2d", "alias", "as_strided", "cat",
    "channel_shuffle", "chunk", "clone", "constant_pad_nd", "contiguous", "detach", "dropout",
    "embedding", "expand", "expand_as", "flatten", "flip", "gather", "getitem", "index",
    "index_select", "lift_fresh", "max_pool1d", "max_pool2d", "max_pool3d", "movedim", "narrow",
    "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave",
    "reshape", "reshape_as", "roll", "select", "slice", "split", "split_with_sizes", "squeeze",
    "stack", "swapaxes", "t", "tensor_split", "to", "transpose", "type_as", "unbind",
    "unflatten", "unfold", "unsafe_chunk", "unsafe_split", "unsqueeze", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "view", "view_as",
])
#: Arithmetic that needs no table.
ARITHMETIC = frozenset([
    "abs", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "add", "add_", "addmm", "all", "any",
    "arange", "avg_pool1d", "avg_pool2d", "avg_pool3d", "bitwise_and", "bitwise_not",
    "bitwise_or", "bmm", "clamp", "clamp_max", "clamp_min", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "div", "div_", "eq", "full",
    "full_like", "ge", "gt", "le", "linear", "logical_and", "logical_not", "logical_or", "lt",
    "masked_fill", "matmul", "maximum", "mean", "minimum", "mm", "mul", "mul_", "ne", "neg",
    "new_ones", "new_zeros", "ones", "ones_like", "relu", "relu_", "round", "rsub",
    "scalar_tensor", "sub", "sub_", "sum", "sym_numel", "sym_size", "tril", "triu", "where",
    "zeros", "zeros_like",
])
# fmt: on
