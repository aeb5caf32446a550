"""Writes the pages that are made from the classes, and the index for language models: python docs/generate.py."""

import re
from importlib import import_module
from pathlib import Path

from qframework import quantizers
from qframework.command.catalogue import ROLES
from qframework.command.catalogue import catalogue as entries
from qframework.inject.enum import PolicyEnum
from qframework.inject.policy import SLOTS, Policy
from qframework.migrate.table import Section, table

DOCS = Path(__file__).parent
PAGE = DOCS / "policies.md"
CATALOGUE = DOCS / "catalogue.md"
MIGRATION = DOCS / "migration.md"
REFERENCE = DOCS / "api" / "quantizers.md"
LLMS = DOCS / "llms.txt"
_TABLE = "## The table"
TOCTREE = re.compile(
    r"```{toctree}\n:caption: ([^\n]+)\n:maxdepth: \d\n:hidden:\n\n(.*?)```", re.DOTALL
)


def policies() -> str:
    """The page, from the classes."""
    lines = [
        "# Policies",
        "",
        "What a quantizer can set, as a name of its class or, prefixed, as a keyword of a layer. The table is that of",
        "`qframework.inject.policy`, which checks every value.",
        "",
        "| name | default | meaning |",
        "|---|---|---|",
    ]
    for name, field in Policy.model_fields.items():
        default, kind = field.default, field.annotation
        shown = f"`{(default.value if isinstance(default, PolicyEnum) else default)!r}`"
        if field.is_required():
            shown = "to be bound"
        choices = ""
        if isinstance(kind, type) and issubclass(kind, PolicyEnum):
            choices = " One of " + ", ".join(f"`'{m.value}'`" for m in kind) + "."
        lines.append(f"| `{name}` | {shown} | {field.description}{choices} |")
    lines += [
        "",
        "## Slots",
        "",
        "Names that are bound to classes or modules. Binding one bypasses the table that its policy chooses from.",
        "",
        "| name | what it is |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in SLOTS.items()),
    ]
    return "\n".join(lines) + "\n"


def catalogue() -> str:
    """The page of all predefined quantizers, from the classes."""
    lines = [
        "# Predefined quantizers",
        "",
        "All of them, as they are without a keyword; `python docs/generate.py` writes this page from the classes. Widths,",
        "rounding, granularity and much else are names to bind anew ([policies](policies.md)). Formats: `int8`",
        "two's complement, `uint8` unsigned, `narrow` without the code that has no counterpart. `?` has to be given.",
        "",
        "```{raw} html",
        '<div id="catalogue-filter"></div>',
        "```",
        "",
    ]
    for role in ROLES.values():
        lines += [
            f"## {role.capitalize()}",
            "",
            "| quantizer | format | granularity | scale | zero point | what it is |",
            "|---|---|---|---|---|---|",
        ]
        for e in entries():
            if e.role == role:
                about = e.about.replace("|", "\\|")
                cells = (e.format, e.granularity, e.scale, e.zero_point, about)
                lines.append(f"| `{e.name}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def reference() -> str:
    """The page of the reference on quantizers, by the modules that hold them."""
    lines = [
        "# qframework.quantizers",
        "",
        "Import them from `qframework.quantizers`. [The catalogue](../catalogue.md) says what each is made of; building blocks and solvers",
        "are those that predefined quantizers derive from.",
        "",
    ]
    modules: dict[str, list[str]] = {}
    for name in quantizers.__all__:
        modules.setdefault(getattr(quantizers, name).__module__, []).append(name)
    for module, names in modules.items():
        about = (import_module(module).__doc__ or "").strip().splitlines()[0]
        lines += [f"## {module.rpartition('.')[2]}", "", about, "", "```{eval-rst}"]
        for name in names:
            lines += [f".. autoclass:: qframework.quantizers.{name}", ""]
        lines += ["```", ""]
    return "\n".join(lines[:-1]) + "\n"


def llms() -> str:
    """The index of the documentation for language models, see https://llmstxt.org."""
    index = (DOCS / "index.md").read_text()
    lines = [
        "# qframework",
        "",
        "> Quantization research in PyTorch: declarative quantizers, tensors that know their scale, zero point, bit width and sign, thin",
        "> layers, whole-model quantization, inspection, and exports that are proven to compute the same integers. Python 3.11 and torch 2.11",
        "> or later. Names, keywords and state dicts are those of Brevitas.",
        "",
        "Import layers from `qframework.layers`, quantizers from `qframework.quantizers`, work on whole models from `qframework.graph`,",
        "exports from `qframework.export`, looking at models from `qframework.inspect`. A wrong keyword is an error that names the right one.",
    ]
    for caption, pages in TOCTREE.findall(index):
        lines += ["", f"## {caption}", ""]
        for page in pages.split():
            title, about = _head(DOCS / f"{page}.md")
            lines.append(f"- [{title}]({page}.html): {about}")
    return "\n".join(lines) + "\n"


def _head(path: Path) -> tuple[str, str]:
    """Title and first sentence of a page."""
    text = path.read_text()
    if included := re.match(r"```{include} (\S+)", text):
        text = (path.parent / included[1]).read_text()
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    assert title is not None, path
    rest = re.sub(r"^```.*?^```|^    .*?$", "", text[title.end() :], flags=re.DOTALL | re.MULTILINE)
    plain = (p for p in rest.split("\n\n") if p.strip() and p.strip()[0] not in "#|:")
    first = " ".join(next(plain, "").split())
    first = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", first)
    return title[1], re.split(r"(?<=\.) ", first)[0]


def migration() -> str:
    """The page on programs of the reference library: its text as it is, and the table of names."""
    text = MIGRATION.read_text().partition(_TABLE)[0]
    lines = [
        _TABLE,
        "",
        "All names that are known, by the module that users import them from; `python docs/generate.py` writes it from",
        "`qframework/migrate/names.toml`. Names are found in the files inside of these modules, too.",
        "",
    ]
    for section in table().sections:
        lines += _section(section)
    return text + "\n".join(lines[:-1]) + "\n"


def _section(section: Section) -> list[str]:
    same = [
        e.name
        for e in section.entries.values()
        if e.target == f"{section.module}.{e.name}" and not e.advice
    ]
    others = [e for e in section.entries.values() if e.name not in same]
    lines = [f"### {section.name}", ""]
    if section.also:
        lines += ["Also: " + ", ".join(f"`{name}`" for name in section.also) + ".", ""]
    if same:
        names = ", ".join(f"`{name}`" for name in same)
        lines += [f"In `{section.module}`, under the same names: {names}.", ""]
    if others:
        lines += ["| name | here | to know |", "|---|---|---|"]
        for e in others:
            here = f"`{e.target}`" if e.target else _HERE[e.kind]
            lines.append(f"| `{e.name}` | {here} | {e.advice} |".replace("|  |", "| |"))
        lines.append("")
    return lines


_HERE = {"later": "not yet", "none": "no counterpart", "dropped": "not needed"}


if __name__ == "__main__":
    PAGE.write_text(policies())
    CATALOGUE.write_text(catalogue())
    MIGRATION.write_text(migration())
    REFERENCE.write_text(reference())
    LLMS.write_text(llms())
