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


def _check_rope(rope: Rope, width: int) -> None:
    """That the scaling fits so many turned dimensions."""
    scaling = rope.scaling
    if isinstance(scaling, LongRopeScaling):
        _require(len(scaling.short) == width // 2, f"LongRopeScaling needs {width // 2} factors, got {len(scaling.short)}")
    _require(not isinstance(scaling, DynamicNtkScaling) or width > 2, "DynamicNtkScaling needs more than 2 rotated dimensions")


@dataclass(frozen=True)
class Alibi:
    """Scores lowered by slope * distance, a slope per query head. https://arxiv.org/abs/2108.12409

    `rounded`: slope * key position takes the place of the distance's product, rounded to bfloat16 whatever the computation's
    dtype, as in Falcon's released code.
    """

    slopes: tuple[float, ...]
    rounded: bool = False


@dataclass(frozen=True)
class RelativeBias:
    """A learned number per head and bucket of distance added to the scores, as in T5. https://arxiv.org/abs/1910.10683

    Half of the buckets hold a distance each, the others widen up to `distance` and hold all beyond. `bidirectional` tells keys
    before the query from those behind it and gives half of the buckets to either; otherwise those behind count as distance 0.
    `shared`: one table serves all layers of the stack, else every layer has its own.
    """

    buckets: int = 32
    distance: int = 128
    bidirectional: bool = False
    shared: bool = True

    def __post_init__(self):
        sides = 2 if self.bidirectional else 1
        _require(self.buckets % (2 * sides) == 0 and self.buckets > 0,
                 f"RelativeBias.buckets must be a positive multiple of {2 * sides}, got {self.buckets}")
        _require(self.distance > self.buckets // (2 * sides),
                 f"RelativeBias.distance must be above {self.buckets // (2 * sides)}, the exact buckets, got {self.distance}")


@dataclass(frozen=True)
class Sinusoidal:
    """Sines, then cosines, of the position at width / 2 frequencies from 1 down to nearly 1 / `base`, added to embeddings.

    `reaching`: the lowest frequency is 1 / `base` itself, as in tensor2tensor and fairseq. Position p counts as p + `offset`.
    https://arxiv.org/abs/1706.03762
    """

    base: float = 10000.0
    offset: int = 0
    reaching: bool = False

    def __post_init__(self):
        _require(self.base > 1, f"Sinusoidal.base must be above 1, got {self.base}")
        _require(self.offset >= 0, f"Sinusoidal.offset must not be negative, got {self.offset}")


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
    every query head a learned extra logit that takes part in the softmax and has no value. `source` is the width of the
    vectors that keys and values are made of, where these are not the queries' own: a cross-attention's.
    """

    heads: int
    kv_heads: int
    head_width: int
    position: Rope | Alibi | RelativeBias | None = Rope()
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    clip: float | None = None
    bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    sinks: bool = False
    source: int | None = None

    def __post_init__(self):
        _require(self.source is None or self.source > 0, f"Attention.source must be positive, got {self.source}")
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
            _check_rope(self.position, width)

    @property
    def rotated(self) -> int:
        """How many dimensions of a head the rotary position turns."""
        if not isinstance(self.position, Rope):
            return 0
        return self.head_width if self.position.width is None else self.position.width

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of the keys and of the values that a cache keeps of a token."""
        return (self.kv_heads, self.head_width), (self.kv_heads, self.head_width)

    @property
    def pair(self) -> int:
        """Multiplications for a query token and a key token that it sees, in all heads: scores, and values mixed."""
        return 2 * self.heads * self.head_width


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values are products of one short vector per token, which is all that a cache keeps of it (MLA).

    A token's `latent` numbers, normalised, give each of the `heads` a key of `key_width` and a value of `value_width` numbers;
    `rotated` numbers of key more, which turn with the position, are the same for all heads. Queries are products of x, or with
    `query_latent` of a normalised vector of that width. `scale` multiplies the scores (None: (key_width + rotated) ** -0.5),
    `window` is as in `Attention`. `bias` is one on the products that make the two short vectors, `out_bias` one on the output.
    https://arxiv.org/abs/2405.04434
    """

    heads: int
    latent: int
    key_width: int
    rotated: int
    value_width: int
    query_latent: int | None = None
    position: Rope = Rope(interleaved=True)
    norm: Norm = RmsNorm()
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        sizes = (self.heads, self.latent, self.key_width, self.rotated, self.value_width)
        _require(min(sizes) > 0, "LatentAttention.heads, latent, key_width, rotated and value_width must be positive, got "
                 f"{', '.join(map(str, sizes))}")
        _require(self.query_latent is None or self.query_latent > 0,
                 f"LatentAttention.query_latent must be positive, got {self.query_latent}")
        _require(self.window is None or self.window > 0, f"LatentAttention.window must be positive, got {self.window}")
        _require(self.rotated % 2 == 0 and self.position.width is None,
                 f"LatentAttention.rotated says how many dimensions turn: it must be even, got {self.rotated}, and Rope.width "
                 f"None, got {self.position.width}")
        _check_rope(self.position, self.rotated)

    @property
    def head_width(self) -> int:
        """Of a head's whole queries and keys."""
        return self.key_width + self.rotated

    @property
    def kv_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.heads

    @property
    def cached(self) -> tuple[tuple[int, int], None]:
        """As `Attention.cached`: one head of keys, whose first `latent` dimensions are the values."""
        return (1, self.latent + self.rotated), None

    @property
    def pair(self) -> int:
        """As `Attention.pair`, where keys and values of the heads are made; `latent_pair` where they are not."""
        return self.heads * (self.head_width + self.value_width)

    @property
    def latent_pair(self) -> int:
        """As `pair`, where queries meet what the cache keeps."""
        return self.heads * (2 * self.latent + self.rotated)


SelfAttention = Attention | LatentAttention


class Activation(enum.Enum):
    """The non-linearity of a feed-forward layer."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    SQUARED_RELU = "squared_relu"
    TANH = "tanh"
    QUICK_GELU = "quick_gelu"


@dataclass(frozen=True)
class Dense:
    """down(activation(up(x))), or with `gated` down(activation(gate(x)) * (up(x) + offset)): SwiGLU, GeGLU, ReGLU.

    `clip` c keeps a gate's input to the activation at most c, and up(x) between -c and c (GPT-OSS, whose `offset` is 1).
    https://arxiv.org/abs/2002.05202
    """

    width: int
    activation: Activation = Activation.SILU
    gated: bool = True
    bias: bool = False
    clip: float | None = None
    offset: float = 0.0

    def __post_init__(self):
        _require(self.width > 0, f"Dense.width must be positive, got {self.width}")
        _require(self.clip is None or self.clip > 0, f"Dense.clip must be positive, got {self.clip}")
        _require(self.gated or self.clip is None and self.offset == 0, "Dense.clip and Dense.offset belong to gated layers")


class Score(enum.Enum):
    """What makes scores of a router's logits: a softmax over the experts, or the sigmoid of each."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True)
class ExpertGroups:
    """Experts in `count` equal runs; a token goes to experts of the `chosen` runs that score highest alone.

    A run's score is the sum of its `best` highest: 1 in DeepSeek-V2, 2 in V3. https://arxiv.org/abs/2412.19437
    """

    count: int
    chosen: int
    best: int = 1

    def __post_init__(self):
        _require(0 < self.chosen <= self.count, f"ExpertGroups.chosen must be 1 to {self.count}, got {self.chosen}")
        _require(self.best > 0, f"ExpertGroups.best must be positive, got {self.best}")


@dataclass(frozen=True)
class TopK:
    """Each token goes to the `k` experts that score highest, weighed by their scores. https://arxiv.org/abs/1701.06538

    `normalize` divides the weights by their sum (of a softmax: a softmax over the chosen experts' logits alone), `scale`
    multiplies them. `correction` is a number per expert that is added to its score for the choice, not for the weight; training
    moves it towards an even load (https://arxiv.org/abs/2408.15664). k = 1 is Switch (https://arxiv.org/abs/2101.03961).
    """

    k: int
    score: Score = Score.SOFTMAX
    normalize: bool = False
    scale: float = 1.0
    groups: ExpertGroups | None = None
    correction: bool = False
    bias: bool = False

    def __post_init__(self):
        _require(self.k > 0, f"TopK.k must be positive, got {self.k}")


@dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes the tokens of a row that score highest for it: `capacity` experts a token on average.

    Weights are scores, softmax over experts. What an expert takes depends on tokens that come later, so texts are not generated
    as they were trained: this is for encoders and for training. https://arxiv.org/abs/2202.09368
    """

    capacity: float

    def __post_init__(self):
        _require(self.capacity > 0, f"ExpertChoice.capacity must be positive, got {self.capacity}")


@dataclass(frozen=True)
class Hash:
    """Each token goes to `k` experts that its id and `seed` alone decide, with equal weights that sum to 1.

    https://arxiv.org/abs/2106.04426
    """

    k: int = 1
    seed: int = 0

    def __post_init__(self):
        _require(self.k > 0, f"Hash.k must be positive, got {self.k}")


@dataclass(frozen=True)
class ReluNorm:
    """Every expert is weighed by norm(relu(x W)), and those of weight 0, the most, do nothing (BlockFFN).

    https://arxiv.org/abs/2507.08771
    """

    norm: Norm = RmsNorm()


@dataclass(frozen=True)
class Recurrent:
    """`TopK` whose logits are read from a state of `width` numbers that a GRU, which all layers share, carries from layer to
    layer (RMoE). https://arxiv.org/abs/2408.06793
    """

    width: int
    choice: TopK

    def __post_init__(self):
        _require(self.width > 0, f"Recurrent.width must be positive, got {self.width}")


@dataclass(frozen=True)
class AverageKey:
    """Each token goes to the `k` experts whose keys, averaged, it agrees with most; weights are 1 (EMoE).

    The keys are the columns of an expert's gate (of `up` where there is none). https://arxiv.org/abs/2310.10908
    """

    k: int

    def __post_init__(self):
        _require(self.k > 0, f"AverageKey.k must be positive, got {self.k}")


Router = TopK | ExpertChoice | Hash | ReluNorm | Recurrent | AverageKey


@dataclass(frozen=True)
class CapacityFactor:
    """An expert takes at most ceil(factor * k * T / experts) of a row's T tokens."""

    factor: float

    def __post_init__(self):
        _require(self.factor > 0, f"CapacityFactor.factor must be positive, got {self.factor}")


@dataclass(frozen=True)
class CapacityTokens:
    """An expert takes at most `tokens` tokens of a row, however long that is."""

    tokens: int

    def __post_init__(self):
        _require(self.tokens > 0, f"CapacityTokens.tokens must be positive, got {self.tokens}")


@dataclass(frozen=True)
class CapacityFraction:
    """An expert takes at most ceil(fraction * T) of a row's T tokens (NLLB-MoE, https://arxiv.org/abs/2207.04672).

    With `rescale` the weights of the experts that a token keeps sum to what those of all that it chose did. With `prioritized`
    the tokens that a router is surest of come first, not those at the front (https://arxiv.org/abs/2106.05974).
    """

    fraction: float
    rescale: bool = False
    prioritized: bool = False

    def __post_init__(self):
        _require(0 < self.fraction <= 1, f"CapacityFraction.fraction must be above 0 and at most 1, got {self.fraction}")


Capacity = CapacityFactor | CapacityTokens | CapacityFraction


@dataclass(frozen=True)
class Moe:
    """`experts` feed-forward layers of one form, of which a router gives each token some; their weighed outputs are summed.

    `shared` is a layer that every token goes through beside; with `shared_gate` its output is multiplied by the sigmoid of a
    product of x (Qwen2-MoE). With a `capacity` an expert takes the first of a row's tokens that choose it, up to that, and
    drops the others: text then depends on how it is cut into calls, so generation and scores leave a decoder's out
    (`dropless`). None drops nothing.
    """

    experts: int
    expert: Dense
    router: Router
    shared: Dense | None = None
    shared_gate: bool = False
    capacity: Capacity | None = None

    def __post_init__(self):
        _require(self.experts > 0, f"Moe.experts must be positive, got {self.experts}")
        _require(self.shared is not None or not self.shared_gate, "Moe.shared_gate multiplies a shared layer: give one")
        router = self.router.choice if isinstance(self.router, Recurrent) else self.router
        _require(self.capacity is None or isinstance(router, TopK | Hash | AverageKey),
                 f"Moe.capacity bounds what tokens choose: with {type(router).__name__} it must be None")
        if isinstance(router, TopK | Hash | AverageKey):
            _require(router.k <= self.experts, f"a router cannot choose {router.k} of {self.experts} experts")
        if isinstance(router, TopK) and router.groups is not None:
            groups = router.groups
            _require(self.experts % groups.count == 0,
                     f"{self.experts} experts do not divide into {groups.count} groups of equal size")
            size = self.experts // groups.count
            _require(groups.best <= size, f"ExpertGroups.best is {groups.best}, and a group has {size} experts")
            _require(router.k <= groups.chosen * size,
                     f"TopK.k is {router.k}, and {groups.chosen} groups have {groups.chosen * size} experts")


FeedForward = Dense | Moe


@dataclass(frozen=True)
class PreNorm:
    """x + f(norm(x)); without `attention` it is x that attention reads, as in ModernBERT's first block."""

    norm: Norm
    attention: bool = True


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
    """x + attention(norm(x)) + feedforward(norm(x)), with cross-attention a third; `shared`: one norm feeds all."""

    norm: Norm
    shared: bool


Residual = PreNorm | PostNorm | OutputNorm | SandwichNorm | ParallelNorm


@dataclass(frozen=True)
class Block:
    """One layer of the stack. `multiplier` scales what each sublayer adds to the residual stream (Granite, muP).

    `cross` is a decoder's attention to an encoded source, between attention and feed-forward. Its keys have no order, or with a
    Rope (CodeT5+ 2B) queries turn by their own positions and keys by their places in the source.
    """

    attention: SelfAttention
    feedforward: FeedForward
    residual: Residual
    multiplier: float = 1.0
    cross: Attention | None = None

    def __post_init__(self):
        _require(isinstance(self.attention, LatentAttention) or self.attention.source is None,
                 "Block.attention reads its own queries' vectors: Attention.source is for cross")
        if self.cross is not None:
            _require(self.cross.source is not None, "Block.cross needs Attention.source, the width of what the encoder gives")
            position = self.cross.position
            _require(position is None or isinstance(position, Rope) and position.scaling is None,
                     "Block.cross needs Attention(position=None), or a Rope without scaling")
            _require(not self.cross.causal and self.cross.window is None,
                     "Block.cross needs Attention(causal=False, window=None): a source's tokens are all seen")


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
        feeds = [block.feedforward for group in self.groups for block in group.pattern]
        widths = {feed.router.width for feed in feeds if isinstance(feed, Moe) and isinstance(feed.router, Recurrent)}
        _require(len(widths) <= 1,
                 f"a stack's Recurrent routers share one state: their widths must be equal, got {sorted(widths)}")

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
    """Token vectors: `scale` multiplies them (Gemma: width ** 0.5), position and one of `types` type vectors (BERT's segments)
    are added, `norm` follows (BLOOM). With `width` the vectors so far are of this width, and a product brings them to the
    model's (ELECTRA).
    """

    vocabulary: int
    scale: float | None = None
    position: Learned | Sinusoidal | None = None
    norm: Norm | None = None
    types: int | None = None
    width: int | None = None

    def __post_init__(self):
        _require(self.vocabulary > 0, f"Embedding.vocabulary must be positive, got {self.vocabulary}")
        _require(self.types is None or self.types > 0, f"Embedding.types must be positive, got {self.types}")
        _require(self.width is None or self.width > 0, f"Embedding.width must be positive, got {self.width}")


@dataclass(frozen=True)
class Transform:
    """norm(activation(product)): what some heads do to hidden states first."""

    activation: Activation
    norm: Norm | None = None
    bias: bool = True


@dataclass(frozen=True)
class Head:
    """Logits from the last hidden states; `tied` uses the embedding's own matrix. `scale` multiplies the logits. `transform`
    (BERT's masked-LM head) comes before the product with the vocabulary, and gives vectors of the embedding's width.
    """

    tied: bool
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    transform: Transform | None = None

    def __post_init__(self):
        _require(self.softcap is None or self.softcap > 0, f"Head.softcap must be positive, got {self.softcap}")


class Pooling(enum.Enum):
    """How the vectors of a text's tokens become one: their mean, the first, the last, the largest of each dimension, or a mean
    in which token i of n weighs i (https://arxiv.org/abs/2202.08904)."""

    MEAN = "mean"
    FIRST = "first"
    LAST = "last"
    MAX = "max"
    WEIGHTED_MEAN = "weighted_mean"


@dataclass(frozen=True)
class Classifier:
    """Logits over `labels`, of a text's pooled vector, or with `pooling` None of every token (ELECTRA's discriminator: one)."""

    labels: int
    pooling: Pooling | None
    transform: Transform | None = None
    bias: bool = True

    def __post_init__(self):
        _require(self.labels > 0, f"Classifier.labels must be positive, got {self.labels}")


@dataclass(frozen=True)
class Vector:
    """One vector per text: pooled, brought to `width` by a product where given, with `normalize` made of length 1."""

    pooling: Pooling
    normalize: bool = True
    width: int | None = None
    bias: bool = False

    def __post_init__(self):
        _require(self.width is None or self.width > 0, f"Vector.width must be positive, got {self.width}")
        _require(self.width is not None or not self.bias, "Vector.bias belongs to a product: give a width")


def _check_side(cfg: "Decoder | Encoder") -> None:
    name, position = type(cfg).__name__, cfg.embedding.position
    _require(cfg.width > 0, f"{name}.width must be positive, got {cfg.width}")
    _require(cfg.length > 0, f"{name}.length must be positive, got {cfg.length}")
    _require(not isinstance(position, Learned) or cfg.length <= position.length - position.offset,
             f"{name}.length ({cfg.length}) is longer than the learned positions reach")
    _require(not isinstance(cfg.head, Head) or cfg.head.transform is not None or cfg.embedding.width in (None, cfg.width),
             f"{name}.head reads vectors of the embedding's width, {cfg.embedding.width}: give it a transform")
    shared = {(block.attention.position, block.attention.heads) for block in cfg.stack.blocks()
              if isinstance(block.attention.position, RelativeBias) and block.attention.position.shared}
    _require(len(shared) < 2, f"one RelativeBias(shared=True) and its number of heads serve a stack, this has {len(shared)}")


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
        _check_side(self)


@dataclass(frozen=True)
class Encoder:
    """An encoder: every token sees every other, but in layers left causal when a decoder became it. `head` is what reads it:
    logits of tokens (masked language models), of labels, or a vector per text; None gives hidden states only.
    """

    width: int
    embedding: Embedding
    stack: Stack
    norm: Norm | None
    head: Head | Classifier | Vector | None
    length: int

    def __post_init__(self):
        _check_side(self)
        for block in self.stack.blocks():
            _require(block.cross is None, "an Encoder reads one text: Block.cross is for decoders")


@dataclass(frozen=True)
class EncoderDecoder:
    """A decoder whose blocks attend to what an encoder made of a source. The two differ in whatever they like.

    `start` are the tokens that the decoder's text begins with. `shared`: both sides read the decoder's table of tokens.
    `projection`: a product with a bias brings the encoder's vectors to the width that the decoder's cross-attention reads.
    """

    encoder: Encoder
    decoder: Decoder
    start: tuple[int, ...]
    shared: bool = True
    projection: bool = False

    def __post_init__(self):
        _require(len(self.start) > 0, "EncoderDecoder.start must hold at least one token")
        crossing = [block.cross for block in self.decoder.stack.blocks() if block.cross is not None]
        _require(len(crossing) > 0, "no block of the decoder attends to the encoder: give some of them a Block.cross")
        widths = {cross.source for cross in crossing}
        _require(len(widths) == 1 and (self.projection or widths == {self.encoder.width}),
                 f"the decoder's Attention.source must be the encoder's width, {self.encoder.width}"
                 f"{', or one other with projection' if not self.projection else ''}, got {sorted(widths)}")
        _require(self.encoder.head is None, "an EncoderDecoder's encoder has no head of its own")
        if self.shared:
            ours, theirs = self.encoder, self.decoder
            sizes = [(side.embedding.vocabulary, side.embedding.width or side.width) for side in (ours, theirs)]
            _require(sizes[0] == sizes[1], "one table of tokens serves both sides only where vocabulary and width are the "
                     f"same, got {sizes[0]} and {sizes[1]}")
        wrong = [token for token in self.start if not 0 <= token < self.decoder.embedding.vocabulary]
        _require(not wrong, f"EncoderDecoder.start holds {wrong}, the decoder's vocabulary has "
                 f"{self.decoder.embedding.vocabulary} tokens")

    @property
    def source(self) -> int:
        """The width of what the decoder's cross-attention reads."""
        return next(block.cross.source for block in self.decoder.stack.blocks() if block.cross is not None)


Config = Decoder | Encoder | EncoderDecoder


def dropless(cfg: Config) -> Config:
    """The same config without `Moe.capacity`, so that no expert drops a token. Of an encoder-decoder the decoder's alone: the
    encoder reads its source in one call in any case."""
    if isinstance(cfg, EncoderDecoder):
        return dataclasses.replace(cfg, decoder=dropless(cfg.decoder))

    def kept(block: Block) -> Block:
        if not isinstance(block.feedforward, Moe):
            return block
        return dataclasses.replace(block, feedforward=dataclasses.replace(block.feedforward, capacity=None))

    groups = tuple(dataclasses.replace(group, pattern=tuple(map(kept, group.pattern))) for group in cfg.stack.groups)
    return dataclasses.replace(cfg, stack=Stack(groups))


TYPES: dict[str, type] = {cls.__name__: cls for cls in (
    RmsNorm, LayerNorm, LinearScaling, DynamicNtkScaling, YarnScaling, Llama3Scaling, LongRopeScaling, Rope, Alibi,
    RelativeBias, Sinusoidal, Learned, QkNorm, Attention, LatentAttention, Dense, ExpertGroups, TopK, ExpertChoice, Hash,
    ReluNorm, Recurrent, AverageKey, CapacityFactor, CapacityTokens, CapacityFraction, Moe, PreNorm, PostNorm, OutputNorm,
    SandwichNorm, ParallelNorm, Block, Group, Stack, Embedding, Transform, Head, Classifier, Vector, Decoder, Encoder,
    EncoderDecoder)}


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
            if data is not None and isinstance(kind, type) and issubclass(kind, enum.Enum):
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
