"""The table of names: each target is there, and no name is looked up wrongly."""

import importlib

import pytest

from qframework import quantizers
from qframework.migrate import table

TABLE = table()
MOVED = [e for s in TABLE.sections for e in s.entries.values() if e.kind == "moved"]


def test_what_takes_the_place_of_a_name_can_be_imported() -> None:
    assert len(MOVED) > 400
    for entry in MOVED:
        module = importlib.import_module(entry.target_module)
        assert hasattr(module, entry.target_name), (entry.source, entry.target)


def test_what_takes_the_place_of_a_module_can_be_imported() -> None:
    for section in TABLE.sections:
        for module in (section.name, *section.also):
            target = TABLE.module_for(module)
            if target is not None:
                importlib.import_module(target)


def test_every_other_name_says_what_to_do() -> None:
    others = [e for s in TABLE.sections for e in s.entries.values() if e.kind != "moved"]
    assert len(others) > 100
    assert all(e.advice for e in others)


def test_a_name_of_two_modules_is_that_of_the_one_it_is_imported_from() -> None:
    mixin, module = (
        TABLE.find("brevitas.quant.IntQuant"),
        TABLE.find("brevitas.core.quant.IntQuant"),
    )
    assert mixin.target == "qframework.quantizers.IntQuant"
    assert module.target == "qframework.core.quant.IntQuant"
    assert TABLE.find("brevitas.core.unlisted.IntQuant").target == "qframework.core.quant.IntQuant"
    assert TABLE.find("brevitas.quant.unlisted.IntQuant").target == "qframework.quantizers.IntQuant"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("brevitas.nn.quant_linear.QuantLinear", "moved"),
        ("brevitas.nn.a_file_of_another_release.QuantLinear", "moved"),
        ("brevitas.core.bit_width.ScalingImplType", "moved"),
        ("brevitas.graph.gptq.gptq_mode", "moved"),
        ("brevitas.export.onnx.manager.AnyManager", "later"),
        ("brevitas.quant.solver.weight.SolveWeightTensorQuantFromEnum", "none"),
        ("brevitas.config.ANYTHING", "dropped"),
        ("brevitas_examples.bnn_pynq.models.model_with_cfg", "none"),
    ],
)
def test_names_are_found_where_users_import_them_from(name, kind) -> None:
    assert TABLE.find(name).kind == kind


def test_an_unknown_name_isnt_found() -> None:
    assert TABLE.find("brevitas.nn.QuantNothing") is None
    assert TABLE.find("brevitas.QuantNothing") is None


def test_star_imports_of_quantizers_give_what_the_table_says() -> None:
    names = TABLE.names_of("brevitas.quant")
    same = {n for n, e in names.items() if e.target == f"qframework.quantizers.{n}"}
    assert len(same) > 150
    assert same <= set(quantizers.__all__)
