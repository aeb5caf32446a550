"""The C++ functions against the ordinary ones: values bit for bit; gradients, and when they are used at all."""

import hashlib
import os
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qframework
from qframework.functional import ROUNDINGS, IntegerGrid, fake_quantize
from qframework.kernels import native
from qframework.kernels.native import build, calls, compilation, tensors
from qframework.layers import QuantConv2d, QuantConvTranspose2d, QuantIdentity, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFixedPoint,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerChannelFloat,
    ShiftedUint8WeightPerTensorFloat,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFloat,
)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")

WEIGHTS = [
    Int8WeightPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerChannelFixedPoint,
    ShiftedUint8WeightPerTensorFloat,
    ShiftedUint8WeightPerChannelFloat,
]
ACTS = [
    Int8ActPerTensorFloat,
    Uint8ActPerTensorFloat,
    Uint8ActPerTensorFixedPoint,
    ShiftedUint8ActPerTensorFloat,
]


@pytest.fixture(autouse=True)
def everything(monkeypatch) -> None:
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels="auto"):
        yield


@pytest.fixture
def called(monkeypatch) -> list:
    """The numbers of the functions that were called."""
    seen, run = [], calls._run
    monkeypatch.setattr(calls, "_run", lambda f, *a, **k: (seen.append(f), run(f, *a, **k)))
    return seen


def results(layer: nn.Module, x: torch.Tensor, kernels: str) -> tuple[torch.Tensor, list]:
    with qframework.settings.use(kernels=kernels):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(x)
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y.dtype)
        wanted = [x, *layer.parameters()]
        return y.detach(), list(torch.autograd.grad((y * upstream).sum(), wanted))


def check(layer: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    mine, theirs = results(layer, x, "auto"), results(layer, x, "fused")
    assert torch.equal(mine[0], theirs[0])
    for one, other in zip(mine[1], theirs[1], strict=True):
        scale = max(other.double().norm().item(), 1.0)
        assert (one.double() - other.double()).norm() <= tolerance * scale


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("kind", [QuantConv2d, QuantConvTranspose2d])
def test_weights(weight, dtype, tolerance, kind, called) -> None:
    torch.manual_seed(0)
    layer = kind(5, 6, (5, 7), weight_quant=weight, bias=False, dtype=dtype)
    layer.weight_quant.tensor_quant.double() if dtype == torch.float64 else None
    check(layer, torch.randn(2, 5, 9, 9).to(dtype), tolerance)
    assert called


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [QuantReLU, QuantIdentity])
def test_activations(act, dtype, tolerance, order, kind, called) -> None:
    torch.manual_seed(0)
    layer = kind(act_quant=act, bit_width=5, collect_stats_steps=1)
    layer = layer.double() if dtype == torch.float64 else layer
    x = torch.randn(3, 4, 33, 31).to(dtype).to(memory_format=order)
    layer(x), layer(x)
    check(layer, 1.3 * x, tolerance)
    assert called


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("zero", [None, 3.0])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("clamp_gradient", [True, False])
def test_scales_along_any_axis(axis, zero, rounding, clamp_gradient) -> None:
    torch.manual_seed(axis)
    x, shape = torch.randn(5, 6, 7, 40), [1, 1, 1, 1]
    shape[axis] = x.shape[axis]
    scale = torch.rand(shape) / 8 + 0.01
    shift = None if zero is None else torch.full(shape, zero)
    found = []
    for kernels in ("auto", "fused"):
        leaves = [t.clone().requires_grad_() for t in (x, scale, shift) if t is not None]
        operands = (*leaves, None)[:3]
        with qframework.settings.use(kernels=kernels):
            y = fake_quantize(*operands, IntegerGrid(-8.0, 7.0, rounding, clamp_gradient))
            grads = torch.autograd.grad((y * y.detach().cos()).sum(), leaves, allow_unused=True)
        found.append((y, grads))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=70),
    st.floats(2.0**-40, 2.0**40, width=32),
    st.sampled_from([None, 0.0, 3.0, 128.0]),
    st.sampled_from([(-128.0, 127.0), (0.0, 255.0), (-7.0, 7.0), (-(2.0**23), 2.0**23)]),
    st.booleans(),
)
def test_any_numbers_and_scales(numbers, scale, zero, bounds, relu) -> None:
    x, s = torch.tensor(numbers), torch.tensor(scale)
    z = None if zero is None else torch.tensor(zero)
    scheme = native.Scheme(IntegerGrid(*bounds), relu=relu)
    y = native.quantize((1, x.numel()), x, s, z, scheme)
    shift = 0.0 if zero is None else zero
    v = torch.relu(x) if relu else x
    expected = (torch.clamp(torch.round(v / s + shift), *bounds) - shift) * s
    assert torch.equal(y.nan_to_num(7e30), expected.nan_to_num(7e30))


