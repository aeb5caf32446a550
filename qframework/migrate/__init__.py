"""Programs written for the field's reference library become programs for this one.

    python -m qframework.migrate PATH...           shows what would change, and what has to be done by hand
    python -m qframework.migrate --write PATH...   changes the files

:func:`migrate` does it to a text. It needs libcst: ``pip install "qframework[migrate]"``.
"""

try:
    import libcst  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'migrating needs libcst: pip install "qframework[migrate]"', name="libcst"
    ) from error

from qframework.migrate.report import Remark
from qframework.migrate.rewrite import Migration, migrate
from qframework.migrate.table import Entry, Table, table

__all__ = ["Entry", "Migration", "Remark", "Table", "migrate", "table"]
