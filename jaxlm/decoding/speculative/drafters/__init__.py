"""Drafters: what proposes the tokens that a target verifies.

By name: "lookup", "recycling", "aded", any of them joined by "+" (a union in one tree), "auto", a union with a size of tree
chosen at every step from what the sizes cost on this device and the acceptance so far, and "layers:12", the target's first 12
layers.
A `jaxlm.Model` drafts as a model; `model.draft_model` and `layers.first_layers` make such drafters with trees of other shapes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.speculative import cost
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters.aded import ADED
from jaxlm.decoding.speculative.drafters.base import Drafter, Seen, Start, View
from jaxlm.decoding.speculative.drafters.grow import CHAIN, Draws
from jaxlm.decoding.speculative.drafters.layers import FirstLayers, first_layers
from jaxlm.decoding.speculative.drafters.lookup import Lookup
from jaxlm.decoding.speculative.drafters.model import DraftModel, draft_model
from jaxlm.decoding.speculative.drafters.recycling import ACCURACIES, Recycling
from jaxlm.decoding.speculative.drafters.union import Union
from jaxlm.decoding.speculative.tree import Template
from jaxlm.model import Model

NODES = 81  # of a tree, where nothing else is said; of a union that offers fewer, all those


@functools.cache
def _member(name: str, nodes: int) -> Drafter:
    """What a union of this size has to choose from: of recycling a few times as much as it has room for."""
    if name == "recycling":
        return Recycling(trees.best(ACCURACIES, min(4 * nodes, 256)))
    return Lookup() if name == "lookup" else ADED()


def _union(names: Sequence[str], tree: int | None) -> Union:
    nodes = NODES if tree is None else tree
    members = tuple(_member(name, nodes) for name in names)
    if tree is None:
        nodes = min(nodes, 1 + sum(member.offered - 1 for member in members))
    return Union(members, (nodes,))


def _lookup(tree: int | Template | None) -> Drafter:
    if isinstance(tree, Template):
        raise ValueError("lookup proposes what it finds, in no fixed template: give a number of nodes as its tree")
    return Lookup() if tree is None else Lookup(nodes=tree)


def _recycling(tree: int | Template | None) -> Drafter:
    if isinstance(tree, Template):
        return Recycling(tree)
    # The best of a wide template, by the acceptance so far: more is accepted than of any fixed one.
    return _union(["recycling"], tree)


def _aded(tree: int | Template | None) -> Drafter:
    if isinstance(tree, Template):
        raise ValueError("aded searches for its tree, in no fixed template: give a number of nodes as its tree")
    return ADED() if tree is None else ADED(nodes=tree, simulations=tree)


NAMES: dict[str, Callable[[int | Template | None], Drafter]] = {"lookup": _lookup, "recycling": _recycling, "aded": _aded}


def automatic(sizes: tuple[int, ...], costs: tuple[float, ...]) -> Union:
    """What "auto" is, for sizes of tree and what a call with each costs."""
    # What recycling learns from the prompt's logits is worth less than the head's product over the prompt costs.
    return Union((Lookup(), Recycling(reads_prompt=False)), sizes, jnp.asarray(costs, jnp.float32))


def _where(model: Model) -> str:
    return "one device" if model.mesh is None else f"a mesh of {dict(model.mesh.shape)}"


def make(drafter: str | Model | Drafter, tree: int | Template | None, target: Model, batch: int, dtype: Any = None,
         draws: Draws = "fixed") -> Drafter:
    """The drafter of this name, for a target and a number of rows.

    Args:
      drafter: a name, several joined by "+", "auto", "layers:n", a model of the target's vocabulary, or a drafter, which is
        given back.
      tree: nodes of the tree, the root among them, or a template; None for the drafter's own. For "auto" the most nodes.
      dtype: of the target's computation, in which "auto" measures it.
      draws: how models and first layers are to draw a node's children; for other than "fixed" a number of nodes makes a chain.

    Raises:
      ValueError: for a name that is none; a tree that the drafter cannot have, or that comes beside a drafter that has its own.
    """
    if isinstance(drafter, Drafter):
        if tree is not None:
            raise ValueError(f"this {type(drafter).__name__} has a tree of its own: give the tree when it is made, not here")
        return drafter
    if not isinstance(drafter, (str, Model)):
        raise ValueError(f"drafter must be a name, a Model or a Drafter, got {drafter!r}")
    if tree is not None and not isinstance(tree, Template) and (not isinstance(tree, (int, np.integer)) or tree < 2):
        raise ValueError(f"tree must be a number of nodes, at least 2 with the root, or a Template, got {tree!r}")
    tree = int(tree) if isinstance(tree, np.integer) else tree
    if isinstance(drafter, Model):
        if drafter.mesh != target.mesh:
            raise ValueError(f"the draft model must be where the target is: it is on {_where(drafter)}, the target on "
                             f"{_where(target)}; split its weights with jaxlm.sharding.shardings too")
        return draft_model(drafter, CHAIN if tree is None else tree, dtype, draws)
    if drafter.startswith("layers:"):
        count = drafter.removeprefix("layers:")
        if not count.isdecimal():
            raise ValueError(f"the first layers draft as layers:12, with their number, got {drafter!r}")
        return first_layers(target, int(count), CHAIN if tree is None else tree, dtype, draws)
    names = drafter.split("+")
    unknown = [name for name in names if name not in NAMES and drafter != "auto"]
    if unknown:
        raise ValueError(f"there is no drafter {unknown[0]!r}; there are {', '.join(NAMES)}, several joined by '+', auto and "
                         "layers:12")
    if drafter != "auto" and len(names) == 1:
        return NAMES[names[0]](tree)
    if isinstance(tree, Template):
        raise ValueError("a union puts its nodes where they are likeliest, in no fixed template: give a number of nodes")
    if len(set(names)) < len(names):
        raise ValueError(f"a union has every drafter once, got {drafter!r}")
    if drafter != "auto":
        return _union(names, tree)
    devices = jax.tree.leaves(target.ready)[0].devices()
    sizes = cost.budgets(devices, batch, 64 if tree is None else tree, functools.partial(cost.reads, target))
    return automatic(sizes, cost.measure(target, batch, sizes, dtype))


__all__ = ["ADED", "NAMES", "DraftModel", "Drafter", "FirstLayers", "Lookup", "Recycling", "Seen", "Start", "Union", "View",
           "automatic", "draft_model", "first_layers", "make"]
