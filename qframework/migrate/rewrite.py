"""A program of the reference library becomes one of this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from qframework.migrate.imports import MARK, ImportRewriter, Rewritten, Statement
from qframework.migrate.report import Remark
from qframework.migrate.table import Entry, Table, table
from qframework.migrate.uses import (
    INJECTION,
    PACKAGES,
    UseCollector,
    dotted_name,
)

_Block = TypeVar("_Block", cst.Module, cst.IndentedBlock)


@dataclass(frozen=True)
class Migration:
    """What becomes of a program.

    Attributes:
        before: its text.
        after: the text that it becomes.
        remarks: what needs a look, by line of ``before``.
    """

    before: str
    after: str
    remarks: tuple[Remark, ...]


def migrate(source: str, names: Table | None = None) -> Migration:
    """Rewrite the imports of a program, and what it uses of imported modules.

    Strings stay as they are, and so does a program that imports nothing of the reference.

    Args:
        source: text of a Python file.
        names: the table of names, that of the package when None.

    Returns:
        The new text, and what has to be done by hand.

    Raises:
        libcst.ParserSyntaxError: a text that mentions the reference isn't Python.
    """
    if not any(name in source for name in PACKAGES):
        return Migration(source, source, ())
    module = cst.parse_module(source)
    packages = _imported_packages(module)
    if not packages:
        return Migration(source, source, ())
    names = names or table()
    wrapper = MetadataWrapper(module)
    collector = UseCollector(names, packages)
    wrapper.visit(collector)
    plan = collector.plan
    rewriter = ImportRewriter(names, packages, plan)
    places = wrapper.resolve(PositionProvider)
    finder = _ImportFinder()
    wrapper.module.visit(finder)
    imports = {
        node: rewritten
        for node in finder.found
        if (rewritten := rewriter.rewrite(node, places[node].start.line)) is not None
    }
    changed = wrapper.module.visit(_Rewriting(plan.replaced, plan.removed, imports))
    remarks = [*plan.remarks, *(r for i in imports.values() for r in i.remarks)]
    return Migration(source, changed.code, tuple(sorted(set(remarks))))


class _ImportFinder(cst.CSTVisitor):
    """All import statements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Statement] = []

    def visit_Import(self, node: cst.Import) -> None:
        self.found.append(node)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        self.found.append(node)


def _imported_packages(module: cst.Module) -> set[str]:
    """Those of the packages that a program imports, with that of injection if it comes along."""
    finder = _ImportFinder()
    module.visit(finder)
    names: list[str] = []
    for node in finder.found:
        if isinstance(node, cst.Import):
            names += [dotted_name(a.name) for a in node.names]
        elif not node.relative:
            names.append(dotted_name(node.module))
    found = {n.partition(".")[0] for n in names}
    ours = found.intersection(PACKAGES)
    return {*ours, INJECTION} if ours and INJECTION in found else ours


class _Rewriting(cst.CSTTransformer):
    """Carries out what was found.

    Args:
        replaced: expressions by the node in whose place they stand.
        removed: statements and decorators that go.
        imports: what import statements become.
    """

    def __init__(
        self,
        replaced: dict[cst.CSTNode, cst.BaseExpression],
        removed: dict[cst.CSTNode, Entry],
        imports: dict[Statement, Rewritten],
    ) -> None:
        super().__init__()
        self.replaced, self.removed, self.imports = replaced, removed, imports
        self._emptied: list[cst.SimpleStatementLine] = []
        self._made: list[cst.SimpleStatementLine] = []

    # ------------------------------------------------------------------ expressions

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        """An attribute of a module."""
        return self.replaced.get(original_node, updated_node)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        """The name of a package, or a dropped one."""
        return self.replaced.get(original_node, updated_node)

    def leave_Decorator(
        self, original_node: cst.Decorator, updated_node: cst.Decorator
    ) -> cst.Decorator | cst.RemovalSentinel:
        """A decorator that isn't needed."""
        return cst.RemoveFromParent() if original_node in self.removed else updated_node

    # ------------------------------------------------------------------ statements

    def _becomes(
        self, before: Sequence[cst.BaseSmallStatement], after: Sequence[cst.BaseSmallStatement]
    ) -> tuple[list[cst.BaseSmallStatement], list[str]] | None:
        """The statements in place of those on a line, and comments; None where nothing changes."""
        statements: list[cst.BaseSmallStatement] = []
        comments: list[str] = []
        changes = False
        for old, new in zip(before, after, strict=True):
            if isinstance(old, cst.Import | cst.ImportFrom) and old in self.imports:
                statements += self.imports[old].statements
                comments += self.imports[old].comments
                changes = True
            elif old in self.removed:
                comments.append(f"{MARK}{self.removed[old].source}: {self.removed[old].advice}")
                changes = True
            else:
                statements.append(new)
        return (statements, comments) if changes else None

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine]:
        """A line of imports, or with an assignment that goes."""
        made = self._becomes(original_node.body, updated_node.body)
        if made is None:
            return updated_node
        statements, comments = made
        leading = [
            *updated_node.leading_lines,
            *(cst.EmptyLine(comment=cst.Comment(f"# {c}")) for c in comments),
        ]
        if not statements:
            emptied = updated_node.with_changes(body=[cst.Pass()], leading_lines=leading)
            self._emptied.append(emptied)
            return emptied
        bare = [s.with_changes(semicolon=cst.MaybeSentinel.DEFAULT) for s in statements]
        lines = [cst.SimpleStatementLine([s]) for s in bare]
        lines[0] = lines[0].with_changes(leading_lines=leading)
        lines[-1] = lines[-1].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        self._made += lines
        return cst.FlattenSentinel(lines)

    def leave_SimpleStatementSuite(
        self, original_node: cst.SimpleStatementSuite, updated_node: cst.SimpleStatementSuite
    ) -> cst.SimpleStatementSuite:
        """Statements behind a colon, on its line."""
        made = self._becomes(original_node.body, updated_node.body)
        if made is None:
            return updated_node
        bare = [
            s.with_changes(semicolon=cst.MaybeSentinel.DEFAULT) for s in made[0] or [cst.Pass()]
        ]
        return updated_node.with_changes(body=bare)

    def _goes(self, line: cst.SimpleStatementLine, seen: set[str]) -> bool:
        """Whether a line was emptied, or imports once more what one above it in the block does."""
        if any(line is emptied for emptied in self._emptied):
            return True
        if any(line is made for made in self._made):
            text = cst.Module([line.with_changes(leading_lines=[])]).code
            if text in seen:
                return True
            seen.add(text)
        return False

    def _without_emptied(self, block: _Block) -> _Block:
        """Comments of lines that went move to the line below; a block that has nothing else keeps ``pass``."""
        body: list[cst.CSTNode] = []
        carried: list[cst.EmptyLine] = []
        seen: set[str] = set()
        line: cst.CSTNode
        for line in block.body:
            if isinstance(line, cst.SimpleStatementLine) and self._goes(line, seen):
                carried += line.leading_lines
                continue
            above = [*carried, *getattr(line, "leading_lines", ())]
            body.append(line.with_changes(leading_lines=above) if carried else line)
            carried = []
        if isinstance(block, cst.IndentedBlock) and not body:
            body, carried = [cst.SimpleStatementLine([cst.Pass()], leading_lines=carried)], []
        return block.with_changes(body=body, footer=[*carried, *block.footer])

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        """The body of a compound statement."""
        return self._without_emptied(updated_node)

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        """The program."""
        return self._without_emptied(updated_node)
