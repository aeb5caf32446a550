"""Makes a link of every name of the API that a page writes as code, where that name is documented."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

#: Where a short name is documented in several modules, the first of these has it.
PREFERRED = ("qframework", "qframework.graph", "qframework.inspect", "qframework.layers")


class ApiLinks(SphinxPostTransform):
    """``collect_statistics`` in a text leads to its entry in the reference."""

    default_priority = 900

    def run(self, **kwargs: Any) -> None:
        """Replace literals by links, but in headings, in links, and on the page of the name itself."""
        builder = self.env.app.builder
        objects = self.env.domains.python_domain.objects
        names = _names(objects)
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()")
            full = names.get(name)
            if full is None or _is_elsewhere(literal):
                continue
            entry = objects[full]
            if entry.docname == self.env.docname:
                continue
            link = make_refnode(
                builder, self.env.docname, entry.docname, entry.node_id, literal.deepcopy(), full
            )
            literal.replace_self(link)


def _is_elsewhere(literal: nodes.Node) -> bool:
    parent = literal.parent
    while parent is not None:
        if isinstance(parent, (nodes.title, nodes.reference)):
            return True
        parent = parent.parent
    return False


def _names(objects: Any) -> dict[str, str]:
    """Full names, and short ones that mean one thing."""
    short = defaultdict(list)
    for full, entry in objects.items():
        if entry.objtype in ("class", "function", "exception", "data"):
            short[full.rpartition(".")[2]].append(full)
    found = {full: full for full in objects}
    for name, places in short.items():
        first = [p for m in PREFERRED for p in places if p == f"{m}.{name}"]
        if first or len(places) == 1:
            found.setdefault(name, (first or places)[0])
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_post_transform(ApiLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
