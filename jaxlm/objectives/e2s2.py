"""E2S2: an encoder-decoder whose encoder has losses of its own, which tokens are noise and which texts are the same."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlm import config, model
from jaxlm.layers import embed
from jaxlm.objectives import pair, text
from jaxlm.objectives.base import Example, Ids, Objective
from jaxlm.objectives.contrastive import info_nce, pooled
from jaxlm.objectives.cross_entropy import Loss, cross_entropy
from jaxlm.objectives.joint import together
from jaxlm.params import Spec

RUN = 3  # tokens that change places
KINDS = config.Classifier(labels=3, pooling=None)  # as it was, moved, another


def noised(tokens: Int[Array, "B S"], segments: Int[Array, "B S"], key: Key[Array, ""], shuffled: float, replaced: float,
           vocabulary: int, kept: tuple[int, ...] = ()) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """The tokens with some runs of three in another order and some others in place of some of the rest, and of each whether it
    is as it was (0), moved (1) or another (2).

    Args:
      shuffled: share of the runs that are put into a random order: any of the six.
      replaced: share of the other tokens that become any of the vocabulary.
      kept: tokens that stay where they are.
    """
    choose, order, strike, other = jax.random.split(key, 4)
    batch, length = tokens.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    free = (segments > 0) & ~jnp.isin(tokens, jnp.asarray(kept, tokens.dtype))
    # Runs lie on a grid over the row; one that is not whole, free and of one segment stays.
    pad = -length % RUN
    runs = -(-length // RUN)

    def grid(values: Array) -> Array:
        return jnp.pad(values, ((0, 0), (0, pad))).reshape(batch, runs, RUN)

    whole = jnp.all(grid(free), axis=2) & jnp.all(grid(segments) == grid(segments)[:, :, :1], axis=2)
    whole = whole & jax.random.bernoulli(choose, shuffled, (batch, runs))
    chosen = jnp.repeat(whole, RUN, axis=1)[:, :length]
    rank = jnp.argsort(grid(jax.random.uniform(order, tokens.shape)), axis=2).astype(jnp.int32)
    within = (rank + RUN * jnp.arange(runs, dtype=jnp.int32)[None, :, None]).reshape(batch, -1)[:, :length]
    mixed = jnp.take_along_axis(tokens, jnp.where(chosen, within, index), axis=1)
    moved = mixed != tokens
    struck = free & ~moved & jax.random.bernoulli(strike, replaced, tokens.shape)
    drawn = jax.random.randint(other, tokens.shape, 0, vocabulary, tokens.dtype)
    return jnp.where(struck, drawn, mixed), jnp.where(struck, 2, moved.astype(jnp.int32))


def two_views(one: Float[Array, "P W"], other: Float[Array, "P W"], present: Bool[Array, "P"], scale: float) -> Loss:
    """Each text's two vectors against those of all others, of both views (NT-Xent), the mean of both ways; cosines.

    Reference: Chen et al. 2020, equation 1, https://arxiv.org/abs/2002.05709
    """
    # The length of a vector of zeros has no gradient.
    one, other = (jnp.where(present[:, None], y, 1.0) for y in (one, other))
    one, other = (y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12) for y in (one, other))
    apart = ~jnp.eye(len(one), dtype=bool) & present[None]
    seen = jnp.concatenate([jnp.broadcast_to(present[None], apart.shape) | jnp.eye(len(one), dtype=bool), apart], axis=1)
    at = jnp.arange(len(one), dtype=jnp.int32)
    ways = [info_nce(queries, jnp.concatenate([keys, queries]), at, present, seen, scale)
            for queries, keys in ((one, other), (other, one))]
    return Loss(sum(way.sum for way in ways) / 2, ways[0].weight, {"correct": sum(way.aux["correct"] for way in ways) / 2})


@dataclasses.dataclass(frozen=True)
class E2S2(Objective):
    """Beside an objective's pairs the same ones with more noise in the inputs, made on the device: both are asked for the
    targets, the encoder says what each token of the noisier inputs is, and the two versions of an input have to be alike among
    all of the batch. The released method's numbers are the defaults; its prompts around inputs are not here.

    Attributes:
      pairs: makes them, as SpanCorruption does.
      count: pairs of a row that are told apart, at most: what is beyond them in a row is left out of that loss.
      kept: tokens that noise leaves alone: sentinels, masks, beginning and end.
      shuffled, replaced: see `noised`.
      denoising, alike: factors of the encoder's losses.
      temperature: of the cosines.

    Reference: Zhong et al. 2022, section 3, https://arxiv.org/abs/2205.14912
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    pairs: Objective
    count: int
    kept: tuple[int, ...]
    shuffled: float = 0.05
    replaced: float = 0.05
    denoising: float = 0.05
    alike: float = 0.05
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.pairs.makes != "pair":
            raise ValueError(f"E2S2 needs pairs, {type(self.pairs).__name__} makes texts for {self.pairs.makes}s")
        if self.count < 1 or not (0 <= self.shuffled <= 1 and 0 <= self.replaced <= 1) or not self.temperature > 0:
            raise ValueError("count is at least 1, shuffled and replaced are shares and temperature is above 0, got "
                             f"{self.count}, {self.shuffled}, {self.replaced} and {self.temperature}")

    @property
    def overlap(self) -> int:  # type: ignore[override]
        """As what makes the pairs."""
        return self.pairs.overlap

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """As what makes the pairs, and those kept."""
        return *self.pairs.special, *self.kept

    def example(self, tokens: Ids, random: np.random.Generator) -> Example:
        """As `pairs`."""
        return self.pairs.example(tokens, random)

    def check(self, cfg: config.Config) -> None:
        """
        Raises:
          ValueError: for what is no encoder-decoder.
        """
        if not isinstance(cfg, config.EncoderDecoder):
            raise ValueError(f"E2S2 trains an EncoderDecoder, this model is {type(cfg).__name__}")
        super().check(cfg)

    def extra(self, cfg: config.EncoderDecoder) -> Spec:
        """The classifier of what the decoder reads of the encoder under "noise"."""
        return {"noise": embed.head_spec(KINDS, cfg.encoder.embedding, cfg.source)}

    def loss(self, params: PyTree, cfg: config.EncoderDecoder, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree,
             *, sizes: Int[np.ndarray, " V"] | None = None, smoothing: float = 0.0, z: float = 0.0, dtype: Any = None,
             remat: Any = None, **_: Any) -> tuple[Loss, PyTree]:
        """Half the loss of either version's targets, and the encoder's losses with their factors; all are means.

        Returns:
          aux: "plain", "noisy", "denoising" and "alike", the four means, each with what is in its own aux behind it.
        """
        if dtype is not None:
            params = params | model.cast(params, cfg, dtype)
        sources, place = batch["input_segments"], {"dtype": dtype, "remat": remat}
        noisy, kinds = noised(batch["inputs"], sources, key, self.shuffled, self.replaced, cfg.encoder.embedding.vocabulary,
                              self.kept)
        read = pair.shifted(batch["targets"], batch["segments"], cfg.start[-1])

        def version(inputs: Array) -> tuple[Array, Loss]:
            """What the decoder reads of the encoder, and the loss of the targets."""
            memory = model.encode(params, cfg, inputs, segments=sources, **place)
            out = model.forward(params, cfg, read, segments=batch["segments"], memory=memory, logits=False, **place)
            asked = text.asked(params["decoder"], cfg.decoder, out.last, batch, sizes=sizes, smoothing=smoothing, z=z)
            return memory.hidden, asked

        (before, plain), (after, hard) = version(batch["inputs"]), version(noisy)
        every = (sources > 0).astype(jnp.float32)
        told = cross_entropy(lambda weights, x: embed.classify(weights, KINDS, x, None), params["extra"]["noise"], after, kinds,
                             every)
        (one, present), (other, _) = (pooled(config.Pooling.MEAN, last, sources, self.count) for last in (before, after))
        same = two_views(*(y.reshape(-1, y.shape[-1]) for y in (one, other)), present.reshape(-1), 1 / self.temperature)
        return together({"plain": (0.5, plain), "noisy": (0.5, hard), "denoising": (self.denoising, told),
                         "alike": (self.alike, same)}), carry
