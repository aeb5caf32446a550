"""Recipes carried out block by block, on models with and without weights."""

import warnings
import zlib

import pytest
import torch
from torch import nn

from qframework.graph import in_place, ptq, quantize_model
from qframework.graph.block_plan import Unplannable, plan_blocks
from qframework.graph.gptq import gptq, gptq_mode
from qframework.graph.qronos import qronos
from tests.graph.block_network import batches, blocks
from tests.graph.live_bytes import LiveBytes, size_of

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model left layers")

KEYWORDS = {
    "weight_quant": "Int8WeightPerChannelFloat",
    "weight_bit_width": 4,
    "input_quant": "Int8ActPerTensorFloat",
    "act_quant": None,
}


def recipe(*steps) -> dict:
    made = [{"step": s} if isinstance(s, str) else s for s in ("quantize", "calibrate", *steps)]
    rules = [{"match": "embedding", "keep_float": True}]
    return {"layers": {"keywords": KEYWORDS, "rules": rules}, "steps": made}


ADAROUND = {"step": "learned_round", "steps": 16}
IN_BLOCKS = {"step": "learned_round", "steps": 8, "blocks": ["layers.0", "layers.1", "layers.2", "head"], "batch_size": 4}  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(a(**x)["y"], b(**x)["y"]) for x in batches())


@pytest.mark.parametrize("step", ["gptq", "gpfq", "qronos", ADAROUND, "bias_correction"])
def test_block_by_block_the_bits_are_those_of_the_whole_model(step) -> None:
    net = blocks()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    net.train()
    whole, one = ptq(net, batches(), recipe(step))
    parts, other = ptq(net, batches(), recipe(step), by_block=True)
    assert same(whole, parts)
    assert other.sqnr == pytest.approx(one.sqnr)
    assert {x.name: x.sqnr for x in other.layers} == pytest.approx({x.name: x.sqnr for x in one.layers}, rel=1e-3)  # fmt: skip
    assert [set(s.changed) for s in other.steps] == [set(s.changed) for s in one.steps]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("form", ["mapping", "function", "file"])
def test_weights_are_read_when_their_block_has_its_turn(form, tmp_path) -> None:
    net = blocks()
    state = net.state_dict()
    read = []

    def tensor(name: str) -> torch.Tensor:
        read.append(name)
        return state[name]

    given = state if form == "mapping" else tensor
    if form == "file":
        save_file = pytest.importorskip("safetensors.torch").save_file
        given = tmp_path / "net.safetensors"
        save_file(state, given)
    with torch.device("meta"):
        empty = blocks()
    model, report = ptq(
        empty, batches(), recipe("gptq"), weights=given, offload=tmp_path / "activations"
    )
    whole, _ = ptq(net, batches(), recipe("gptq"))
    assert same(whole, model)
    assert report.sqnr > 10
    assert all(p.is_meta for p in empty.parameters())
    assert not list((tmp_path / "activations").iterdir())
    if form == "function":
        assert sorted(read) == sorted(state)


def test_weights_that_are_missing_or_of_another_shape_are_named() -> None:
    with torch.device("meta"):
        empty = blocks()
    state = blocks().state_dict()
    del state["layers.1.up.weight"]
    with pytest.raises(ValueError, match=r"there is no 'layers\.1\.up\.weight'"):
        ptq(empty, batches(), recipe("gptq"), weights=state)
    with pytest.raises(ValueError, match=r"'place' is \(6, 8\), the model's \(6, 16\)"):
        ptq(empty, batches(), recipe("gptq"), weights=blocks(8).state_dict())
    with pytest.raises(ValueError, match="'equalize' needs the weights"):
        ptq(empty, batches(), {"steps": [{"step": "equalize"}, {"step": "quantize"}]}, weights={})


