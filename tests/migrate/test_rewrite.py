"""Every form that an import, or a use of an imported module, takes."""

import textwrap

import libcst
import pytest

from qframework.migrate import migrate

FORMS = {
    "a module": (
        "import brevitas.nn\nlayer = brevitas.nn.QuantLinear(1, 2)\n",
        "import qframework.layers\nlayer = qframework.layers.QuantLinear(1, 2)\n",
    ),
    "a module by another name": (
        "import brevitas.nn as qnn\nlayer = qnn.QuantLinear(1, 2)\n",
        "import qframework.layers as qnn\nlayer = qnn.QuantLinear(1, 2)\n",
    ),
    "several modules": (
        "import os, brevitas.nn as qnn, sys\n",
        "import os\nimport qframework.layers as qnn\nimport sys\n",
    ),
    "the package": (
        "import brevitas as b\nimport brevitas.quant\nq = b.quant.Int8Bias\n",
        "import qframework as b\nimport qframework.quantizers\nq = qframework.quantizers.Int8Bias\n",
    ),
    "a module from its package": (
        "from brevitas import nn\nfrom brevitas.core import restrict_val as rv\nnn.QuantReLU()\n",
        "from qframework import layers as nn\nfrom qframework.core import restrict_val as rv\nnn.QuantReLU()\n",
    ),
    "names": (
        "from brevitas.nn import QuantConv2d as Conv, QuantReLU  # layers\n",
        "from qframework.layers import QuantConv2d as Conv, QuantReLU  # layers\n",
    ),
    "names over several lines": (
        "from brevitas.quant import (\n    Int8Bias,  # of the last layer\n    Int32Bias,\n)\n",
        "from qframework.quantizers import (\n    Int8Bias,  # of the last layer\n    Int32Bias,\n)\n",
    ),
    "names behind a backslash": (
        "from brevitas.nn import QuantConv2d, \\\n    QuantReLU\n",
        "from qframework.layers import QuantConv2d, \\\n    QuantReLU\n",
    ),
    "names that part": (
        "from brevitas.core.scaling import ConstScaling, ScalingImplType as S, TruncMsbScaling\n",
        """\
        from qframework.core.scaling import ConstScaling
        from qframework.inject.enum import ScalingImplType as S
        from qframework.core.trunc import TruncMsbScaling
        """,
    ),
    "a name that is called otherwise": (
        "from brevitas.nn import QuantAvgPool2d\nimport brevitas.nn as qnn\nqnn.QuantAvgPool2d(2)\n",
        "from qframework.layers import TruncAvgPool2d as QuantAvgPool2d\nimport qframework.layers as qnn\nqnn.TruncAvgPool2d(2)\n",
    ),
    "an attribute that is elsewhere": (
        "import brevitas.core.stats as stats\nop = stats.StatsOp.MAX, stats.AbsMax\n",
        "import qframework.core.stats as stats\nimport qframework.inject.enum\nop = qframework.inject.enum.StatsOp.MAX, stats.AbsMax\n",
    ),
    "a star": ("from brevitas.nn import *\n", "from qframework.layers import *\n"),
    "a star with names that are elsewhere": (
        "from brevitas.core.restrict_val import *\nr = RestrictValueType.FP\n",
        "from qframework.core.restrict_val import *\nfrom qframework.inject.enum import RestrictValueType\nr = RestrictValueType.FP\n",
    ),
    "in a function and in try": (
        """\
        def build():
            try:
                from brevitas.nn import QuantReLU
            except ImportError: import torch; QuantReLU = None
            with x: import brevitas.nn as q; q.QuantReLU()
        """,
        """\
        def build():
            try:
                from qframework.layers import QuantReLU
            except ImportError: import torch; QuantReLU = None
            with x: import qframework.layers as q; q.QuantReLU()
        """,
    ),
    "on a line with others": (
        "import torch; from brevitas.nn import QuantReLU; QuantReLU()\n",
        "import torch\nfrom qframework.layers import QuantReLU\nQuantReLU()\n",
    ),
    "for type checkers": (
        "if TYPE_CHECKING:\n\tfrom brevitas.quant_tensor import IntQuantTensor\n",
        "if TYPE_CHECKING:\n\tfrom qframework.quant_tensor import IntQuantTensor\n",
    ),
    "injection": (
        "from dependencies import value, this\nfrom brevitas.inject import ExtendedInjector\n",
        "from qframework.inject import value, this\nfrom qframework.inject import ExtendedInjector\n",
    ),
    "decorators and bases that aren't needed": (
        """\
        import brevitas.jit
        class Part(brevitas.jit.ScriptModule):
            @brevitas.jit.script_method
            @other
            def forward(self, x): ...
        """,
        """\
        # qframework.migrate: brevitas.jit: no module takes its place
        import torch.nn
        class Part(torch.nn.Module):
            @other
            def forward(self, x): ...
        """,
    ),
    "names for annotations": (
        "from brevitas.nn.quant_layer import WeightQuantType, QuantWBIOL\n",
        "from qframework.proxy import WeightQuantType\nfrom qframework.layers import QuantWBIOL\n",
    ),
    "settings": (
        "from brevitas import config\nconfig.VERBOSE = True\nif config.JIT_ENABLED: f()\n",
        """\
        # qframework.migrate: brevitas.config: no module takes its place
        # qframework.migrate: brevitas.config.VERBOSE: qframework.settings.verbose shows how quantizers run
        if False: f()
        """,
    ),
    "nothing left in a block": (
        "def f():\n    import brevitas.config\n\n\ndef g(): import brevitas.config\n",
        "def f():\n    # qframework.migrate: brevitas.config: no module takes its place\n    pass\n\n\ndef g(): pass\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_an_import_becomes_one_that_binds_the_same_names(form) -> None:
    before, after = map(textwrap.dedent, FORMS[form])
    made = migrate(before)
    assert made.after == after
    compile(made.after, form, "exec")


@pytest.mark.parametrize("form", FORMS)
def test_what_was_made_stays_as_it_is(form) -> None:
    made = migrate(migrate(textwrap.dedent(FORMS[form][0])).after)
    assert made.after == made.before
    assert not made.remarks


@pytest.mark.parametrize(
    "text",
    [
        "",
        "import torch\nprint('brevitas.nn')\n",
        "print 1  # of an older Python\n",
        "from dependencies import value\n",
        "from .brevitas import nn\nfrom . import brevitas\n",
        "import brevitas_of_mine\nbrevitas = brevitas_of_mine.nn\nbrevitas.nn.QuantReLU\n",
    ],
)
def test_programs_without_it_stay_as_they_are(text) -> None:
    made = migrate(text)
    assert made.after == text and made.remarks == ()


def test_a_name_that_means_something_else_stays() -> None:
    text = """\
    from brevitas import config
    import brevitas.nn as qnn
    def f(config, qnn=1):
        config.VERBOSE = qnn.QuantAvgPool2d
        g(config=2, qnn=3).config.VERBOSE
    """
    made = migrate(textwrap.dedent(text))
    assert made.after.splitlines()[2:] == textwrap.dedent(text).splitlines()[2:]


def test_line_ends_and_indents_stay() -> None:
    made = migrate("if x:\r\n\timport brevitas.nn as a, brevitas.quant as b\r\n")
    assert (
        made.after
        == "if x:\r\n\timport qframework.layers as a\r\n\timport qframework.quantizers as b\r\n"
    )


def test_strings_stay_and_are_told_of() -> None:
    made = migrate(
        "import brevitas\nm = importlib.import_module('brevitas.nn')\nn = 'see brevitas'\n"
    )
    assert "'brevitas.nn'" in made.after
    assert [(r.line, r.name, r.kind) for r in made.remarks] == [(2, "'brevitas.nn'", "a string")]


def test_environment_variables_are_told_of() -> None:
    made = migrate("import os, brevitas\nos.environ['BREVITAS_JIT'] = '1'\n")
    assert [(r.line, r.name) for r in made.remarks] == [(2, "'BREVITAS_JIT'")]


def test_what_isnt_here_is_told_with_its_lines_and_what_to_do() -> None:
    text = """\
    import torch
    from brevitas.export import enable_debug
    from brevitas.graph.permute import rotate_permute_mode as mode
    import brevitas.nn as qnn
    with mode(model):
        qnn.EqualizedModule(a, b)
    enable_debug(model, qnn.QuantNothing)
    """
    made = migrate(textwrap.dedent(text))
    told = [(r.line, r.name.rpartition(".")[2], r.kind) for r in made.remarks]
    assert told == [
        (2, "enable_debug", "not here yet"),
        (3, "rotate_permute_mode", "not here yet"),
        (5, "rotate_permute_mode", "not here yet"),
        (6, "EqualizedModule", "not here yet"),
        (7, "enable_debug", "not here yet"),
        (7, "QuantNothing", "unknown name"),
    ]
    assert all(r.advice for r in made.remarks)
    assert "import brevitas" not in made.after.replace("# ", "")


def test_a_difference_is_told_where_the_name_is_imported() -> None:
    made = migrate("import os\nfrom brevitas.function.ops_ste import tensor_clamp_ste_\n")
    assert [(r.line, r.kind) for r in made.remarks] == [(2, "works, with a difference")]
    assert (
        made.after
        == "import os\nfrom qframework.functional import tensor_clamp_ste as tensor_clamp_ste_\n"
    )


def test_a_module_as_a_value_is_told_of() -> None:
    made = migrate("import brevitas.nn as qnn\nlayer = getattr(qnn, name)\n")
    assert [(r.line, r.kind) for r in made.remarks] == [(2, "a module as a value")]


def test_comments_of_split_imports_are_kept() -> None:
    made = migrate(
        "# enums\nfrom brevitas.core.quant import (\n    QuantType,  # formats\n    IntQuant,\n)\n"
    )
    assert made.after == (
        "# enums\n# formats\nfrom qframework.inject.enum import QuantType\nfrom qframework.core.quant import IntQuant\n"
    )


def test_long_imports_go_over_several_lines() -> None:
    made = migrate(
        "def f():\n    from brevitas.core.function_wrapper import RoundSte, LearnedRoundSte, LearnedRoundSigmoid, LearnedRoundIdentity\n"
    )
    lines = made.after.splitlines()
    assert lines[2] == "    from qframework.core.learned_round import ("
    assert max(map(len, lines)) < 89
    compile(made.after, "long", "exec")


def test_a_text_that_isnt_python_is_refused() -> None:
    with pytest.raises(libcst.ParserSyntaxError):
        migrate("import brevitas.nn as\n")


def test_programs_that_came_along_stay_imported_and_are_told_of() -> None:
    text = """\
    from brevitas_examples.bnn_pynq.models import model_with_cfg
    import brevitas_examples.common as common
    from brevitas_examples.common.generative.quantizers import Int8DynamicActPerRowFloat
    model_with_cfg(common.name)
    """
    made = migrate(textwrap.dedent(text))
    assert made.after.splitlines() == [
        "from brevitas_examples.bnn_pynq.models import model_with_cfg",
        "import brevitas_examples.common as common",
        "from qframework.quantizers import Int8DynamicActPerRowFloat",
        "model_with_cfg(common.name)",
    ]
    assert [(r.line, r.kind) for r in made.remarks] == [
        (1, "no counterpart"),
        (2, "no counterpart"),
    ]
