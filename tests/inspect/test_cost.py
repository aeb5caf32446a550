"""What looking at a model costs, counted in passes and in elements, not in seconds."""

import torch
from digits import batches, networks
from torch.utils._python_dispatch import TorchDispatchMode

import qframework
from qframework.inspect import collect_statistics


class Written(TorchDispatchMode):
    """Counts the elements that functions of torch write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            view = isinstance(t, torch.Tensor) and t._base is not None
            self.elements += t.numel() if isinstance(t, torch.Tensor) and not view else 0
        return result


def test_each_batch_is_run_once() -> None:
    _, quantized = networks()
    calls = []
    handle = quantized.register_forward_hook(lambda *_: calls.append(1))
    collect_statistics(quantized, batches())
    handle.remove()
    assert len(calls) == len(batches())


def test_less_is_written_than_in_a_second_forward() -> None:
    _, quantized = networks()
    large = [torch.cat(batches()).repeat(8, 1, 1, 1)] * 2
    with qframework.settings.use(kernels="fused"):
        with torch.no_grad(), Written() as alone:
            for x in large:
                quantized(x)
        with Written() as looked:
            collect_statistics(quantized, large)
    assert looked.elements < 2 * alone.elements
