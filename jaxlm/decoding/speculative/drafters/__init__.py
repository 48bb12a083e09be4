"""Drafters: what proposes the tokens that a target verifies."""

from typing import Any

from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters.base import Drafter, Seen, Start, View
from jaxlm.decoding.speculative.drafters.lookup import Lookup
from jaxlm.decoding.speculative.drafters.recycling import ACCURACIES, Recycling
from jaxlm.decoding.speculative.tree import Template


def make(drafter: Any, tree: int | Template | None, model: Any, batch: int) -> Drafter:
    if isinstance(drafter, Drafter):
        return drafter
    if drafter == "lookup":
        return Lookup() if tree is None else Lookup(nodes=tree)
    if drafter == "recycling":
        if tree is None:
            return Recycling()
        return Recycling(tree if isinstance(tree, Template) else trees.best(ACCURACIES, tree))
    raise ValueError(drafter)


__all__ = ["Drafter", "Lookup", "Recycling", "Seen", "Start", "View", "make"]
