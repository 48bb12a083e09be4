"""Learning rates as functions of the step, which optax takes as they are; each says its peak and how it comes down.

All warm up the same way: step i of `warmup_steps` (from 0) has (i + 1) / (warmup_steps + 1) of the rate, so that the first step
moves.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Step = int | Int[Array, ""]
Rate = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The base: a rate that is warmed up to and then follows `after`.

    Attributes:
      peak: the largest rate.
      warmup_steps: steps before it is reached.
    """

    peak: float
    warmup_steps: int

    def __post_init__(self) -> None:
        if self.peak < 0 or self.warmup_steps < 0:
            raise ValueError(f"a schedule's peak and warmup_steps are not negative, got {self.peak} and {self.warmup_steps}")

    def __call__(self, step: Step) -> Rate:
        """The rate of a step, from 0, float32."""
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((step + 1) / (self.warmup_steps + 1), 1.0)
        return self.peak * warm * self.after(jnp.maximum(step - self.warmup_steps, 0.0))

    def after(self, step: Rate) -> Rate:
        """The share of the peak, so many steps after the warm-up."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """Stays at the peak."""

    warmup_steps: int = 0

    def after(self, step: Rate) -> Rate:
        """1."""
        return jnp.ones_like(step)


@dataclasses.dataclass(frozen=True)
class _Falling(Schedule):
    """Comes down to `floor` of the peak at `steps`, warm-up included, and stays there.

    Attributes:
      steps: of the whole training.
      floor: share of the peak at the end.
    """

    steps: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps <= self.warmup_steps or not 0 <= self.floor <= 1:
            raise ValueError(f"a schedule has more steps than its warm-up and a floor of 0 to 1, got {self.steps} steps with "
                             f"{self.warmup_steps} of warm-up and a floor of {self.floor}")

    def _progress(self, step: Rate) -> Rate:
        return jnp.clip(step / (self.steps - self.warmup_steps), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Cosine(_Falling):
    """Half a cosine."""

    def after(self, step: Rate) -> Rate:
        """From 1 to the floor."""
        return self.floor + (1 - self.floor) * (1 + jnp.cos(jnp.pi * self._progress(step))) / 2


@dataclasses.dataclass(frozen=True)
class Linear(_Falling):
    """A straight line."""

    def after(self, step: Rate) -> Rate:
        """From 1 to the floor."""
        return 1 - (1 - self.floor) * self._progress(step)


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """Falls as the square root of the step grows; known of T5 and Adafactor.

    Attributes:
      scale_steps: steps after the warm-up at which the rate is the peak's 1 / sqrt(2); None for `warmup_steps`.
    """

    scale_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.warmup_steps if self.scale_steps is None else self.scale_steps) < 1:
            raise ValueError("an inverse square root needs warmup_steps or scale_steps of at least 1")

    def after(self, step: Rate) -> Rate:
        """sqrt(s / (s + step)), s the scale."""
        scale = self.warmup_steps if self.scale_steps is None else self.scale_steps
        return jnp.sqrt(scale / (scale + step))


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(_Falling):
    """Stays at the peak, comes down over the last `decay_steps`, and stays at the floor for any steps beyond (WSD; WSDC).

    Attributes:
      decay_steps: of coming down.
      constant_steps: at the floor, of `steps`: the C of WSDC.
      curve: "linear", or "sqrt": 1 - sqrt(progress).

    Reference: Hu et al. 2024, section 4, https://arxiv.org/abs/2404.06395; the square root, Haegele et al. 2024,
    https://arxiv.org/abs/2405.18392; constant_steps, Deng et al. 2025 (PLM), https://arxiv.org/abs/2503.12167
    """

    decay_steps: int = 0
    constant_steps: int = 0
    curve: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_steps < 1 or self.constant_steps < 0 or self.curve not in ("linear", "sqrt"):
            raise ValueError(f"decay_steps must be at least 1, constant_steps at least 0, curve linear or sqrt, got {self}")
        if self.warmup_steps + self.decay_steps + self.constant_steps > self.steps:
            raise ValueError(f"{self.steps} steps hold no {self.warmup_steps} of warm-up, {self.decay_steps} of decay and "
                             f"{self.constant_steps} at the floor")

    def after(self, step: Rate) -> Rate:
        """1, then down, then the floor."""
        begin = self.steps - self.warmup_steps - self.decay_steps - self.constant_steps
        progress = jnp.clip((step - begin) / self.decay_steps, 0.0, 1.0)
        fallen = jnp.sqrt(progress) if self.curve == "sqrt" else progress
        return 1 - (1 - self.floor) * fallen


@dataclasses.dataclass(frozen=True)
class Power(_Falling):
    """A power of the tokens seen, the same for every length of training and size of batch; then comes down linearly.

    Attributes:
      tokens_per_step: of a batch.
      batch: sequences of a batch.
      amplitude, exponent: a and b of batch * a * tokens ** b, of which the peak is the largest that is taken.
      decay_steps: at the end.

    Reference: Shen et al. 2024, section 4, https://arxiv.org/abs/2408.13359
    """

    tokens_per_step: int = 1
    batch: int = 1
    amplitude: float = 4.0
    exponent: float = -0.51
    decay_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tokens_per_step, self.batch) < 1 or self.amplitude <= 0 or self.exponent > 0 or self.decay_steps < 0:
            raise ValueError("a power schedule has tokens_per_step and batch of at least 1, a positive amplitude, an exponent "
                             f"of at most 0 and no negative decay_steps, got {self}")

    def after(self, step: Rate) -> Rate:
        """In shares of the peak."""
        seen = (step + self.warmup_steps + 1) * self.tokens_per_step
        rate = jnp.minimum(self.batch * self.amplitude * seen**self.exponent / self.peak, 1.0)
        if not self.decay_steps:
            return rate
        left = (self.steps - self.warmup_steps - step) / self.decay_steps
        return rate * (self.floor + (1 - self.floor) * jnp.clip(left, 0.0, 1.0))
