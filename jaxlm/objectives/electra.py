"""ELECTRA: a small generator fills hidden places, and the model says of every token whether it was replaced."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlm import config, model
from jaxlm.layers import embed
from jaxlm.objectives import text
from jaxlm.objectives.base import Ids, Objective, Text
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.objectives.joint import together
from jaxlm.objectives.masked import MaskedLM
from jaxlm.params import Spec

TABLES = ("tokens", "positions", "types")  # of an embedding, that both may share


def sample(tree: PyTree, cfg: config.Encoder, last: Float[Array, "B T D"], key: Key[Array, ""], temperature: float = 1.0,
           piece: int = 256) -> Int[Array, "B T"]:
    """A token for every place from the distribution of a language model's head; nothing flows back.

    Args:
      tree: the weights under "encoder".
      last: what the model ends in.
      piece: tokens of each row whose logits exist at a time.
    """
    head, tokens, last = jax.lax.stop_gradient((tree.get("head", {}), tree["embedding"]["tokens"], last))
    batch, length, width = last.shape
    count = -(-length // piece)
    pad = count * -(-length // count) - length
    pieces = jnp.moveaxis(jnp.pad(last, ((0, 0), (0, pad), (0, 0))).reshape(batch, count, -1, width), 1, 0)

    def draw(given: tuple[Array, Array]) -> Array:
        x, key = given
        logits = embed.logits(head, tokens, cfg.head, x)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    drawn = jax.lax.map(draw, (pieces, jax.random.split(key, count)))
    return jnp.moveaxis(drawn, 0, 1).reshape(batch, -1)[:, :length]


@dataclasses.dataclass(frozen=True)
class Electra(Objective):
    """Replaced-token detection. The model is an encoder with `jaxlm.config.Classifier(labels=1, pooling=None)`, whose logit
    says replaced; the generator is of training alone, and learns as a masked language model at the same time.

    A token that the generator gets right counts as not replaced. `MaskedLM(hidden=0.85, replaced=0.0)` is the released code's.

    Attributes:
      masked: which tokens are hidden.
      generator: an encoder with a `jaxlm.config.Head`; the paper's are a quarter to a half of the model's width.
      tied: the generator reads the model's table of tokens and, where both have them, those of positions and types. They then
        have to be of the same width, which the generator's `Embedding.width` can be.
      factor: of the detection's loss.
      temperature: of the generator's samples.

    Reference: Clark et al. 2020, section 2, https://arxiv.org/abs/2003.10555
    """

    makes: ClassVar[Literal["encoder"]] = "encoder"
    prefixes: ClassVar[bool] = True
    masked: MaskedLM
    generator: config.Encoder
    tied: bool = True
    factor: float = 50.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.generator.head, config.Head):
            raise ValueError(f"the generator fills places: it needs a jaxlm.config.Head, got {self.generator.head}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is above 0, got {self.temperature}")

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """As the masked language model."""
        return self.masked.special

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """The masked language model's: the targets are the document."""
        return self.masked.example(tokens, random)

    def check(self, cfg: config.Config) -> None:
        """
        Raises:
          ValueError: for a model that is no discriminator, or whose tables do not fit the generator where they are tied.
        """
        super().check(cfg)
        fits = isinstance(cfg, config.Encoder) and isinstance(cfg.head, config.Classifier)
        if not fits or (cfg.head.labels, cfg.head.pooling) != (1, None):
            raise ValueError("Electra trains an Encoder with the head Classifier(labels=1, pooling=None), got "
                             f"{type(cfg).__name__} with {getattr(cfg, 'head', None)}")
        if cfg.embedding.vocabulary != self.generator.embedding.vocabulary:
            raise ValueError(f"the generator has {self.generator.embedding.vocabulary} tokens, the model "
                             f"{cfg.embedding.vocabulary}: they have to be the same")
        if self.generator.length < cfg.length:
            raise ValueError(f"the generator reads {self.generator.length} tokens, the model {cfg.length}: it has to read as "
                             "many")
        ours, theirs = (embed.spec(side.embedding, side.width) for side in (cfg, self.generator))
        for name in self._shared(cfg):
            if ours[name].shape != theirs[name].shape:
                raise ValueError(f"tied tables are of one shape, those of {name} are {ours[name].shape} and "
                                 f"{theirs[name].shape}: set the generator's Embedding.width, or tied=False")

    def _shared(self, cfg: config.Encoder) -> list[str]:
        ours, theirs = (embed.spec(side.embedding, side.width) for side in (cfg, self.generator))
        return [name for name in TABLES if self.tied and name in ours and name in theirs]

    def extra(self, cfg: config.Encoder) -> Spec:
        """The generator's weights under "generator", without the tables that are the model's."""
        tree = dict(model.spec(self.generator)["encoder"])
        shared = self._shared(cfg)
        tree["embedding"] = {name: leaf for name, leaf in tree["embedding"].items() if name not in shared}
        return {"generator": tree}

    def loss(self, params: PyTree, cfg: config.Encoder, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree, *,
             dtype: Any = None, remat: Any = None, **_: Any) -> tuple[Loss, PyTree]:
        """The generator's mean loss over hidden tokens and `factor` times the model's over all.

        Returns:
          aux: "discriminator" and "generator", the two means, each with "_nll" and "_correct" behind it as
            `jaxlm.objectives.cross_entropy` says; "replaced", tokens that became others. The weight is that of all tokens.
        """
        tree = params["extra"]["generator"]
        tree = tree | {"embedding": {**tree["embedding"],
                                     **{name: params["encoder"]["embedding"][name] for name in self._shared(cfg)}}}
        given = {"segments": batch["segments"], "logits": False, "dtype": dtype, "remat": remat}
        weights, generator = {"encoder": params["encoder"]}, {"encoder": tree}
        if dtype is not None:
            weights, generator = model.cast(weights, cfg, dtype), model.cast(generator, self.generator, dtype)
        last = model.forward(generator, self.generator, batch["tokens"], **given).last
        filling = text.asked(generator["encoder"], self.generator, last, batch)
        drawn = sample(generator["encoder"], self.generator, last, key, self.temperature)
        tokens = jnp.where(batch["weights"] > 0, drawn, batch["targets"])
        replaced = (tokens != batch["targets"]) & (batch["segments"] > 0)
        last = model.forward(weights, cfg, tokens, **given).last
        every = (batch["segments"] > 0).astype(jnp.float32)
        telling = text.asked(weights["encoder"], cfg, last, {"targets": replaced.astype(jnp.int32), "weights": every})
        found = together({"discriminator": (self.factor, telling), "generator": (1.0, filling)})
        return found._replace(aux=found.aux | {"replaced": jnp.sum(replaced, dtype=jnp.float32)}), carry
