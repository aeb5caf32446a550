"""The command ``python -m qframework``, and the catalogue that it lists."""

from qframework.command.catalogue import Entry, catalogue, choose

__all__ = ["Entry", "catalogue", "choose"]
