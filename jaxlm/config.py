"""What a model is: nested frozen dataclasses, checked when made, JSON both ways.

A choice is a sum type whose members carry their own parameters (`Rope | Alibi | None`), never a flag beside the fields
that it would switch on; "off" is None. Nothing here touches an array: a config is hashable, so it can be a static
argument of `jax.jit`.
"""

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) * (scale + offset); Gemma stores scale - 1 and has offset 1. https://arxiv.org/abs/1910.07467"""

    eps: float = 1e-6
    offset: float = 0.0

    def __post_init__(self):
        _require(self.eps >= 0, f"RmsNorm.eps must not be negative, got {self.eps}")


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / std * scale + bias. https://arxiv.org/abs/1607.06450"""

    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self):
        _require(self.eps >= 0, f"LayerNorm.eps must not be negative, got {self.eps}")


Norm = RmsNorm | LayerNorm


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`. https://arxiv.org/abs/2306.15595"""

    factor: float

    def __post_init__(self):
        _require(self.factor > 0, f"LinearScaling.factor must be positive, got {self.factor}")


@dataclass(frozen=True)
class DynamicNtkScaling:
    """The base grows with the context once it is longer than `length` tokens, as transformers' "dynamic" scaling."""

    factor: float
    length: int

    def __post_init__(self):
        _require(self.factor >= 1, f"DynamicNtkScaling.factor must be at least 1, got {self.factor}")
        _require(self.length > 0, f"DynamicNtkScaling.length must be positive, got {self.length}")


@dataclass(frozen=True)
class YarnScaling:
    """Fast frequencies kept, slow ones interpolated, a ramp between. https://arxiv.org/abs/2309.00071

    `magnitude` multiplies cosine and sine; 0.1 ln(factor) + 1 is the paper's. `truncate` rounds the ramp's ends to whole
    dimensions, as the reference code does.
    """

    factor: float
    length: int
    magnitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        _require(self.factor > 0, f"YarnScaling.factor must be positive, got {self.factor}")
        _require(self.length > 0, f"YarnScaling.length must be positive, got {self.length}")
        _require(self.beta_fast > self.beta_slow, "YarnScaling.beta_fast must be above beta_slow")


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a smooth step between. https://arxiv.org/abs/2407.21783"""

    factor: float
    low: float
    high: float
    length: int

    def __post_init__(self):
        _require(self.factor > 0, f"Llama3Scaling.factor must be positive, got {self.factor}")
        _require(self.length > 0, f"Llama3Scaling.length must be positive, got {self.length}")
        _require(self.high > self.low, f"Llama3Scaling.high must be above low, got {self.high} and {self.low}")


@dataclass(frozen=True)
class LongRopeScaling:
    """A divisor per frequency: `short` up to `length` tokens of context, `long` beyond. https://arxiv.org/abs/2402.13753"""

    short: tuple[float, ...]
    long: tuple[float, ...]
    length: int
    magnitude: float

    def __post_init__(self):
        _require(len(self.short) == len(self.long), "LongRopeScaling.short and .long must be of the same length")
        _require(min(self.short + self.long, default=1.0) > 0, "LongRopeScaling.short and .long must be positive")
        _require(self.length > 0, f"LongRopeScaling.length must be positive, got {self.length}")


RopeScaling = LinearScaling | DynamicNtkScaling | YarnScaling | Llama3Scaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """Rotary positions. https://arxiv.org/abs/2104.09864

    `width` is how many of a head's leading dimensions turn (None: all). `interleaved` pairs neighbouring dimensions
    (2i, 2i+1) as GPT-J does, instead of (i, i + width/2).
    """

    base: float = 10000.0
    width: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self):
        _require(self.base > 0, f"Rope.base must be positive, got {self.base}")
        _require(self.width is None or (self.width > 0 and self.width % 2 == 0),
                 f"Rope.width must be a positive even number, got {self.width}")


@dataclass(frozen=True)
class Alibi:
    """Scores lowered by slope * distance, a slope per query head. https://arxiv.org/abs/2108.12409

    `rounded`: slope * key position takes the place of the distance's product, rounded to bfloat16 whatever the computation's
    dtype, as in Falcon's released code.
    """

    slopes: tuple[float, ...]
    rounded: bool = False


@dataclass(frozen=True)
class Learned:
    """A learned vector per absolute position, added to the embedding; position p reads row p + `offset`."""

    length: int
    offset: int = 0

    def __post_init__(self):
        _require(self.length > 0, f"Learned.length must be positive, got {self.length}")
        _require(self.offset >= 0, f"Learned.offset must not be negative, got {self.offset}")


@dataclass(frozen=True)
class QkNorm:
    """A norm on queries and keys before the rotation: over each head's width, or over all heads at once (OLMo 2)."""

    norm: Norm
    per_head: bool = True


@dataclass(frozen=True)
class Attention:
    """Softmax attention of `heads` query heads that share `kv_heads` key-value heads (equal: multi-head; 1: multi-query).

    `scale` multiplies the scores (None: head_width ** -0.5). `softcap` c makes scores c * tanh(scores / c). `window` W
    lets a query see keys less than W positions away (None: all). `clip` bounds queries, keys and values. `sinks` gives
    every query head a learned extra logit that takes part in the softmax and has no value.
    """

    heads: int
    kv_heads: int
    head_width: int
    position: Rope | Alibi | None = Rope()
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    clip: float | None = None
    bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    sinks: bool = False

    def __post_init__(self):
        _require(min(self.heads, self.kv_heads, self.head_width) > 0,
                 f"Attention.heads, kv_heads and head_width must be positive, got {self.heads}, {self.kv_heads}, "
                 f"{self.head_width}")
        _require(self.heads % self.kv_heads == 0,
                 f"Attention.heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        _require(self.window is None or self.window > 0, f"Attention.window must be positive, got {self.window}")
        _require(self.softcap is None or self.softcap > 0, f"Attention.softcap must be positive, got {self.softcap}")
        _require(self.clip is None or self.clip > 0, f"Attention.clip must be positive, got {self.clip}")
        if isinstance(self.position, Alibi):
            _require(len(self.position.slopes) == self.heads,
                     f"Alibi needs a slope per head: {self.heads} heads, {len(self.position.slopes)} slopes")
        if isinstance(self.position, Rope):
            width = self.rotated
            _require(width <= self.head_width and width % 2 == 0,
                     f"Rope.width must be even and at most head_width ({self.head_width}), got {width}")
            scaling = self.position.scaling
            if isinstance(scaling, LongRopeScaling):
                _require(len(scaling.short) == width // 2,
                         f"LongRopeScaling needs {width // 2} factors, got {len(scaling.short)}")
            _require(not isinstance(scaling, DynamicNtkScaling) or width > 2,
                     "DynamicNtkScaling needs more than 2 rotated dimensions")

    @property
    def rotated(self) -> int:
        """How many dimensions of a head the rotary position turns."""
        if not isinstance(self.position, Rope):
            return 0
        return self.head_width if self.position.width is None else self.position.width


class Activation(enum.Enum):
    """The non-linearity of a feed-forward layer."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    SQUARED_RELU = "squared_relu"


@dataclass(frozen=True)
class Dense:
    """down(activation(up(x))), or with `gated` down(activation(gate(x)) * up(x)): SwiGLU, GeGLU, ReGLU.

    https://arxiv.org/abs/2002.05202
    """

    width: int
    activation: Activation = Activation.SILU
    gated: bool = True
    bias: bool = False

    def __post_init__(self):
        _require(self.width > 0, f"Dense.width must be positive, got {self.width}")


@dataclass(frozen=True)
class PreNorm:
    """x + f(norm(x))."""

    norm: Norm


@dataclass(frozen=True)
class PostNorm:
    """norm(x + f(x)), as in the first transformers."""

    norm: Norm


@dataclass(frozen=True)
class OutputNorm:
    """x + norm(f(x)), as in OLMo 2."""

    norm: Norm


@dataclass(frozen=True)
class SandwichNorm:
    """x + norm_out(f(norm_in(x))), as in Gemma 2 and 3."""

    norm: Norm


@dataclass(frozen=True)
class ParallelNorm:
    """x + attention(norm(x)) + feedforward(norm(x)); `shared`: one norm feeds both, else each has its own."""

    norm: Norm
    shared: bool


Residual = PreNorm | PostNorm | OutputNorm | SandwichNorm | ParallelNorm


@dataclass(frozen=True)
class Block:
    """One layer of the stack. `multiplier` scales what each sublayer adds to the residual stream (Granite, muP)."""

    attention: Attention
    feedforward: Dense
    residual: Residual
    multiplier: float = 1.0


@dataclass(frozen=True)
class Group:
    """A pattern of blocks repeated `repeats` times: its weights are stacked along a leading axis and scanned."""

    pattern: tuple[Block, ...]
    repeats: int

    def __post_init__(self):
        _require(len(self.pattern) > 0, "Group.pattern must hold at least one block")
        _require(self.repeats > 0, f"Group.repeats must be positive, got {self.repeats}")


@dataclass(frozen=True)
class Stack:
    """Groups of blocks, in order."""

    groups: tuple[Group, ...]

    def __post_init__(self):
        _require(len(self.groups) > 0, "Stack.groups must hold at least one group")

    @property
    def layers(self) -> int:
        """How many blocks there are, repeats counted."""
        return sum(len(group.pattern) * group.repeats for group in self.groups)

    def blocks(self) -> tuple[Block, ...]:
        """Every block in order."""
        return tuple(block for group in self.groups for block in group.pattern * group.repeats)

    def place(self, layer: int) -> tuple[int, int, int]:
        """Where a layer is: (group, place in the pattern, repeat)."""
        _require(0 <= layer < self.layers, f"layer must be 0 to {self.layers - 1}, got {layer}")
        for index, group in enumerate(self.groups):
            size = len(group.pattern) * group.repeats
            if layer < size:
                return index, layer % len(group.pattern), layer // len(group.pattern)
            layer -= size
        raise AssertionError("unreachable: the layer was checked above")


def stack_of(blocks: Sequence[Block]) -> Stack:
    """The stack with the fewest patterns to trace that is these blocks in this order.

    Runs through the blocks; at each place takes the pattern (shortest first) that covers the most layers when repeated.

    Example:
      >>> local, full = (Block(Attention(1, 1, 2, window=w), Dense(4), PreNorm(RmsNorm())) for w in (8, None))
      >>> [(len(g.pattern), g.repeats) for g in stack_of([local, local, full] * 2 + [local]).groups]
      [(3, 2), (1, 1)]
    """
    _require(len(blocks) > 0, "a stack needs at least one block")
    blocks, groups, start = tuple(blocks), [], 0
    while start < len(blocks):
        rest, best = blocks[start:], (1, 1)
        for size in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * size:(repeats + 1) * size] == rest[:size]:
                repeats += 1
            if repeats > 1 and size * repeats > best[0] * best[1]:
                best = (size, repeats)
        if best == (1, 1) and groups and groups[-1].repeats == 1:
            groups[-1] = Group((*groups[-1].pattern, rest[0]), 1)
        else:
            groups.append(Group(rest[:best[0]], best[1]))
        start += best[0] * best[1]
    return Stack(tuple(groups))


@dataclass(frozen=True)
class Embedding:
    """Token vectors: `scale` multiplies them (Gemma: width ** 0.5), `norm` follows (BLOOM)."""

    vocabulary: int
    scale: float | None = None
    position: Learned | None = None
    norm: Norm | None = None

    def __post_init__(self):
        _require(self.vocabulary > 0, f"Embedding.vocabulary must be positive, got {self.vocabulary}")


@dataclass(frozen=True)
class Head:
    """Logits from the last hidden states; `tied` uses the embedding's own matrix. `scale` multiplies the logits."""

    tied: bool
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        _require(self.softcap is None or self.softcap > 0, f"Head.softcap must be positive, got {self.softcap}")


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model. `length` is the longest context, in tokens, that it was made for.

    Example:
      >>> block = Block(Attention(heads=9, kv_heads=3, head_width=64), Dense(1536), PreNorm(RmsNorm()))
      >>> cfg = Decoder(576, Embedding(49152), stack_of([block] * 30), RmsNorm(), Head(tied=True), length=8192)
      >>> from_json(to_json(cfg)) == cfg
      True
    """

    width: int
    embedding: Embedding
    stack: Stack
    norm: Norm | None
    head: Head
    length: int

    def __post_init__(self):
        _require(self.width > 0, f"Decoder.width must be positive, got {self.width}")
        _require(self.length > 0, f"Decoder.length must be positive, got {self.length}")
        position = self.embedding.position
        _require(position is None or self.length <= position.length - position.offset,
                 f"Decoder.length ({self.length}) is longer than the learned positions reach")


TYPES: dict[str, type] = {cls.__name__: cls for cls in (
    RmsNorm, LayerNorm, LinearScaling, DynamicNtkScaling, YarnScaling, Llama3Scaling, LongRopeScaling, Rope, Alibi, Learned,
    QkNorm, Attention, Dense, PreNorm, PostNorm, OutputNorm, SandwichNorm, ParallelNorm, Block, Group, Stack, Embedding, Head,
    Decoder)}


def to_dict(cfg: Any) -> Any:
    """Plain dicts, lists and numbers; each dataclass as a dict with its name under "type"."""
    if dataclasses.is_dataclass(cfg):
        return {"type": type(cfg).__name__} | {f.name: to_dict(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
    if isinstance(cfg, enum.Enum):
        return cfg.value
    if isinstance(cfg, tuple):
        return [to_dict(item) for item in cfg]
    return cfg


def from_dict(data: Any, expected: Any = Any, where: str = "config") -> Any:
    """The inverse of `to_dict`.

    Args:
      expected: the type that the result must have, as an annotation.
      where: what messages call it.

    Raises:
      ValueError: for an unknown type or field, or a value of the wrong type; names it and what is right.
    """
    members = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in members)
    if isinstance(data, dict):
        name = data.get("type")
        _require(name in TYPES, f"unknown config type {name!r}; known: {', '.join(TYPES)}")
        hints = typing.get_type_hints(TYPES[name])
        fields = {key: value for key, value in data.items() if key != "type"}
        unknown = sorted(fields.keys() - hints.keys())
        _require(not unknown, f"{name} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
        missing = sorted(f.name for f in dataclasses.fields(TYPES[name])
                         if f.name not in fields and f.default is dataclasses.MISSING)
        _require(not missing, f"{name} lacks {', '.join(missing)}")
        value = TYPES[name](**{key: from_dict(item, hints[key], f"{name}.{key}") for key, item in fields.items()})
    elif isinstance(data, list):
        inner = next((typing.get_args(kind)[0] for kind in members if typing.get_origin(kind) is tuple), Any)
        value = tuple(from_dict(item, inner, where) for item in data)
    elif isinstance(data, int) and not isinstance(data, bool) and float in kinds and int not in kinds:
        value = float(data)
    else:
        value = data
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, enum.Enum):
                choices = [member.value for member in kind]
                _require(data in choices, f"{where} must be one of {', '.join(choices)}, got {data!r}")
                value = kind(data)
    right = expected is Any or type(value) in kinds
    _require(right, f"{where} must be {' or '.join(kind.__name__ for kind in kinds)}, got {data!r}")
    return value


def to_json(cfg: Any) -> str:
    """A config as indented JSON."""
    return json.dumps(to_dict(cfg), indent=1)


def from_json(text: str) -> Any:
    """A config from `to_json`'s text."""
    return from_dict(json.loads(text))
