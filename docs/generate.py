"""Writes docs/policies.md, docs/catalogue.md and the table of docs/migration.md: python docs/generate.py."""

from pathlib import Path

from qframework import quantizers
from qframework.core.codebook import CodebookQuant
from qframework.inject.enum import PolicyEnum
from qframework.inject.expressions import This, Value, arguments_of
from qframework.inject.policy import SLOTS, Policy
from qframework.inject.resolver import Resolver
from qframework.migrate.table import Section, table
from qframework.quantizers import QuantSolver

PAGE = Path(__file__).parent / "policies.md"
CATALOGUE = Path(__file__).parent / "catalogue.md"
MIGRATION = Path(__file__).parent / "migration.md"
_TABLE = "## The table"
ROLES = {"Weight": "weight", "Bias": "bias", "Act": "activation", "Trunc": "accumulator"}


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
    ]
    rows: dict[str, list[str]] = {role: [] for role in ROLES.values()}
    for name in quantizers.__all__:
        cls = getattr(quantizers, name)
        if issubclass(cls, QuantSolver) and not name.endswith("Solver"):
            role, row = _row(name, cls)
            rows[role].append(row)
    for role, found in rows.items():
        lines += [
            f"## {role.capitalize()}",
            "",
            "| quantizer | format | granularity | scale | zero point | what it is |",
            "|---|---|---|---|---|---|",
            *found,
            "",
        ]
    return "\n".join(lines[:-1]) + "\n"


def _row(name: str, cls: type) -> tuple[str, str]:
    names = Resolver(cls)
    proxy = names.read("proxy_class").__name__
    role = next(r for part, r in ROLES.items() if part in proxy)
    kind = names.read("quant_type").value
    about = " ".join((cls.__doc__ or "").split()).replace("|", "\\|")
    if kind == "fp":
        return role, f"| `{name}` | float | | | | {about} |"
    bits = names.read("bit_width", "?")
    signed = role == "accumulator" or names.read("signed", True)
    shown = kind if kind != "int" else f"{'' if signed else 'u'}int{bits}"
    if role == "accumulator":
        shown = f"int{bits}, sign of the input"
    elif kind == "int" and names.read("narrow_range", False):
        shown += " narrow"
    shown = _other_format(names, bits, signed) or shown
    granularity = names.read("scaling_per_output_type").value
    if granularity == "group":
        granularity = f"group of {names.read('group_size', '?')}"
    if names.read("scaling_per_row", False):
        granularity = "row"
    zero = names.find("zero_point_impl")
    built = names.find("tensor_quant")[0]
    if isinstance(built, type) and not {"zero_point_impl", "scaling_impl"} & _needs(built):
        return (
            role,
            f"| `{name}` | {shown} | {granularity} | {_scale(names, role)} | {built.__name__} | {about} |",
        )
    zero_point = "" if zero is None or zero[0].__name__ == "ZeroZeroPoint" else zero[0].__name__
    return role, (
        f"| `{name}` | {shown} | {granularity} | {_scale(names, role)} | {zero_point} | {about} |"
    )


def _other_format(names: Resolver, bits: object, signed: bool) -> str:
    """Minifloats and codebooks."""
    exponent, mantissa = (
        names.read("exponent_bit_width", None),
        names.read("mantissa_bit_width", None),
    )
    if names.find("float_clamp_impl") is not None:
        widths = f" e{exponent}m{mantissa}" if exponent else ""
        return f"{'' if signed else 'u'}fp{bits}{widths}"
    built = names.find("tensor_quant")
    if built is not None and built[0] is CodebookQuant:
        entries = names.read("codebook", None)
        return f"codebook of {len(entries) if entries else '?'}"
    return ""


def _needs(cls: type) -> set[str]:
    return {argument.name for argument in arguments_of(cls) or ()}


def _scale(names: Resolver, role: str) -> str:
    if role == "bias" and names.read("requires_input_scale"):
        return "input times weight"
    if role == "accumulator" and names.read("trunc_scaling_impl_type") == "msb":
        return "2^bits removed"
    tensor_quant = names.find("tensor_quant")[0]
    if isinstance(tensor_quant, type) and "scaling_impl" not in _needs(tensor_quant):
        return tensor_quant.__name__
    parts = [names.read("scaling_impl_type").value]
    statistic = names.find("scaling_stats_impl")[0]
    if parts[0] not in ("const", "parameter", "he"):
        if isinstance(statistic, This):
            parts.append("MSE")
        elif isinstance(statistic, Value):
            parts.append(names.read("scaling_stats_op").value)
        else:
            parts.append(statistic.__name__)
    domain = names.read("restrict_scaling_type").value
    return " ".join(parts + ([] if domain == "fp" else [domain]))


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