@pytest.mark.parametrize("step", ["gptq", IN_BLOCKS], ids=["gptq", "blocks"])
@pytest.mark.parametrize("by_block", [False, True])
def test_interrupted_work_goes_on_with_the_same_bits(step, by_block, tmp_path, monkeypatch) -> None:
    from qframework.graph.layer_store import LayerStore

    whole, _ = ptq(blocks(), batches(), recipe(step), by_block=by_block)
    real, saved = LayerStore.save, []

    def interrupted(self, name, *rest) -> None:
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(name)
        real(self, name, *rest)

    monkeypatch.setattr(LayerStore, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ptq(blocks(), batches(), recipe(step), by_block=by_block, resume=tmp_path)
    monkeypatch.undo()
    model, _ = ptq(blocks(), batches(), recipe(step), by_block=by_block, resume=tmp_path)
    assert same(whole, model)


@pytest.mark.parametrize(
    ("step", "matrices"),  # that there are for each layer: of its inputs, of both streams of them
    [({"step": "gptq", "act_order": True}, 1), ({"step": "gpfq"}, 2), ({"step": "qronos", "act_order": True}, 2)],
    ids=["gptq in order", "gpfq", "qronos in order"],
)  # fmt: skip
def test_memory_is_that_of_one_block_its_hessians_and_activations_of_two(
    step, matrices, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(in_place, "_BLOCK", 32)  # in proportion to so small a network
    monkeypatch.setattr(in_place, "_STRIP", 2**11)
    width, count, size = 96, 2, 4
    state = blocks(width, count).state_dict()
    with torch.device("meta"):
        empty = blocks(width, count)
    data = batches(2, size)
    with LiveBytes() as live, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ptq(empty, data, recipe(step), weights=state, offload=tmp_path)
    block = size_of(t for n, t in state.items() if n.startswith("layers.0."))
    hessians = 4 * matrices * (2 * width**2 + (2 * width) ** 2)
    activations = 4 * len(data) * size * 6 * 9 * width  # of all layers of a block
    assert live.peak <= block + hessians + 2 * activations
    assert live.now < 1000  # the finished blocks are in files


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.layers[1](self.layers[0](self.layers[0](x)))


def tied() -> nn.Module:
    net = blocks()
    net.head = nn.Linear(16, 20)
    net.head.weight = net.embedding.weight
    return net.eval()


@pytest.mark.filterwarnings("ignore:quantize_model. the float weights of these layers")
@pytest.mark.parametrize(
    ("step", "source"),
    [("gptq", "the model"), ("gptq", "a state dict"), ("gptq", "one name"), (IN_BLOCKS, "one name")],
    ids=["gptq", "state dict", "one name", "blocks"],
)  # fmt: skip
def test_weights_that_several_blocks_hold_stay_tied_and_are_named(step, source) -> None:
    net = tied()
    with pytest.warns(UserWarning, match=r"head: its weight is embedding\.weight too"):
        whole, _ = ptq(net, batches(), recipe("gptq"))
    kept, given = net, {}
    if source != "the model":
        state = {n: t for n, t in net.state_dict().items() if (n, source) != ("embedding.weight", "one name")}  # fmt: skip
        with torch.device("meta"):
            kept = blocks()
            kept.head = nn.Linear(16, 20)
        kept.head.weight = kept.embedding.weight
        given = {"weights": state}
    with pytest.warns(UserWarning, match=r"head: its weight is embedding\.weight too"):
        model, report = ptq(kept.eval(), batches(), recipe(step), by_block=True, **given)
    assert model.head.weight is model.embedding.weight
    skipped = report.steps[-1].skipped
    assert skipped["head"] == "its weight is embedding.weight too"
    assert set(skipped) <= {"head", "layers.0", "layers.1", "layers.2"}  # blocks are kept as wholes
    if step == "gptq":
        assert same(whole, model)


def test_a_block_that_is_called_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0 is called several times"):
        ptq(Twice().eval(), [torch.randn(8, 4)], {"steps": [{"step": "quantize"}]}, by_block=True)


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        a = self.layers[0](x)
        b = self.layers[1](a)
        c = self.layers[2](b)
        if c.sum() > -1e9:
            return self.layers[3](c + a).relu() + b
        return c


def test_a_plan_knows_which_results_are_needed_where() -> None:
    plan = plan_blocks(Skips().eval(), lambda m: m(torch.randn(2, 4)))
    assert [u.name for u in plan.units] == [f"layers.{i}" for i in range(4)]
    assert [u.needs for u in plan.units] == [set(), {0}, {1}, {0, 2}]
    assert plan.at_end == {1, 2, 3}
    with pytest.raises(Unplannable, match="several times"):
        plan_blocks(Twice().eval(), lambda m: m(torch.randn(2, 4)))


@pytest.mark.parametrize("make", [blocks, lambda: Skips().eval()], ids=["blocks", "skips"])
@pytest.mark.parametrize("algorithm", [gptq, qronos])
def test_models_that_cannot_be_traced_are_solved_as_in_the_loop(make, algorithm) -> None:
    torch.manual_seed(0)
    net = make()
    data = batches() if hasattr(net, "embedding") else [(torch.randn(16, 4),) for _ in range(2)]
    models = []
    for _ in range(2):
        model, _ = quantize_model(net, weight_bit_width=4, act_quant=None, input_quant=None)
        models.append(model.eval())
    algorithm(models[0], data)
    from qframework.graph.gpfq import gpfq_mode
    from qframework.graph.qronos import Qronos

    mode = gptq_mode if algorithm is gptq else lambda m: gpfq_mode(m, algorithm_impl=Qronos)
    with mode(models[1]) as run:
        for _ in range(run.num_layers):
            for batch in data:
                run.model(**batch) if isinstance(batch, dict) else run.model(*batch)
            run.update()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_learned_rounding_by_block_draws_by_the_block_s_name() -> None:
    assert zlib.crc32(b"layers.0") != zlib.crc32(b"layers.1")
    a, _ = ptq(blocks(), batches(), recipe(IN_BLOCKS), by_block=True)
    b, _ = ptq(blocks(), batches(), recipe(IN_BLOCKS), by_block=True)
    assert same(a, b)
