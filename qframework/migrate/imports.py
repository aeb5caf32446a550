"""Import statements: each becomes those that bind the same names here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import libcst as cst

from qframework.migrate.report import Remark
from qframework.migrate.table import Entry, Table
from qframework.migrate.uses import PROGRAMS, Plan, dotted_name, is_within

Statement = cst.Import | cst.ImportFrom
_WIDTH = 88
#: What comments that are put into a program start with.
MARK = "qframework.migrate: "


@dataclass
class Rewritten:
    """What an import statement becomes.

    Attributes:
        statements: in its place, none if nothing is left.
        comments: on what was left out.
        remarks: what needs a look.
    """

    statements: list[cst.BaseSmallStatement] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)


class ImportRewriter:
    """Rewrites single import statements.

    Args:
        table: of names.
        packages: whose names are rewritten.
        plan: what the program uses.
    """

    def __init__(self, table: Table, packages: Collection[str], plan: Plan) -> None:
        self.table, self.packages, self.plan = table, packages, plan

    def rewrite(self, node: Statement, line: int) -> Rewritten | None:
        """What a statement becomes; None for one that stays.

        Args:
            node: the statement.
            line: where it stands.
        """
        if isinstance(node, cst.Import):
            if not any(is_within(dotted_name(a.name), self.packages) for a in node.names):
                return None
            return self._plain(node, line)
        module = dotted_name(node.module)
        if node.relative or not is_within(module, self.packages):
            return None
        if isinstance(node.names, cst.ImportStar):
            return self._star(module, line)
        return self._names(node, node.names, module, line)

    # ------------------------------------------------------------------ import a.b, import a.b as c

    def _plain(self, node: cst.Import, line: int) -> Rewritten:
        out = Rewritten()
        for alias in node.names:
            name = dotted_name(alias.name)
            if not is_within(name, self.packages):
                out.statements.append(
                    cst.Import([alias.with_changes(comma=cst.MaybeSentinel.DEFAULT)])
                )
                continue
            bound = _bound(alias) or name.partition(".")[0]
            target = self.table.module_for(name)
            if target is None and is_within(name, (PROGRAMS,)):
                out.remarks.append(Remark.of(line, name, self.table.find(name)))
                out.statements.append(_import(name, _bound(alias)))
            elif target is None:
                self._without_module(name, line, out)
            else:
                out.statements.append(_import(target, _bound(alias)))
            beside = self.plan.modules[bound] - ({target} if _bound(alias) is None else set())
            out.statements += [_import(m) for m in sorted(beside)]
        return out

    def _without_module(self, name: str, line: int, out: Rewritten) -> None:
        if not self.table.is_module(name):
            out.remarks.append(Remark.of(line, name, None))
        out.comments.append(f"{MARK}{name}: no module takes its place")

    # ------------------------------------------------------------------ from a import *

    def _star(self, module: str, line: int) -> Rewritten:
        out = Rewritten()
        target = self.table.module_for(module)
        if target is None and is_within(module, (PROGRAMS,)):
            out.remarks.append(Remark.of(line, module, self.table.find(module)))
            out.statements.append(_from(module, "*"))
        elif target is None:
            self._without_module(module, line, out)
        else:
            out.statements.append(_from(target, "*"))
        moved: dict[str, list[tuple[str, str]]] = {}
        for name, entry in self.table.names_of(module).items():
            if name not in self.plan.used:
                continue
            if entry.kind != "moved":
                self._left_out(f"{module}.{name}", entry, line, out)
            elif (entry.target_module, entry.target_name) != (target, name):
                moved.setdefault(entry.target_module, []).append((entry.target_name, name))
        out.statements += [_from_names(m, names) for m, names in moved.items()]
        return out

    # ------------------------------------------------------------------ from a import b as c

    def _names(
        self, node: cst.ImportFrom, aliases: Collection[cst.ImportAlias], module: str, line: int
    ) -> Rewritten:
        out = Rewritten()
        by_module: dict[str, list[tuple[str, str]]] = {}
        beside: set[str] = set()
        renamed = False
        for alias in aliases:
            name = str(alias.name.value)
            bound = _bound(alias) or name
            place = self._place(f"{module}.{name}", line, out)
            beside |= self.plan.modules[bound]
            if place is None:
                renamed = True
                continue
            where, called = place
            by_module.setdefault(where, []).append((called, bound))
            renamed |= called != name
        if len(by_module) == 1 and not renamed:
            (where,) = by_module
            out.statements.append(node.with_changes(module=cst.parse_expression(where)))
        else:
            out.comments += _comments(node)
            out.statements += [_from_names(m, names) for m, names in by_module.items()]
        out.statements += [_import(m) for m in sorted(beside)]
        return out

    def _place(self, full: str, line: int, out: Rewritten) -> tuple[str, str] | None:
        """Module and name of what takes the place of a name; None, and a comment, if nothing does."""
        entry = self.table.exact(full)
        if entry is None and self.table.is_module(full):
            target = self.table.module_for(full)
            if target is None:
                self._without_module(full, line, out)
                return None
            where, _, called = target.rpartition(".")
            return where, called
        entry = entry or self.table.find(full)
        if is_within(full, (PROGRAMS,)) and (entry is None or entry.kind != "moved"):
            out.remarks.append(Remark.of(line, full, entry))
            return full.rpartition(".")[0], full.rpartition(".")[2]
        if entry is None or entry.kind != "moved":
            self._left_out(full, entry, line, out)
            return None
        if entry.advice:
            out.remarks.append(Remark.of(line, full, entry))
        return entry.target_module, entry.target_name

    def _left_out(self, full: str, entry: Entry | None, line: int, out: Rewritten) -> None:
        remark = Remark.of(line, full, entry)
        out.remarks.append(remark)
        out.comments.append(f"{MARK}{full}: {remark.kind}: {remark.advice}")


def _bound(alias: cst.ImportAlias) -> str | None:
    """The name behind ``as``."""
    if alias.asname is None:
        return None
    assert isinstance(alias.asname.name, cst.Name)
    return alias.asname.name.value


def _small(code: str) -> cst.BaseSmallStatement:
    line = cst.parse_statement(code)
    assert isinstance(line, cst.SimpleStatementLine)
    return line.body[0]


def _import(module: str, bound: str | None = None) -> cst.BaseSmallStatement:
    return _small(f"import {module}" + (f" as {bound}" if bound else ""))


def _from(module: str, names: str) -> cst.BaseSmallStatement:
    return _small(f"from {module} import {names}")


def _from_names(module: str, names: list[tuple[str, str]]) -> cst.BaseSmallStatement:
    """One statement, of one line or with a line for each name."""
    texts = [called if called == bound else f"{called} as {bound}" for called, bound in names]
    if not module:
        return _small("import " + ", ".join(texts))
    short = f"from {module} import {', '.join(texts)}"
    if len(short) <= _WIDTH:
        return _small(short)
    return _small(f"from {module} import (\n    " + ",\n    ".join(texts) + ",\n)")


def _comments(node: cst.ImportFrom) -> list[str]:
    """Comments between the parentheses."""
    found: list[str] = []

    class Comments(cst.CSTVisitor):
        def visit_Comment(self, node: cst.Comment) -> None:
            found.append(node.value.lstrip("# "))

    node.visit(Comments())
    return found
