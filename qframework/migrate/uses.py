"""Where a program uses what it imports from the reference, and what has to stand there instead."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import libcst as cst
from libcst.metadata import (
    ParentNodeProvider,
    PositionProvider,
    QualifiedName,
    QualifiedNameProvider,
    QualifiedNameSource,
)

from qframework.migrate.report import Remark
from qframework.migrate.table import Entry, Table

#: Packages whose imports are rewritten; ``dependencies`` only beside one of the others.
PACKAGES = ("brevitas", "brevitas_examples")
INJECTION = "dependencies"
#: Programs rather than a library: an import of theirs that nothing takes the place of stays.
PROGRAMS = "brevitas_examples"


def is_within(dotted: str, packages: Collection[str]) -> bool:
    """Whether a dotted name is one of the packages, or in it."""
    return dotted.partition(".")[0] in packages


def dotted_name(node: cst.BaseExpression | None) -> str:
    """``a.b.c`` of a chain of attributes, '' for another expression."""
    parts: list[str] = []
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    if not isinstance(node, cst.Name):
        return ""
    return ".".join([node.value, *reversed(parts)])


@dataclass
class Plan:
    """What has to change outside of import statements.

    Attributes:
        replaced: expressions, by the node in whose place they stand.
        removed: statements and decorators that go, with what is said about each.
        modules: for each name that a module is bound to, those that have to be imported beside it.
        used: every name that occurs.
        remarks: what needs a look.
    """

    replaced: dict[cst.CSTNode, cst.BaseExpression] = field(default_factory=dict)
    removed: dict[cst.CSTNode, Entry] = field(default_factory=dict)
    modules: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    used: set[str] = field(default_factory=set)
    remarks: list[Remark] = field(default_factory=list)


class UseCollector(cst.CSTVisitor):
    """Makes the :class:`Plan` of a program.

    Args:
        table: of names.
        packages: whose names are rewritten.
    """

    METADATA_DEPENDENCIES = (ParentNodeProvider, PositionProvider, QualifiedNameProvider)

    def __init__(self, table: Table, packages: Collection[str]) -> None:
        super().__init__()
        self.table, self.packages, self.plan = table, packages, Plan()

    def visit_Import(self, node: cst.Import) -> bool:
        """Imports are rewritten by themselves."""
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        """Imports are rewritten by themselves."""
        return False

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        """Names of modules in strings stay, and are told of."""
        text = node.evaluated_value
        if isinstance(text, str) and re.fullmatch(r"BREVITAS_[A-Z_]+", text):
            how = "an environment variable of the reference, which nothing reads; see qframework.settings"
            self.plan.remarks.append(Remark(self._line(node), repr(text), "a string", how))
        if isinstance(text, str) and re.fullmatch(r"brevitas(_examples)?(\.\w+)*", text):
            self.plan.remarks.append(
                Remark(
                    self._line(node),
                    repr(text),
                    "a string",
                    "left as it is; change it by hand if it is imported",
                )
            )

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        """A chain of attributes: of its base, or of another expression."""
        base: cst.BaseExpression = node
        chain: list[cst.Attribute] = []
        while isinstance(base, cst.Attribute):
            chain.append(base)
            self.plan.used.add(base.attr.value)
            base = base.value
        if not isinstance(base, cst.Name):
            base.visit(self)
            return False
        self._use(base, list(reversed(chain)))
        return False

    def visit_Name(self, node: cst.Name) -> None:
        """A name that stands alone."""
        parent = self.get_metadata(ParentNodeProvider, node)
        names_another = (
            (isinstance(parent, cst.Arg) and parent.keyword is node)
            or (
                isinstance(parent, cst.Param | cst.FunctionDef | cst.ClassDef)
                and parent.name is node
            )
            or (isinstance(parent, cst.MatchKeywordElement) and parent.key is node)
        )
        if not names_another:
            self._use(node, [])

    def _line(self, node: cst.CSTNode) -> int:
        return int(self.get_metadata(PositionProvider, node).start.line)

    def _imported_as(self, base: cst.Name) -> str:
        found = self.get_metadata(QualifiedNameProvider, base, set())
        names = found() if callable(found) else found
        ours = sorted(
            q.name
            for q in names
            if isinstance(q, QualifiedName)
            and q.source is QualifiedNameSource.IMPORT
            and is_within(q.name, self.packages)
        )
        return ours[0] if ours else ""

    def _use(self, base: cst.Name, chain: list[cst.Attribute]) -> None:
        self.plan.used.add(base.value)
        path = self._imported_as(base)
        if not path or (is_within(path, (PROGRAMS,)) and self.table.module_for(path) is None):
            return
        module, bound_to_module = path, self._names_module(path)
        node: cst.BaseExpression = base
        while self._names_module(path) and chain:
            node = chain.pop(0)
            assert isinstance(node, cst.Attribute)
            path = f"{path}.{node.attr.value}"
        if self._names_module(path):
            self._use_of_module(base, node, path)
            return
        entry = self.table.find(path)
        if entry is None or entry.kind in ("later", "none"):
            self.plan.remarks.append(Remark.of(self._line(node), path, entry))
        elif entry.kind == "dropped":
            self._drop(node, path, entry)
        elif bound_to_module:
            self._point_at(base, node, module, entry)

    def _names_module(self, path: str) -> bool:
        return self.table.exact(path) is None and self.table.is_module(path)

    def _use_of_module(self, base: cst.Name, node: cst.BaseExpression, path: str) -> None:
        target = self.table.module_for(path)
        if target is None:
            self.plan.remarks.append(
                Remark(self._line(node), path, "no counterpart", "a module of the reference")
            )
            return
        parent = self.get_metadata(ParentNodeProvider, node)
        if not isinstance(parent, cst.Attribute | cst.Comparison | cst.AssignTarget | cst.Del):
            how = f"names that are taken from it elsewhere, by getattr, say, are looked for in {target}"
            self.plan.remarks.append(Remark(self._line(node), path, "a module as a value", how))
        if node is not base or base.value in self.packages:
            self.plan.replaced[node] = cst.parse_expression(target)
            self.plan.modules[base.value].add(target)

    def _point_at(
        self, base: cst.Name, node: cst.BaseExpression, module: str, entry: Entry
    ) -> None:
        """An attribute of a module becomes that of the module in its place, or a full name."""
        assert isinstance(node, cst.Attribute)
        if entry.advice:
            self.plan.remarks.append(Remark.of(self._line(node), entry.source, entry))
        by_alias = base.value not in self.packages and node.value is base
        if by_alias and self.table.module_for(module) == entry.target_module:
            if entry.target_name != node.attr.value:
                self.plan.replaced[node] = node.with_changes(attr=cst.Name(entry.target_name))
            return
        self.plan.replaced[node] = cst.parse_expression(entry.target or "")
        self.plan.modules[base.value].add(entry.target_module)

    def _drop(self, node: cst.BaseExpression, path: str, entry: Entry) -> None:
        parent = self.get_metadata(ParentNodeProvider, node)
        above = self.get_metadata(ParentNodeProvider, parent)
        if isinstance(parent, cst.Decorator):
            self.plan.removed[parent] = entry
        elif (
            isinstance(parent, cst.Call)
            and parent.func is node
            and isinstance(above, cst.Decorator | cst.Expr)
        ) or (
            isinstance(parent, cst.AssignTarget)
            and isinstance(above, cst.Assign)
            and len(above.targets) == 1
        ):
            self.plan.removed[above] = entry
        elif entry.value is not None:
            self.plan.replaced[node] = cst.parse_expression(entry.value)
        self.plan.remarks.append(Remark.of(self._line(node), path, entry))