@pytest.mark.parametrize("weight", WEIGHTS[:2])
def test_not_a_number_shows_in_scale_and_values(weight) -> None:
    layer = QuantConv2d(3, 4, 5, weight_quant=weight)
    with torch.no_grad():
        layer.weight[1, 2, 0, 0] = torch.nan
        w = layer.quant_weight()
    whole = w.scale.numel() == 1
    assert w.scale.reshape(-1)[0 if whole else 1].isnan()
    assert w.value[1].isnan().all() and w.value[0].isnan().any() == whole


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    layer = QuantReLU(collect_stats_steps=1)
    x = torch.randn(1 << 19)
    layer(x), layer(x)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(layer, x, "auto")[1])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_small_tensors_and_traced_ones_take_the_ordinary_way(monkeypatch, called) -> None:
    layer, x = QuantReLU(collect_stats_steps=1), torch.randn(2, 50)
    layer(x), layer(x)
    assert called
    called.clear()
    layer.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        exported = torch.export.export(layer, (x,)).module()
    for captured in (traced, exported):
        torch.testing.assert_close(captured(2 * x), layer(2 * x))
    called.clear()
    with FlopCounterMode(display=False):
        layer(x)
    monkeypatch.setattr(tensors, "SMALLEST", 101)
    layer(x)
    assert not called


def test_an_upstream_gradient_of_another_layout_is_right() -> None:
    layer = QuantReLU(collect_stats_steps=1)
    x = torch.randn(3, 4, 33, 31)
    layer(x), layer(x)
    for change in (lambda t: t.permute(0, 2, 3, 1), lambda t: t.sum((2, 3), keepdim=True)):
        found = []
        for kernels in ("auto", "fused"):
            with qframework.settings.use(kernels=kernels):
                leaf = x.clone().requires_grad_()
                found.append(torch.autograd.grad(change(layer(leaf)).sin().sum(), leaf)[0])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_several_gradients_at_once_and_gradients_of_scales(weight) -> None:
    torch.manual_seed(0)
    layer = QuantConv2d(3, 4, 5, weight_quant=weight)
    q = layer.quant_weight()
    many = torch.randn(3, *layer.weight.shape)
    grads = partial(torch.autograd.grad, inputs=layer.weight, retain_graph=True)
    together = grads(q.value, grad_outputs=many, is_grads_batched=True)[0]
    for one, upstream in zip(together, many, strict=True):
        torch.testing.assert_close(one, grads(q.value, grad_outputs=upstream)[0])
    if q.zero_point.requires_grad:
        many_shifts = torch.randn(3, *q.zero_point.shape)
        together = grads(q.zero_point, grad_outputs=many_shifts, is_grads_batched=True)[0]
        for one, upstream in zip(together, many_shifts, strict=True):
            torch.testing.assert_close(one, grads(q.zero_point, grad_outputs=upstream)[0])
    found = {}
    for kernels in ("auto", "fused"):
        with qframework.settings.use(kernels=kernels):
            q = layer.quant_weight()
            loss = q.scale.sum() + (q.value * many[0]).sum()  # an expanded gradient of the scale
            found[kernels] = torch.autograd.grad(loss, layer.weight)[0]
    torch.testing.assert_close(found["auto"], found["fused"], rtol=1e-5, atol=1e-5)


