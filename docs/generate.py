"""Writes docs/policies.md from the policy model: python docs/generate.py."""

from pathlib import Path

from qframework.inject.enum import PolicyEnum
from qframework.inject.policy import SLOTS, Policy

PAGE = Path(__file__).parent / "policies.md"


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


if __name__ == "__main__":
    PAGE.write_text(policies())
