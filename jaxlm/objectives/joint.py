"""Several losses of the same examples, learned at once."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxlm import config
from jaxlm.objectives import pair
from jaxlm.objectives.base import Example, Ids, Objective
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.params import Spec


def together(parts: Mapping[str, tuple[float, Loss]]) -> Loss:
    """A loss whose mean is the sum of the parts' means, each times its factor. Its weight is that of the first.

    So with a batch in pieces it is the mean over pieces that are as heavy as the first part's weight in each.

    Returns:
      aux: under each part's name its mean loss, and under "name_of" what its own aux calls "of"; sums as any.
    """
    weight = next(iter(parts.values()))[1].weight
    total, aux = jnp.zeros((), jnp.float32), {}
    for name, (factor, loss) in parts.items():
        share = weight / jnp.maximum(loss.weight, 1e-9)
        total = total + factor * loss.sum * share
        aux |= {name: loss.sum * share} | {f"{name}_{key}": value * share for key, value in loss.aux.items()}
    return Loss(total, weight, aux)


@dataclasses.dataclass(frozen=True)
class Joint(Objective):
    """The sum of several objectives' losses, each a mean over what it asks, of the examples that the first makes.

    CodeT5+'s second stage is `DualGeneration`, `Reversed`, `Contrastive` and `Matching`, all with factor 1.

    Attributes:
      names: what `aux` calls them, see `together`.
      objectives: the others take the first one's examples as they are. One of them at most hands something on between steps.
      factors: of their losses.

    Reference: Wang et al. 2023, section 3.2, https://arxiv.org/abs/2305.07922
    """

    names: tuple[str, ...]
    objectives: tuple[Objective, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.objectives) == len(self.factors) or not self.names:
            raise ValueError(f"as many names as objectives and factors, at least one, got {len(self.names)}, "
                             f"{len(self.objectives)} and {len(self.factors)}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"the names are different, got {', '.join(self.names)}")
        wrong = [one for one in self.objectives if one.makes != self.makes]
        if wrong:
            raise ValueError(f"{type(wrong[0]).__name__} takes examples for {wrong[0].makes}s, and the first objective makes "
                             f"examples for {self.makes}s")

    @property
    def makes(self) -> str:  # type: ignore[override]
        """As the first objective."""
        return self.objectives[0].makes

    @property
    def overlap(self) -> int:  # type: ignore[override]
        """As the first objective."""
        return self.objectives[0].overlap

    @property
    def prefixes(self) -> bool:  # type: ignore[override]
        """As the first objective."""
        return self.objectives[0].prefixes

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """Those of all of them."""
        return tuple(token for one in self.objectives for token in one.special)

    def example(self, tokens: Ids, random: Any) -> Example:
        """The first objective's."""
        return self.objectives[0].example(tokens, random)

    def check(self, cfg: config.Config) -> None:
        """Each of them."""
        for one in self.objectives:
            one.check(cfg)
        handing = [name for name, one in zip(self.names, self.objectives, strict=True) if one.carry(cfg)]
        if len(handing) > 1:
            raise ValueError(f"one of several joint objectives may hand something on between steps, here {', '.join(handing)}")
        self.extra(cfg)

    def extra(self, cfg: config.Config) -> Spec:
        """Those of all of them; what has the same name and shapes is the same.

        Raises:
          ValueError: where it has others.
        """
        tree: dict[str, Any] = {}
        for one in self.objectives:
            for name, part in one.extra(cfg).items():
                if _shapes(tree.setdefault(name, part)) != _shapes(part):
                    raise ValueError(f"{type(one).__name__} and another of the joint objectives have other weights as {name!r}")
        return tree

    def carry(self, cfg: config.Config) -> PyTree:
        """Of the one that hands something on."""
        return next((carry for one in self.objectives if (carry := one.carry(cfg))), {})

    def loss(self, params: PyTree, cfg: config.Config, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree,
             **given: Any) -> tuple[Loss, PyTree]:
        """See `together`. All draw from the same key, so that what two of them draw alike is the same."""
        parts = {}
        for name, factor, one in zip(self.names, self.factors, self.objectives, strict=True):
            hands = bool(one.carry(cfg))
            found, after = one.loss(params, cfg, batch, key, carry if hands else {}, **given)
            carry = after if hands else carry
            parts[name] = factor, found
        return together(parts), carry


def _shapes(spec: Any) -> Any:
    if isinstance(spec, Mapping):
        return {name: _shapes(part) for name, part in spec.items()}
    return spec.shape


@dataclasses.dataclass(frozen=True)
class Reversed(Objective):
    """Pairs the other way round, in a `Joint` after what makes them: the inputs asked of the targets."""

    makes: ClassVar[Literal["pair"]] = "pair"

    def check(self, cfg: config.Config) -> None:
        """
        Raises:
          ValueError: for what is no encoder-decoder.
        """
        if not isinstance(cfg, config.EncoderDecoder):
            raise ValueError(f"Reversed asks an EncoderDecoder, this model is {type(cfg).__name__}")

    def loss(self, params: PyTree, cfg: config.Config, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree, *,
             prefixes: bool = False, **given: Any) -> tuple[Loss, PyTree]:
        """As `jaxlm.objectives.pair.loss`."""
        swapped = {"inputs": batch["targets"], "input_segments": batch["segments"], "targets": batch["inputs"],
                   "segments": batch["input_segments"], "weights": (batch["input_segments"] > 0).astype(jnp.float32)}
        return pair.loss(params, cfg, swapped, **given), carry