def test_activations_take_several_gradients_at_once_and_those_of_learned_scales() -> None:
    layer = QuantReLU(collect_stats_steps=1, return_quant_tensor=True)
    x = torch.randn(5, 40)
    layer(x), layer(x)
    leaf = x.clone().requires_grad_()
    value, many = layer(leaf).value, torch.randn(3, 5, 40)
    grads = partial(torch.autograd.grad, inputs=leaf, retain_graph=True)
    together = grads(value, grad_outputs=many, is_grads_batched=True)[0]
    for one, upstream in zip(together, many, strict=True):
        torch.testing.assert_close(one, grads(value, grad_outputs=upstream)[0])
    found = {}
    for kernels in ("auto", "fused"):
        with qframework.settings.use(kernels=kernels):
            q = layer(leaf)
            loss = 7 * q.scale.sum() + (q.value * many[0]).sum()
            found[kernels] = torch.autograd.grad(loss, list(layer.parameters()))[0]
    torch.testing.assert_close(found["auto"], found["fused"], rtol=1e-5, atol=1e-5)


def test_scales_on_another_device_are_an_error_as_ever() -> None:
    with pytest.raises(RuntimeError):
        grid = IntegerGrid(-8.0, 7.0)
        fake_quantize(torch.randn(50), torch.ones((), device="meta"), None, grid).sum().item()


# ------------------------------------------------------------ calls that are laid out once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero", [None, 3.0])
def test_a_call_that_is_laid_out_once_gives_the_same_for_all_tensors_alike(dtype, zero) -> None:
    small = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(0.1, dtype=small)
    shift = None if zero is None else torch.tensor(zero, dtype=small)
    grid = IntegerGrid(0.0, 15.0)
    known = native.StaticQuantizer.for_values(torch.randn(50, dtype=dtype), scale, shift, grid)
    for shape in ((50,), (7, 9), (2, 3, 4, 5)):
        x = torch.randn(shape, dtype=dtype)
        for laid_out in (
            (x, x.contiguous(memory_format=torch.channels_last)) if x.dim() == 4 else (x,)
        ):
            for relu in (False, True):
                y = known(laid_out, relu)
                with qframework.settings.use(kernels="reference"):
                    assert torch.equal(y, fake_quantize(laid_out, scale, shift, grid, relu))
                assert y.stride() == laid_out.stride()
    before = known(x, False)
    scale.mul_(2)  # the numbers are copied
    assert torch.equal(known(x, False), before)


def test_a_call_that_is_laid_out_leaves_other_tensors_to_the_ordinary_functions(
    monkeypatch,
) -> None:
    scale, grid = torch.tensor(0.1), IntegerGrid(-8.0, 7.0)
    x = torch.randn(6, 10)
    known = native.StaticQuantizer.for_values(x, scale, None, grid)
    assert known(x, False) is not None
    for other in (x.double(), x[:, ::2], x.to("meta"), nn.Parameter(x)):
        assert known(other, False) is None
    monkeypatch.setattr(tensors, "SMALLEST", 61)
    assert known(x, False) is None
    of_channels = native.StaticQuantizer.for_values(x, torch.rand(6, 1), None, grid)
    assert of_channels is None
    dpu = IntegerGrid(-8.0, 7.0, "dpu")
    assert native.StaticQuantizer.for_values(torch.randn(100), scale, None, dpu) is None


# ------------------------------------------------------------ building

