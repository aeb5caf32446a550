"""What stands beside a value may be computed when it is looked at: it is what it would have been at once."""

import copy
import pickle
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qframework
from qframework.layers import QuantConv2d, QuantIdentity
from qframework.quant_tensor import IntQuantTensor

FIELDS = ("scale", "zero_point", "bit_width")


def made() -> tuple[torch.Tensor, IntQuantTensor]:
    torch.manual_seed(0)
    layer = QuantConv2d(3, 4, 3, return_quant_tensor=True, bias=False)
    x = QuantIdentity(return_quant_tensor=True, collect_stats_steps=1)(torch.randn(2, 3, 6, 6))
    return layer.weight, layer(x)


def waits(y: IntQuantTensor) -> bool:
    return "_later" in vars(y)


def test_the_scale_of_a_product_waits_until_it_is_looked_at() -> None:
    _, y = made()
    assert waits(y)
    assert y.scale.dim() == 0 and float(y.bit_width) > 16 and float(y.zero_point) == 0
    assert not waits(y) and y.scale is y.scale


def test_what_doesnt_need_it_doesnt_look_at_it() -> None:
    _, y = made()
    assert (y + 0).dim() == 4 and y.shape == (2, 4, 4, 4) and y.signed
    assert waits(made()[1].replace(signed=True))


def test_records_of_one_value_share_what_is_found() -> None:
    _, y = made()
    other = y.replace(training=False)
    assert other.scale is y.scale and other.bit_width is y.bit_width


def test_a_replaced_field_stays_replaced() -> None:
    _, y = made()
    other = y.replace(scale=torch.tensor(3.0))
    assert float(other.bit_width) == float(y.bit_width) and float(other.scale) == 3


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode])
def test_the_scale_has_its_gradient_wherever_it_is_looked_at_first(where) -> None:
    weight, y = made()
    with where():
        scale = y.scale
    assert torch.autograd.grad(scale, weight)[0].any()


def test_without_gradients_it_has_none_wherever_it_is_looked_at() -> None:
    with torch.no_grad():
        _, y = made()
    assert not y.scale.requires_grad


@pytest.mark.parametrize("copied", [
    copy.deepcopy,
    copy.copy,
    lambda y: pickle.loads(pickle.dumps(y)),
    lambda y: y.map_tensors(torch.clone),
])  # fmt: skip
def test_copies_are_whole(copied) -> None:
    with torch.no_grad():
        _, y = made()
    other = copied(y)
    for name in ("value", *FIELDS):
        assert torch.equal(getattr(other, name), getattr(y, name))


def constants() -> IntQuantTensor:
    """Of a quantizer, whose zero point and bit width wait."""
    act = QuantIdentity(return_quant_tensor=True, collect_stats_steps=1)
    with qframework.settings.use(kernels="fused"):  # what is composed has both at once
        act(torch.randn(4, 64))
        y = act(torch.randn(4, 64))
    assert waits(y)
    return y


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return found * 2 if isinstance(found, torch.Tensor) and found.numel() else found


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return found + 1 if isinstance(found, torch.Tensor) and found.numel() else found


def under_mode(mode, look) -> None:
    with mode:
        look()


LOOKS = {
    "functions": lambda look: under_mode(_Functions(), look),
    "operators": lambda look: under_mode(_Operators(), look),
    "fake": lambda look: under_mode(FakeTensorMode(), look),
    "meta": lambda look: under_mode(torch.device("meta"), look),
    "grad": lambda look: torch.func.grad(lambda t: (look(), t.sum())[1])(torch.ones(2)),
    "jvp": lambda look: torch.func.jvp(
        lambda t: (look(), t)[1], (torch.ones(2),), (torch.ones(2),)
    ),
    "vmap": lambda look: torch.func.vmap(lambda t: (look(), t)[1])(torch.ones(2)),
    "trace": lambda look: torch.jit.trace(lambda t: (look(), t + 1)[1], (torch.ones(2),)),
}


@pytest.mark.parametrize("of", [constants, lambda: made()[1]])
@pytest.mark.parametrize("where", LOOKS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_at_work_where_it_is_looked_at_has_no_part_in_it(where, of) -> None:
    torch.manual_seed(0)
    expected = [getattr(of(), name).detach() for name in FIELDS]
    torch.manual_seed(0)
    y = of()
    LOOKS[where](lambda: [getattr(y, name) for name in FIELDS])
    for name, number in zip(FIELDS, expected, strict=True):
        found = getattr(y, name)
        assert type(found) in (torch.Tensor, torch.nn.Parameter)
        assert not torch._C._functorch.is_functorch_wrapped_tensor(found)
        assert torch.equal(found.detach(), number)


def test_constants_keep_no_graph_alive() -> None:
    with qframework.settings.use(kernels="fused"):
        y = QuantConv2d(3, 4, 3).quant_weight()
    assert waits(y)
    graph = y.scale.grad_fn
    graph.metadata["seen"] = seen = _Seen()
    gone = weakref.ref(seen)
    other = y.replace(value=y.value.detach(), scale=y.scale.detach())
    del seen, graph, y
    assert waits(other) and gone() is None


class _Seen:
    pass


@pytest.mark.parametrize("of", [constants, lambda: made()[1]])
def test_two_threads_may_look_at_once(of) -> None:
    y = of()
    found = y.zero_point
    assert type(y).__getattr__(y, "zero_point") is found  # as the second, once the first is done


def test_a_compiler_looks_too() -> None:
    with torch.no_grad():
        y = constants()
    compiled = torch.compile(
        lambda y: y.value + y.zero_point + y.bit_width, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(y), y.value + 8)
