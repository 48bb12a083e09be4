"""A `Recipe` says all of a training run: the model, what it reads, what it learns from that, how, and on what mesh.

It is what a file in configs/ gives, and `Run` is what becomes of it: compiled, placed, ready to train.
"""

import dataclasses
import functools
import hashlib
import inspect
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree

from jaxlm import config, io, model, objectives, params, sharding
from jaxlm.data.source import Source
from jaxlm.data.stream import Batches, Phase, Plan
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import BytePairs
from jaxlm.objectives import Objective
from jaxlm.training.checkpoint import difference
from jaxlm.training.optimizer import Optimizer
from jaxlm.training.step import Metrics, State, advance, begin
from jaxlm.weight import is_weight

REMAT = {"none": None, "full": jax.checkpoint_policies.nothing_saveable,
         "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
INPUTS = ("inputs", "input_segments")  # of a batch of pairs: as long as `Recipe.inputs`, not `Recipe.length`
CHANGEABLE = ("objective", "phases", "initial")  # of what is known of a run: a checkpoint is of use with others, when meant


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights to begin with, of models that are there already.

    They are read in float32, tensor by tensor, into arrays that are split over the mesh of the run: no device and no host
    holds more than its part, nor of what `jaxlm.adapt` makes of such arrays.

    Attributes:
      paths: of one model or several, as `jaxlm.load` takes them: directories of Hugging Face's layout, which
        `python -m train.export` and `jaxlm.save` write too, GGUF files, or names on the Hub. Kept as a tuple of strings.
      adapt: from these models, in their order, to the one that is trained: a function of `jaxlm.adapt`, as it is or in a
        `functools.partial`, or one's own. None where the one model needs no change. A run is known by this function's name and
        arguments, not by what is in it.

    Raises:
      ValueError: for what is no path, for no path, for several without a function, and for a function that does not take them.

    Example:
      >>> Pretrained("clm_code").paths
      ('clm_code',)
    """

    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    adapt: Callable[..., model.Model] | None = None

    def __post_init__(self) -> None:
        given = (self.paths,) if isinstance(self.paths, str | os.PathLike) else self.paths
        if not isinstance(given, list | tuple) or not all(isinstance(one, str | os.PathLike) for one in given):
            raise ValueError(f"Pretrained.paths is the path of a model, or a tuple of several, got {self.paths!r}")
        object.__setattr__(self, "paths", tuple(map(os.fspath, given)))
        if not self.paths or (len(self.paths) > 1 and self.adapt is None):
            raise ValueError("Pretrained takes the path of a model, or several and a function that makes one of them, got "
                             f"{len(self.paths)} paths and {'no' if self.adapt is None else 'a'} function")
        if self.adapt is None:
            return
        if not callable(self.adapt):
            raise ValueError(f"Pretrained.adapt is a function of models that gives a model, got {self.adapt!r}")
        try:
            signature = inspect.signature(self.adapt)
        except ValueError:  # some of C's have none
            return
        try:
            signature.bind(*self.paths)
        except TypeError as error:
            raise ValueError(f"Pretrained.adapt does not take as many models as there are paths, {len(self.paths)}: {error} of "
                             f"{self.adapt!r}") from error

    def load(self, mesh: Mesh) -> model.Model:
        """The model, its weights split over the mesh.

        Raises:
          ValueError: as `jaxlm.load` and the function, and when that gives something else.
          OSError: as `jaxlm.load`.
        """
        read = [io.load(path, jnp.float32, mesh) for path in self.paths]
        found = read[0] if self.adapt is None else self.adapt(*read)
        if not isinstance(found, model.Model):
            raise ValueError(f"Pretrained.adapt gives a jaxlm.Model, {self.adapt!r} gave a {type(found).__name__}")
        return found


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
      model: what is trained.
      tokenizer: a directory with one, or one that is trained first.
      phases: what is read, one after another.
      held_out: what evaluations read; None for none.
      objective: what is learned, for all steps or a schedule.
      optimizer: with its schedule of the learning rate.
      rows, length: of a batch, over all devices: sequences, and tokens of each; of pairs, of each one's targets.
      steps: updates.
      inputs: tokens of the inputs of each sequence, where the objective makes pairs; None where it makes texts.
      pieces: that a batch is taken in, one after another, where it does not fit at once.
      cut: whether documents are cut to fill rows, see `jaxlm.data.stream.Plan`.
      mesh: (axis, size) of `jaxlm.sharding.mesh`; by default all devices are of the axis "data".
      dtype: of the computation; the weights are float32. None is bfloat16 on accelerators and float32 on CPUs.
      remat: what of a block is computed again in the backward pass: "none", "full" (all), "products" (all but products with
        weights).
      smoothing, z: see `jaxlm.objectives.cross_entropy`.
      routing: losses of the routers of mixtures of experts; None for none. Not for objectives with a loss of their own.
      average: share of the old average of the weights that a step keeps; None for no average.
      seed: of weights, order and examples.
      checkpoint_every, evaluate_every: steps; None at the end only.
      evaluation_batches: read by an evaluation, always the same ones.
      initial: the weights before the first step, with the tokenizer that they were made with: the path of a model, see
        `Pretrained`, or one that says what is made of it. None begins with random ones. A run that goes on does so from its own
        checkpoint. Weights that only training has, like a momentum encoder's, begin as they would, a copy as what it copies.
      evaluation: what they ask, whatever is learned meanwhile, with the loss of that or the common one. None is the next token
        of plain text, so that bits per byte are those of the text; for models that do not learn it, the objective of the last
        phase. Of pairs, bits per byte are those of the targets.
    """

    model: config.Config
    tokenizer: str | BytePairs
    phases: tuple[Phase, ...]
    objective: Objective | objectives.Schedule
    optimizer: Optimizer
    rows: int
    length: int
    steps: int
    inputs: int | None = None
    held_out: Phase | None = None
    pieces: int = 1
    cut: bool = True
    mesh: tuple[tuple[str, int], ...] = (("data", -1),)
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: Literal["none", "full", "products"] = "products"
    smoothing: float = 0.0
    z: float = 0.0
    routing: objectives.RoutingLoss | None = None
    average: float | None = None
    seed: int = 0
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    evaluation_batches: int = 8
    evaluation: Objective | None = None
    initial: str | os.PathLike[str] | Pretrained | None = None

    def __post_init__(self) -> None:
        if isinstance(self.initial, str | os.PathLike):
            object.__setattr__(self, "initial", Pretrained(self.initial))
        if not isinstance(self.initial, Pretrained | None):
            raise ValueError(f"initial is the path of a model, a jaxlm.recipe.Pretrained or None, got {self.initial!r}")
        for length, side in self.sides:
            if length > side.length:
                raise ValueError(f"rows of {length} tokens are longer than the model's context of {side.length}")
        if min(self.rows, self.length, self.steps, self.pieces, self.evaluation_batches) < 1:
            raise ValueError("rows, length, steps, pieces and evaluation_batches are at least 1, got "
                             f"{self.rows}, {self.length}, {self.steps}, {self.pieces} and {self.evaluation_batches}")
        if self.rows % self.pieces:
            raise ValueError(f"a batch of {self.rows} rows cannot be taken in {self.pieces} pieces")
        if self.remat not in REMAT or self.dtype not in (None, *DTYPES):
            raise ValueError(f"remat is one of {', '.join(REMAT)}, dtype one of {', '.join(DTYPES)}, got {self.remat!r} and "
                             f"{self.dtype!r}")
        axes = [axis for axis, _ in self.mesh]
        if len(set(axes)) < len(axes):
            raise ValueError(f"the mesh names an axis twice: {' '.join(f'{axis}={size}' for axis, size in self.mesh)}")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average is between 0 and 1, or None, got {self.average}")
        for one in self.objectives:
            one.check(self.model)
        pairs = [one for one in self.objectives if one.makes == "pair"]
        if pairs and (self.inputs is None or self.inputs < 1):
            raise ValueError(f"{type(pairs[0]).__name__} makes pairs: Recipe.inputs says how many tokens of inputs a row has, "
                             f"at least 1, got {self.inputs}")
        if not pairs and self.inputs is not None:
            raise ValueError(f"{type(self.objectives[0]).__name__} makes texts, which have no inputs: leave out Recipe.inputs, "
                             f"got {self.inputs}")
        if self.routing is not None and self.own is not None:
            raise ValueError(f"{type(self.own).__name__} has a loss of its own, to which routers' are not added: leave out "
                             "Recipe.routing")
        routers = {block.feedforward.router for _, side in self.sides for block in side.stack.blocks()
                   if isinstance(block.feedforward, config.Moe)}
        if self.routing is not None and not routers:
            raise ValueError("Recipe.routing is for models with mixtures of experts (jaxlm.config.Moe), and this has none")
        other = [router for router in routers if not isinstance(router, config.TopK | config.Recurrent | config.AverageKey)]
        if self.routing is not None and other:
            raise ValueError(f"Recipe.routing is for routers that choose by probabilities, {type(other[0]).__name__} has none")
        choices = [router.choice if isinstance(router, config.Recurrent) else router for router in routers]
        if self.own is not None and any(isinstance(one, config.TopK) and one.correction for one in choices):
            raise ValueError(f"{type(self.own).__name__} has a loss of its own, which moves no router's corrections: leave out "
                             "TopK.correction")
        evaluated = self.objectives[-1].own
        if evaluated not in (None, self.own):
            raise ValueError(f"evaluations have the loss of what is learned or the common one, got that of {evaluated}")

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives of all phases, then that of evaluations."""
        learned = (self.objective,)
        if isinstance(self.objective, objectives.Schedule):
            learned = tuple(one for one, _ in self.objective.phases)
        plain = learned[-1].makes == "decoder" and learned[-1].own is None
        plain = plain and not all(isinstance(one, objectives.AsPrefix) for one in learned)
        default = objectives.CausalLM() if plain else learned[-1]
        return (*learned, default if self.evaluation is None else self.evaluation)

    @property
    def own(self) -> Objective | None:
        """The objective whose own loss is learned; None where it is every objective's."""
        return objectives.sharing(self.objectives[:-1])

    @property
    def sides(self) -> tuple[tuple[int, config.Decoder | config.Encoder], ...]:
        """For every sequence of a row: how many tokens it has, and what reads it."""
        if isinstance(self.model, config.EncoderDecoder):
            return ((self.inputs or 0, self.model.encoder), (self.length, self.model.decoder))
        return tuple((length, self.model) for length in (self.inputs, self.length) if length is not None)

    @property
    def tokens(self) -> int:
        """Of a batch, inputs and targets."""
        return self.rows * sum(length for length, _ in self.sides)

    def about(self) -> dict[str, Any]:
        """What must be the same for a checkpoint of one recipe to be of use to another, as plain JSON; those in `CHANGEABLE`
        may differ when that is meant. Of the optimizer that is what its moments depend on, not rates."""
        one = self.optimizer
        moments = {"kind": type(one.kind).__name__, "clip": one.clip is not None, "decay": bool(one.kind.weight_decay),
                   "multipliers": bool(one.multipliers), "frozen": list(one.frozen)}
        if one.freeze is not None:
            moments["freeze"] = list(one.freeze.paths)
        phases = [{"sources": [[_said(source), share] for source, share in phase.sources], "steps": phase.steps}
                  for phase in self.phases]
        inputs = {} if self.inputs is None else {"inputs": self.inputs}
        initial = {} if self.initial is None else {"initial": _said(self.initial)}
        return {"model": config.to_dict(self.model), "optimizer": moments, "average": self.average is not None,
                "rows": self.rows, "length": self.length, **inputs, "seed": self.seed, "cut": self.cut,
                "number of phases": len(phases), "objective": _said(self.objective), "phases": phases, **initial}


def _said(one: Any) -> str:
    """As Python shows it, but arrays by their hash, and without the addresses of what has no form of its own: they are others
    in every process."""
    if isinstance(one, np.ndarray):
        return f"{one.dtype}{list(one.shape)} {hashlib.blake2b(one.tobytes(), digest_size=8).hexdigest()}"
    if isinstance(one, tuple):
        return f"({', '.join(map(_said, one))})"
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        fields = ", ".join(f"{field.name}={_said(getattr(one, field.name))}" for field in dataclasses.fields(one))
        return f"{type(one).__name__}({fields})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(one))


def _without_lengths(cfg: config.Config) -> dict[str, Any]:
    """A config as plain JSON, but for the longest texts that its sides are asked to read."""
    found = config.to_dict(cfg)
    return {name: {inner: one for inner, one in part.items() if inner != "length"} if isinstance(part, dict) else part
            for name, part in found.items() if name != "length"}


def identity(tokenizer: Tokenizer) -> str:
    """A tokenizer's size and a hash of what it does: its tokens, the one that ends documents, how it cuts a sample. Files that
    another version has written say the same."""
    sample = "The 1st line, THEN: x_1 += 23.50\n\n\tdef naïve(é):  # 日本語 🙂\r\n"
    does = tokenizer.token_bytes(), tokenizer.eos_id, tokenizer.encode(sample, parse_special=False)
    return f"{tokenizer.size} tokens, {hashlib.blake2b(repr(does).encode(), digest_size=8).hexdigest()}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Opened(Source):
    """Documents that were opened before."""

    documents: Sequence[str]

    def open(self) -> Sequence[str]:
        """They themselves."""
        return self.documents


def _opened(phase: Phase) -> Phase:
    """The phase with its sources open, and the first document of each read: what is wrong with them is known now."""
    def opened(source: Source) -> _Opened:
        documents = source.open()
        if not len(documents):
            raise ValueError(f"{source} has no documents")
        documents[0]
        return _Opened(documents)
    return dataclasses.replace(phase, sources=tuple((opened(source), share) for source, share in phase.sources))


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """A document's tokens with the tokenizer's own beginning, and its end behind them; picklable, for workers."""

    tokenizer: Tokenizer

    def __call__(self, document: str) -> list[int]:
        # A document that quotes a special token's name does not contain that token.
        found = self.tokenizer.encode(document, parse_special=False)
        end = self.tokenizer.eos_id
        return found if end is None or (found and found[-1] == end) else [*found, end]


@dataclasses.dataclass(frozen=True)
class _At:
    """The objective of a step, see `jaxlm.data.stream.Plan`; picklable, for workers."""

    objective: Objective | objectives.Schedule

    def __call__(self, step: int) -> Objective:
        return self.objective.at(step) if isinstance(self.objective, objectives.Schedule) else self.objective


class Program:
    """A recipe's step for some devices, which may be described only: nothing is read, nothing computed.

    Attributes:
      mesh: of the devices.
      spec: of the weights, with those that only training has under "extra".
      carry: of what the loss hands on from step to step.
    """

    sizes: np.ndarray | None = None  # UTF-8 bytes of every token, where there is a tokenizer

    def __init__(self, recipe: Recipe, devices: Any = None) -> None:
        """
        Raises:
          ValueError: for a mesh larger than the machine, a batch that it does not divide, patterns of paths that match none.
        """
        self.recipe = recipe
        self.mesh = mesh_of(recipe, devices)
        learned = recipe.own or Objective()
        extra = learned.extra(recipe.model)
        self.spec = model.spec(recipe.model) | ({"extra": extra} if extra else {})
        self.carry = learned.carry(recipe.model)
        self.transform = recipe.optimizer.transform(self.spec)

    @property
    def dtype(self) -> Any:
        """Of the computation."""
        platform = self.mesh.devices.flat[0].platform
        return DTYPES[self.recipe.dtype or ("float32" if platform == "cpu" else "bfloat16")]

    @property
    def prefixes(self) -> bool:
        """Whether examples may begin with what all of them may see; encoders see everything as it is."""
        return any(one.prefixes and one.makes == "decoder" for one in self.recipe.objectives)

    @property
    def flops_per_token(self) -> float:
        """Of a step of training, without what remat adds: 6 for every weight in a product, and attention's own products; the
        mean over the tokens of a row, inputs and targets. What a loss of an objective's own does besides is not known here.

        Reference: Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311; here causal scores count half, and of
        windows what lies in them.
        """
        products, inputs = 0.0, self.recipe.inputs or 0
        for length, side in self.recipe.sides:
            products += length * model.products(side)
            for block in side.stack.blocks():
                window = min(length, block.attention.window or length)
                behind = window - window**2 / (2 * length)  # the mean: a row's first tokens have fewer before them
                products += length * block.attention.pair * behind * (1 if block.attention.causal else 2)
                if block.cross is not None:
                    products += length * block.cross.pair * inputs
                    # Keys and values are made of the inputs.
                    products += (inputs - length) * 2 * block.cross.source * block.cross.kv_heads * block.cross.head_width
        if isinstance(self.recipe.model, config.EncoderDecoder) and self.recipe.model.projection:
            products += inputs * self.recipe.model.encoder.width * self.recipe.model.source
        return 6.0 * products * self.recipe.rows / self.recipe.tokens

    def loss(self, params: PyTree, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree,
             learned: Objective | None = None) -> tuple[objectives.Loss, PyTree]:
        """The loss of a batch, and what it hands on.

        Args:
          learned: whose; default that of what the recipe learns.
        """
        one = self.recipe
        # Evaluations say whose loss, and have none of the routers.
        beside = {} if learned is not None or one.routing is None else {"routing": one.routing}
        learned = learned or one.own or Objective()
        return learned.loss(params, one.model, batch, key, carry, sizes=self.sizes, prefixes=self.prefixes,
                            smoothing=one.smoothing, z=one.z, dtype=self.dtype, remat=REMAT[one.remat], **beside)

    def step(self, skip: bool = False) -> Callable[[State, PyTree], tuple[State, Metrics]]:
        """One update, to be compiled; consumes the state.

        Args:
          skip: leave everything as it is where the loss is not finite.
        """
        one = self.recipe

        def update(state: State, batch: PyTree) -> tuple[State, Metrics]:
            state, metrics = advance(self.loss, self.transform, state, batch, pieces=one.pieces, keep=one.average, skip=skip)
            aux = dict(metrics.aux)
            if "correct" in aux:
                aux["accuracy"] = aux.pop("correct")
            if "bytes" in aux:
                aux["bits_per_byte"] = aux["nll"] / jnp.maximum(aux.pop("bytes"), 1e-9) / np.float32(np.log(2))
            return state, metrics.replace(aux=aux)

        return jax.jit(update, donate_argnums=0, out_shardings=(self.shardings, None))

    @functools.cached_property
    def shardings(self) -> State:
        """Of the state: moments lie as their weights do."""
        weights, shapes = (params.paths(tree) for tree in (sharding.shardings(self.spec, self.mesh), self.spec))
        alone = NamedSharding(self.mesh, PartitionSpec())

        def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            # A moment's path ends in its weight's; one that is reduced (Adafactor's) has another shape.
            for start in range(len(path)):
                name = jax.tree_util.keystr(path[start:], simple=True, separator="/")
                if name in weights and leaf.shape == shapes[name].shape:
                    return weights[name]
            return alone
        found = jax.tree_util.tree_map_with_path(of, self._shapes)
        return found.replace(carry=sharding.shardings(self.carry, self.mesh))

    @functools.cached_property
    def _shapes(self) -> State:
        # The key too as a shape: a mesh of devices that are not here makes no arrays.
        return jax.eval_shape(self._begin, jax.eval_shape(functools.partial(jax.random.key, 0)))

    def _begin(self, key: Key[Array, ""], given: PyTree = None) -> State:
        first, rest = jax.random.split(key)
        weights, carry = (params.init(spec, first) for spec in (self.spec, self.carry))
        if given is not None:
            weights, shapes = weights | given, params.paths(given)

            def follow(path: tuple[Any, ...], leaf: Array) -> Array:
                same = shapes.get(jax.tree_util.keystr(path, simple=True, separator="/"))
                return leaf if same is None or same.shape != leaf.shape else same.astype(leaf.dtype)
            carry = jax.tree_util.tree_map_with_path(follow, carry)
        return begin(weights, self.transform, rest, self.recipe.average is not None, carry)

    def abstract(self) -> State:
        """The state's shapes, dtypes and shardings, for reading a checkpoint and for compiling without devices."""
        return jax.tree.map(lambda leaf, over: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=over), self._shapes,
                            self.shardings)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The same of a batch."""
        def shape(name: str) -> tuple[int, int]:
            return self.recipe.rows, (self.recipe.inputs or 0) if name in INPUTS else self.recipe.length

        return {name: jax.ShapeDtypeStruct(shape(name), jnp.float32 if name == "weights" else jnp.int32, sharding=over)
                for name, over in self.batch_shardings().items() if name != "state"}

    def batch_shardings(self, objective: Objective | None = None) -> dict[str, NamedSharding]:
        """Of a batch's arrays.

        Args:
          objective: what makes its examples; default what the recipe learns.
        """
        def over(axes: tuple[str | None, ...], length: int) -> NamedSharding:
            return NamedSharding(self.mesh, sharding.partition(axes, (self.recipe.rows, length), self.mesh.shape))

        found = dict.fromkeys(("targets", "weights", "segments"), over(("batch", "length"), self.recipe.length))
        if (objective or self.recipe.objectives[0]).makes == "pair":
            found |= dict.fromkeys(INPUTS, over(("batch", "length"), self.recipe.inputs or 0))
        else:
            found |= dict.fromkeys(("tokens", *(["prefix"] if self.prefixes else [])), found["targets"])
        return found | {"state": over(("batch", None), 1)}


class Run(Program):
    """A recipe on the devices at hand, with its data.

    Attributes:
      tokenizer: loaded.
      phases, held_out: the recipe's, opened.
    """

    def __init__(self, recipe: Recipe, devices: Any = None) -> None:
        """
        Raises:
          ValueError: as `Program`, for data that is not there, and for a tokenizer with more tokens than the model.
        """
        super().__init__(recipe, devices)
        self.phases = tuple(map(_opened, recipe.phases))
        self.held_out = None if recipe.held_out is None else _opened(recipe.held_out)
        directory = recipe.tokenizer.directory() if isinstance(recipe.tokenizer, BytePairs) else pathlib.Path(recipe.tokenizer)
        self.tokenizer = Tokenizer.from_directory(directory)
        vocabularies = [side.embedding.vocabulary for _, side in recipe.sides]
        if self.tokenizer.size > min(vocabularies):
            raise ValueError(f"the tokenizer in {directory} has {self.tokenizer.size} tokens, the model a vocabulary of "
                             f"{min(vocabularies)}: it needs at least as many")
        self.sizes = np.zeros(vocabularies[-1], np.int32)
        self.sizes[:self.tokenizer.size] = [len(token) for token in self.tokenizer.token_bytes()]

    def about(self) -> dict[str, Any]:
        """As the recipe's, with the tokenizer."""
        return {"tokenizer": identity(self.tokenizer), **self.recipe.about()}

    @functools.cached_property
    def plan(self) -> Plan:
        """Of the batches."""
        one = self.recipe
        inputs = one.inputs if one.objectives[0].makes == "pair" else None
        return Plan(self.phases, _Encoder(self.tokenizer), self._at(one.objective), one.rows, one.length, one.seed, one.cut,
                    inputs)

    def _at(self, objective: Objective | objectives.Schedule) -> _At:
        edges = tuple(token for token in (self.tokenizer.bos_id, self.tokenizer.eos_id) if token is not None)

        def told(one: Objective) -> Objective:
            return objectives.told(one, edges, self.tokenizer)

        if isinstance(objective, objectives.Schedule):
            return _At(objectives.Schedule(tuple((told(one), steps) for one, steps in objective.phases)))
        return _At(told(objective))

    @functools.cached_property
    def rows(self) -> list[int]:
        """The rows of a batch that this process's devices have."""
        places = self.batch_shardings()["targets"].addressable_devices_indices_map((self.recipe.rows, self.recipe.length))
        return sorted({row for index in places.values() for row in range(*index[0].indices(self.recipe.rows))})

    def place(self, batch: Mapping[str, np.ndarray], objective: Objective | None = None) -> dict[str, Array]:
        """A batch's rows of this process, as arrays over all devices; of this objective's examples, or of what is learned."""
        where = {row: place for place, row in enumerate(self.rows)}

        def put(name: str, over: NamedSharding) -> Array:
            mine = batch[name]

            def part(index: tuple[slice, ...]) -> np.ndarray:
                first, last, _ = index[0].indices(self.recipe.rows)
                return mine[where[first]:where[last - 1] + 1, *index[1:]]
            return jax.make_array_from_callback((self.recipe.rows, *mine.shape[1:]), over, part)

        return {name: put(name, over) for name, over in self.batch_shardings(objective).items()}

    def batches(self, rows: Any = None, step: int = 0, workers: int = 0) -> Batches:
        """This process's batches from a step on.

        Args:
          rows: their state, of all rows, as a checkpoint has it.
        """
        return Batches(self.plan, self.rows, state=None if rows is None else whole(rows), step=step, workers=workers)

    def begin(self) -> State:
        """The state before the first step.

        Raises:
          ValueError: as `Pretrained.load`, and for weights of another model or made with another tokenizer than the recipe's.
        """
        given = () if self.recipe.initial is None else (self._given(self.recipe.initial),)
        with jax.set_mesh(self.mesh):
            return jax.jit(self._begin, out_shardings=self.shardings)(jax.random.key(self.recipe.seed), *given)

    def _given(self, initial: Pretrained) -> PyTree:
        """The weights that are there already, where those of the recipe lie."""
        found, which, wanted = initial.load(self.mesh), ", ".join(initial.paths), self.recipe.model
        spec = model.spec(wanted)
        shapes, weights = params.paths(spec), params.paths(found.params, is_leaf=is_weight)
        for path in [*shapes, *(path for path in weights if path not in shapes)]:
            theirs = tuple(weights[path].shape) if path in weights else "missing"
            ours = shapes[path].shape if path in shapes else "no such weight"
            if theirs != ours:
                raise ValueError(f"the weights of {which} are not those of the recipe's model: {path} is {theirs}, the "
                                 f"recipe's is {ours}; Pretrained.adapt may make one of the other")
            if is_weight(weights[path]):
                raise ValueError(f"the weights of {which} cannot be trained: {path} is a {type(weights[path]).__name__}, it "
                                 "has to be a plain array")
        # Weights that fit can be those of another model all the same: causal or not, another rotation.
        other = difference(_without_lengths(found.config), _without_lengths(wanted))
        if other is not None:
            raise ValueError(f"the weights of {which} fit the recipe's model, but are of another one: {other}; where that is "
                             "meant, a function as Pretrained.adapt gives them with the recipe's config")
        if found.tokenizer is not None and identity(found.tokenizer) != identity(self.tokenizer):
            raise ValueError(f"the weights of {which} were made with another tokenizer ({identity(found.tokenizer)}) than the "
                             f"recipe's ({identity(self.tokenizer)}); where that is meant, a function as Pretrained.adapt "
                             "gives them without one")
        return jax.tree.map(lambda leaf, over: jax.device_put(leaf.astype(jnp.float32), over), found.params,
                            sharding.shardings(spec, self.mesh))

    def abstract_rows(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of what batches keep."""
        return jax.ShapeDtypeStruct((self.recipe.rows, self.plan.width), jnp.int32, sharding=self.batch_shardings()["state"])

    def evaluation(self) -> Callable[..., dict[str, float]] | None:
        """The loss on the held-out batches, the same every time, and what else it tells: accuracy and bits per byte, where
        tokens are asked; of the weights and of what the loss hands on, where it does. None without held-out data."""
        one = self.recipe
        if self.held_out is None:
            return None
        asked = one.objectives[-1]
        inputs = one.inputs if asked.makes == "pair" else None
        plan = dataclasses.replace(self.plan, phases=(self.held_out,), objective=self._at(asked), seed=one.seed + 1,
                                   inputs=inputs)
        with Batches(plan, self.rows, ahead=0) as found:
            kept = [self.place(next(found), asked) for _ in range(one.evaluation_batches)]
        for batch in kept:
            del batch["state"]

        learned = asked.own or Objective()

        @jax.jit
        def measure(weights: PyTree, batch: PyTree, carry: PyTree) -> tuple[dict[str, Array], PyTree]:
            loss, carry = self.loss(weights, batch, jax.random.key(0), carry, learned)
            return {"sum": loss.sum, "weight": loss.weight, **loss.aux}, carry

        def evaluate(weights: PyTree, carry: PyTree = ()) -> dict[str, float]:
            sums: dict[str, float] = {}
            for batch in kept:
                more, carry = measure(weights, batch, carry)
                sums = {name: sums.get(name, 0.0) + float(value) for name, value in jax.device_get(more).items()}
            total, weight = sums.pop("sum"), sums.pop("weight")
            if not weight or not sums.get("bytes", 1):
                raise ValueError("the held-out batches ask for nothing: their documents hold no text")
            size, nll, correct = (sums.pop(name, None) for name in ("bytes", "nll", "correct"))
            found = {"loss": (total if nll is None else nll) / weight}
            if correct is not None:
                found["accuracy"] = correct / weight
            if size is not None:
                found["bits_per_byte"] = found["loss"] * weight / size / math.log(2)
            return found | {name: value / weight for name, value in sums.items()}

        return evaluate


def whole(rows: Any) -> np.ndarray:
    """An array over all processes, on this one."""
    if isinstance(rows, jax.Array) and not rows.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(rows, tiled=True))
    return np.asarray(rows)


def mesh_of(recipe: Recipe, devices: Any = None) -> Mesh:
    """The recipe's mesh.

    Raises:
      ValueError: when it needs more devices than there are, or does not divide the batch.
    """
    found = sharding.mesh(devices=devices, **dict(recipe.mesh))
    ways = found.shape["data"] * found.shape["fsdp"]
    if recipe.rows % (ways * recipe.pieces):
        pieces = f" and {recipe.pieces} pieces" if recipe.pieces > 1 else ""
        raise ValueError(f"a batch of {recipe.rows} rows does not divide over {ways} devices (axes data and fsdp){pieces}: it "
                         f"needs a multiple of {ways * recipe.pieces}")
    return found
