"""The command: python -m qframework.migrate PATH..."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import libcst

from qframework.migrate import migrate

_SKIPPED = {"__pycache__", "node_modules", "site-packages", "build", "dist"}


def python_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files that paths name, and the Python files below those that are folders."""
    for path in paths:
        if path.is_dir():
            for found in sorted(path.rglob("*.py")):
                inside = found.relative_to(path).parts
                if not any(p in _SKIPPED or p.startswith(".") for p in inside):
                    yield found
        else:
            yield path


def _read(path: Path) -> tuple[str, str]:
    """Text and encoding of a Python file, its line ends as they are."""
    with path.open("rb") as file:
        encoding, _ = tokenize.detect_encoding(file.readline)
    return path.read_bytes().decode(encoding), encoding


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line, that of the process when None.

    Returns:
        0, or 1 if a file couldn't be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m qframework.migrate",
        description="Rewrite the imports of programs written for Brevitas. Shows a diff, then lists by file and line "
        "what has to be done by hand.",
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="files, or folders of Python files"
    )
    parser.add_argument("--write", action="store_true", help="change the files")
    given = parser.parse_args(arguments)
    failed, changed, remarks = False, 0, []
    for path in python_files(given.paths):
        try:
            text, encoding = _read(path)
            made = migrate(text)
        except (OSError, SyntaxError, UnicodeDecodeError, libcst.ParserSyntaxError) as error:
            print(f"{path}: left as it is: {error}", file=sys.stderr)
            failed = True
            continue
        remarks += [f"{path}:{remark}" for remark in made.remarks]
        if made.after == made.before:
            continue
        changed += 1
        sys.stdout.writelines(_diff(path, made.before, made.after))
        if given.write:
            path.write_bytes(made.after.encode(encoding))
    if remarks:
        print("\nBy hand:" if changed else "By hand:")
        print("\n".join(remarks))
    _say_what_was_done(changed, given.write)
    return 1 if failed else 0


def _diff(path: Path, before: str, after: str) -> Iterator[str]:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), str(path), str(path)
    )
    for line in lines:
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _say_what_was_done(changed: int, written: bool) -> None:
    files = "1 file" if changed == 1 else f"{changed} files"
    if not changed:
        print("Nothing to change.", file=sys.stderr)
    elif written:
        print(f"Changed {files}.", file=sys.stderr)
    else:
        print(f"{files} to change; --write does it.", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever reads the diff has seen enough
        sys.stderr.close()
        os._exit(1)