SCRIPT = """
import warnings, torch, qframework
from qframework.layers import QuantReLU
qframework.settings.kernels = "auto"
layer = QuantReLU(collect_stats_steps=1)
x = torch.randn({size})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer(x), layer(x)
print([type(w.message).__name__ for w in caught])
"""
LIBRARY = "from qframework.kernels.native.build import library; library()"
AVAILABLE = "from qframework.kernels.native import available as a; print(a(), a())"
LARGE, SMALL = 1 << 14, (1 << 8) - 1


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory) -> str:
    """A compiler that takes a third of the time, since it optimizes nothing."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def instant_compiler(tmp_path_factory, quick_compiler) -> str:
    """One that copies what it has once been made to compile, where only files and their places matter; it is called g++."""
    folder = tmp_path_factory.mktemp("instant")
    made = folder / "made.so"
    compilation.compile_library([quick_compiler], "DEFAULT", made)
    path = folder / "g++"
    path.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{made}" "$last"\n')
    path.chmod(0o755)
    return str(path)


def run(folder, script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"XDG_CACHE_HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
    )


def warnings_of(folder, size: int, **environment: str) -> str:
    return run(folder, SCRIPT.format(size=size), **environment).stdout.strip()


def libraries(folder) -> list:
    return sorted(folder.glob("qframework/*"))


@pytest.mark.slow
def test_they_are_built_once_when_a_large_tensor_comes(
    tmp_path, monkeypatch, instant_compiler
) -> None:
    first = os.path.dirname(instant_compiler)
    monkeypatch.setenv("PATH", first, prepend=os.pathsep)
    monkeypatch.delenv("CXX", raising=False)
    assert warnings_of(tmp_path, SMALL) == "[]"
    assert not libraries(tmp_path)
    assert warnings_of(tmp_path, LARGE) == "[]"
    (built,) = libraries(tmp_path)
    made = built.stat().st_mtime_ns
    assert warnings_of(tmp_path, LARGE, CXX="g++") == "[]"
    assert built.stat().st_mtime_ns == made
    assert libraries(tmp_path) == [built]


@pytest.mark.slow
def test_without_a_compiler_the_ordinary_functions_compute_and_it_is_said_once(tmp_path) -> None:
    assert warnings_of(tmp_path, LARGE, CXX="no-such-compiler") == "['RuntimeWarning']"
    said = run(tmp_path, f"{AVAILABLE}\n{LIBRARY}", CXX="no-such-compiler").stderr
    assert "RuntimeError: no C++ compiler was found" in said
    assert said.count("instead of 1.2") == 1 and "kernels = 'fused'" in said


@pytest.mark.slow
def test_a_compiler_of_several_words_works(tmp_path, instant_compiler) -> None:
    cached = tmp_path / "ccache"
    cached.write_text('#!/bin/sh\necho used >> "$0.log"\nexec "$@"\n')
    cached.chmod(0o755)
    assert warnings_of(tmp_path, LARGE, CXX=f"'{cached}' {instant_compiler} -DWORDS=2") == "[]"
    assert len(libraries(tmp_path)) == 1
    assert (tmp_path / "ccache.log").read_text() == "used\n"


@pytest.mark.slow
def test_a_compiler_that_fails_is_told(tmp_path) -> None:
    assert warnings_of(tmp_path, LARGE, CXX="false") == "['RuntimeWarning']"
    failed = run(tmp_path, LIBRARY, CXX="false")
    assert "RuntimeError: the C++ compiler failed" in failed.stderr
    assert not libraries(tmp_path)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_said_once_and_leaves_nothing(
    tmp_path, instant_compiler
) -> None:
    place, temporary = tmp_path / "file", tmp_path / "temporary"
    place.write_text("")
    temporary.mkdir()
    out = run(place, AVAILABLE, TMPDIR=str(temporary), CXX=instant_compiler)
    assert out.stdout == "True True\n"
    assert out.stderr.count("RuntimeWarning") == 1
    assert "can't be made (" in out.stderr and "XDG_CACHE_HOME" in out.stderr
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_two_processes_that_build_at_once_both_succeed(tmp_path, quick_compiler) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", AVAILABLE],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": quick_compiler},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [p.communicate()[0] for p in started] == ["True True\n"] * 2
    (built,) = libraries(tmp_path)
    assert compilation.is_whole(built)


@pytest.mark.slow
def test_a_library_that_is_not_the_one_that_was_built_is_built_anew(
    tmp_path, instant_compiler
) -> None:
    assert run(tmp_path, LIBRARY, CXX=instant_compiler).returncode == 0
    (built,) = libraries(tmp_path)
    whole = built.read_bytes()
    other = tmp_path / "kernels-0123456789abcdef.so"
    compilation.compile_library([instant_compiler], "DEFAULT", other)
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(whole)
    for wrong in (whole[:4096], other.read_bytes()):  # more of them below, without a compiler
        built.write_bytes(wrong)
        assert run(tmp_path, AVAILABLE, CXX=instant_compiler).stdout == "True True\n"
        assert compilation.is_whole(built)
    built.unlink()
    built.symlink_to(foreign)  # whole, and elsewhere
    assert run(tmp_path, LIBRARY, CXX=instant_compiler).returncode == 0
    assert not built.is_symlink() and compilation.is_whole(built)


def test_half_a_library_and_one_of_another_name_are_told_from_a_whole_one(tmp_path) -> None:
    path = tmp_path / "kernels.so"
    assert not compilation.is_whole(path)
    content = b"library" * 100
    path.write_bytes(content + hashlib.sha256(b"kernels.so" + content).digest())
    assert compilation.is_whole(path)
    whole = path.read_bytes()
    for keep in (0, 32, 100, len(whole) - 1):
        path.write_bytes(whole[:keep])
        assert not compilation.is_whole(path)
    other = tmp_path / "other.so"
    other.write_bytes(whole)
    assert not compilation.is_whole(other)


def test_the_cache_is_the_users_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    folder = build.cache_folder()
    assert build._make_own(folder) == ""
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # of an older release
    assert build._make_own(folder) == ""
    assert folder.stat().st_mode & 0o777 == 0o700 and build._is_trusted(folder)


def test_what_others_can_write_or_own_is_not_loaded(tmp_path, monkeypatch) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(b"")
    path.chmod(0o644)
    assert build._is_trusted(path)
    for mode in (0o664, 0o646):
        path.chmod(mode)
        assert not build._is_trusted(path)
    path.chmod(0o600)
    link = tmp_path / "link.so"
    link.symlink_to(path)
    assert not build._is_trusted(link) and not build._is_trusted(tmp_path / "absent")
    real = os.geteuid()
    if real == 0:
        os.chown(path, 12345, 12345)
        os.chown(tmp_path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    assert not build._is_trusted(path) and not build._is_trusted(tmp_path)
    assert build._make_own(tmp_path) == "belongs to another user"


def test_a_library_that_came_with_the_package_is_used(
    tmp_path, monkeypatch, instant_compiler
) -> None:
    own = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    find = build.prebuilt.__wrapped__
    assert find() is None
    less = tmp_path / compilation.library_name("DEFAULT")
    compilation.compile_library([instant_compiler], "DEFAULT", less)
    assert find() == (less if own == "DEFAULT" else None)  # a better one can be built
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert find() == less
    mine = tmp_path / compilation.library_name(own)
    compilation.compile_library([instant_compiler], own, mine)
    assert find() == mine
    assert build._loaded(mine).qframework_run
    mine.write_bytes(mine.read_bytes()[:-1])
    assert find() == (less if own != "DEFAULT" else None)


def test_values_that_begin_within_a_tensor_and_shared_ones_are_read_where_they_are() -> None:
    whole = torch.randn(5, 4096)
    for x in (whole, whole[2], whole[1:4]):
        assert tensors.address_to_read(x) == x.data_ptr()
    shared = torch._lazy_clone(whole)
    assert tensors.address_to_read(shared[3]) == tensors.address_to_read(whole[3])
