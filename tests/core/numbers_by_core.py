"""What quantizers of core compute that are put together by hand; as a script, without the fast forms, into a file."""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def quantizers() -> dict[str, nn.Module]:
    """One of each kind."""
    from qframework.core.binary import BinaryQuant, ClampedBinaryQuant, TernaryQuant
    from qframework.core.bit_width import BitWidthConst, BitWidthParameter
    from qframework.core.function_wrapper import FloorSte, RoundSte, TensorClampSte
    from qframework.core.quant import IntQuant, RescalingIntQuant
    from qframework.core.scaling import ConstScaling, IntScaling, ParameterScaling
    from qframework.core.zero_point import ZeroZeroPoint

    def integers(scaling: nn.Module, width: nn.Module, **how: Any) -> nn.Module:
        rounds = IntQuant(narrow_range=True, signed=True, **how)
        threshold = IntScaling(narrow_range=True, signed=True)
        return RescalingIntQuant(rounds, scaling, threshold, ZeroZeroPoint(), width)

    floor = {"float_to_int_impl": FloorSte(), "tensor_clamp_impl": TensorClampSte()}
    return {
        "constant": integers(ConstScaling(0.7), BitWidthConst(4)),
        "learned": integers(ParameterScaling(0.9), BitWidthConst(4), float_to_int_impl=RoundSte()),
        "floor": integers(ParameterScaling(0.9), BitWidthConst(3), **floor),
        "learned width": integers(ParameterScaling(0.9), BitWidthParameter(5)),
        "binary": BinaryQuant(ParameterScaling(0.5)),
        "clamped binary": ClampedBinaryQuant(ParameterScaling(0.5)),
        "ternary": TernaryQuant(ParameterScaling(0.8), 0.4),
    }


def computed() -> dict[str, list[Tensor]]:
    """Results and gradients by kind of quantizer and number of values."""
    from qframework.functional import IntegerGrid, fake_quantize
    from qframework.quant_tensor import IntQuantTensor

    out: dict[str, list[Tensor]] = {}
    for size in (7, 5000):
        torch.manual_seed(size)
        x = torch.randn(size)
        for name, quantizer in quantizers().items():
            given = x.clone().requires_grad_()
            results = quantizer(given)
            results[0].square().sum().backward()
            grads = [p.grad for p in (given, *quantizer.parameters()) if p.grad is not None]
            out[f"{name}, {size}"] = [t.detach() for t in (*results, *grads)]
        scale = torch.tensor(0.125)
        y = fake_quantize(x, scale, None, IntegerGrid(-7.0, 7.0))
        q = IntQuantTensor(y, scale, 0.0, 4.0, True)
        results = (q + q, q * q, q.reshape(-1, 1), -q, torch.nn.functional.relu(q))
        out[f"tensors, {size}"] = [t for r in results for t in (r.value, r.scale, r.bit_width)]
    return out


if __name__ == "__main__":
    import block_kernels  # noqa: F401

    torch.save(computed(), sys.argv[1])
    assert not any(name.startswith("qframework.kernels") for name in sys.modules)
