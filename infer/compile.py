"""Compiles a model's prefill and decoding loop for TPUs on a machine that has none, and says what the compiler made of them.

python -m infer.compile --model configs/llama3_8b.py --topology v5e:2x2 --batch 8 --length 4096
python -m infer.compile --model configs/llama3_8b.py --topology v6e:1x1 --batch 1 --weights int8 --drafter recycling --tree 32

The real TPU compiler (libtpu) runs anywhere; nothing is executed and no weights are read. What is printed are its facts:
whether it fits, what a step reads and sends, whether the loop copies its cache. They are no measurement of speed. With a
drafter the loop is that of speculation, a step of it a call of the model on a tree, and the plain loop's is set beside it.
"""

import os

# Before jax is imported: no accelerator of this machine is touched, and libtpu asks no cloud what machine it is on.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import re
import runpy
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies
from jaxtyping import PyTree
from rich.table import Table

from infer import hlo, session
from jaxlm import cache as caching
from jaxlm import config, params, sharding
from jaxlm import model as models
from jaxlm.decoding import generate, loop
from jaxlm.decoding.logits import Settings
from jaxlm.decoding.speculative import cost, drafters, rules
from jaxlm.decoding.speculative import loop as speculation
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import Drafter
from jaxlm.io import families
from jaxlm.recipe import Recipe
from jaxlm.weight import is_weight, quantize


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compiles a model's prefill and decoding loop for TPUs on a machine that has none."""

    model: pathlib.Path
    """A Python file with a config() like those in configs/, or a Hugging Face config.json or its directory."""
    topology: str = "v5e:2x2"
    """Chip and slice: v5e:1x1, v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1, tpu7x:2x2x1 ..."""
    batch: int = 8
    """Rows generated side by side."""
    length: int = 4096
    """Tokens that a row may hold, prompt and answer together; the cache has a slot for each."""
    prompt: int | None = None
    """The longest prompt; default all but 128 tokens (or half) of the length. It is padded as generation pads it. Of an
    encoder-decoder the tokens that its text begins with, by default as many as the model's."""
    source: int = 512
    """The longest source of an encoder-decoder, padded likewise."""
    weights: Literal["bfloat16", "int8"] = "bfloat16"
    """How matrices are stored; int8 has a bfloat16 scale per output. Everything else is bfloat16."""
    mesh: str = "model=-1"
    """How the slice is split: sizes of data, fsdp, model; -1 is what the others leave. Default: tensor parallel."""
    sample: bool = False
    """Draw tokens with temperature, top-k and top-p, in place of taking the likeliest."""
    drafter: str = "none"
    """Speculates: lookup, recycling, lookup+recycling, or auto, which chooses a tree's size by the chip's roofline."""
    tree: str | None = None
    """Nodes of a drafted tree, or chain:5 for five tokens in a row; default the drafter's own."""
    json: bool = False
    """Print one JSON object on the last line of standard output, and the table for people on standard error."""


def read_config(path: pathlib.Path) -> config.Decoder | config.EncoderDecoder:
    """Raises:
      ValueError: for a path that is neither a Python file with a config() nor a config.json, and for an encoder.
    """
    cfg = _read_config(path)
    if isinstance(cfg, config.Encoder):
        raise ValueError(f"{path} is an encoder, which generates nothing")
    return cfg


def _read_config(path: pathlib.Path) -> config.Config:
    if path.suffix == ".py" and path.is_file():
        make = runpy.run_path(str(path)).get("config")
        given = make() if callable(make) else None
        cfg = given.model if isinstance(given, Recipe) else given
        if not isinstance(cfg, config.Config):
            raise ValueError(f"{path} has no function config() that gives a jaxlm.recipe.Recipe or a model's config")
        return cfg
    file = path / "config.json" if path.is_dir() else path
    if file.suffix != ".json" or not file.is_file():
        raise ValueError(f"{path} is neither a Python file with a config(), nor a config.json or a directory that holds one")
    return families.read(json.loads(file.read_text(encoding="utf-8")))


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The chips of a slice, or of several alike, that this machine does not have.

    Raises:
      ValueError: without libtpu, and for a slice that it does not know.
    """
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError("the TPU compiler is not installed; it comes with jaxlm's extra: pip install 'jaxlm[tpu]' "
                         "(Linux on x86-64)") from error
    reasons = []
    for bounds in ({}, {"chips_per_host_bounds": (1, 1, 1)}):  # the second for slices smaller than a host
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds,
                                                **({"num_slices": slices} if slices > 1 else {})).devices
        except jax.errors.JaxRuntimeError as error:
            reasons.append(str(error))
    raise ValueError(f"libtpu knows no slice {topology!r} ({reasons[0]}); they are written v5e:2x2, v6e:1x1, v5p:2x2x1")


def make_mesh(topology: str, split: str) -> jax.sharding.Mesh:
    """The mesh over a slice that this machine does not have.

    Raises:
      ValueError: as `devices`, and for a split that does not fit the slice.
    """
    try:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in split.split(","))}
    except ValueError as error:
        raise ValueError(f"a mesh is given as data=2,model=-1, got {split!r}") from error
    return sharding.mesh(devices=devices(topology), **sizes)


def abstract_weights(cfg: config.Config, mesh: jax.sharding.Mesh, kind: str) -> PyTree:
    """The shapes of a model's weights and how they are split, Int8 where products read them if `kind` says so."""
    spec = models.spec(cfg)

    def one(param: params.Param) -> Any:
        weight = jax.ShapeDtypeStruct(param.shape, jnp.bfloat16)
        if kind == "int8" and param.inputs:
            return jax.eval_shape(functools.partial(quantize, inputs=param.inputs), weight)
        return weight

    tree = jax.tree.map(one, spec)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree,
                        sharding.match(tree, spec, mesh))


def read_tree(text: str | None) -> int | trees.Template | None:
    """Raises:
      ValueError: for what is neither a number of nodes nor a chain.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(chain:)?(\d+)", text)
    if found is None:
        raise ValueError(f"a tree is given as a number of nodes or as chain:5, got {text!r}")
    return trees.chain(int(found[2])) if found[1] else int(found[2])


def nbytes(tree: PyTree) -> int:
    """Bytes that abstract arrays take on each chip."""
    return sum(_shard(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shard(leaf: jax.ShapeDtypeStruct) -> int:
    """Numbers of an abstract array that each chip holds."""
    return math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape))


UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes there are) on a chip, as the compiler's error says; None for another error."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if found is None:
        return None
    return round(float(found[1]) * UNITS[found[2]]), round(float(found[3]) * UNITS[found[4]])


def usable_bytes(mesh: jax.sharding.Mesh) -> int:
    """Memory of a chip that programs can use: what the compiler says when it refuses one that is far too large."""
    huge = jax.ShapeDtypeStruct((1 << 32, 1 << 12), jnp.int8, sharding=jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))
    try:
        jax.jit(lambda x: -x).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if limits := out_of_memory(str(error)):
            return limits[1]
        raise
    raise AssertionError("a program of 16 TiB fits on one chip")


@dataclasses.dataclass(frozen=True)
class Program:
    """What became of one program: `text` is its HLO, `needed` bytes per chip, by the compiler's error where it does not fit."""

    compiled: Any
    text: str | None
    needed: int
    temporary: int | None
    seconds: float
    host_transfers: int

    def summary(self) -> dict[str, Any]:
        """What is printed of it."""
        return {"fits": self.compiled is not None, "needed_bytes": self.needed, "temporary_bytes": self.temporary,
                "compile_s": self.seconds}


def build(lowered: Any) -> Program:
    """Compiles.

    Raises:
      jax.errors.JaxRuntimeError: for every failure but too little memory.
    """
    transfers, began = hlo.host_transfers(lowered.as_text()), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # The compiler writes its text itself: jaxlib's own reading of it fails for instructions that jaxlib does not know.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            limits = out_of_memory(str(error))
            if limits is None:
                raise
            return Program(None, None, limits[0], None, time.perf_counter() - began, transfers)
        seconds = time.perf_counter() - began
        [written] = pathlib.Path(folder).glob("*.jit_*.after_optimizations.txt")
        text = written.read_text(encoding="utf-8")
    memory = compiled.memory_analysis()
    needed = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return Program(compiled, text, needed, memory.temp_size_in_bytes, seconds, transfers)


def side(cfg: config.Decoder | config.EncoderDecoder) -> config.Decoder:
    """What writes text."""
    return cfg.decoder if isinstance(cfg, config.EncoderDecoder) else cfg


def least_bytes(cfg: config.Decoder, weights: PyTree, cache: PyTree, chips: int) -> int:
    """Bytes per chip and step: its part of every weight that a product reads and an even part of the whole cache (with the
    source's keys and values), once.

    Weights small enough to stay on the chip from step to step make less possible.
    """
    # What makes a source's keys and values has done so before the first step.
    read = params.paths(weights["decoder"], is_leaf=is_weight)
    tree = {path: leaf for path, leaf in read.items() if not re.search("^embedding/|cross_attention/[kv](_|$)", path)}
    embedding = weights["decoder"]["embedding"]
    stored = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return nbytes(tree) + stored // chips + (nbytes(embedding["tokens"]) if cfg.head.tied else 0)


def least_flops(cfg: config.Decoder, tokens: int, slots: int, chips: int, source: int = 0) -> float:
    """FLOPs per chip and step of the model's products alone, evenly split: so many tokens against all slots of a row each, and
    all of its source's."""
    count = models.products(cfg)
    for block in cfg.stack.blocks():
        latent = isinstance(block.attention, config.LatentAttention)
        count += (block.attention.latent_pair if latent else block.attention.pair) * slots
        if block.cross is not None:
            count += block.cross.pair * source
            count -= 2 * block.cross.source * block.cross.kv_heads * block.cross.head_width  # done before the first step
    return 2 * tokens * count / chips


def doubled(cfg: config.Decoder | config.EncoderDecoder, group: int) -> config.Decoder | config.EncoderDecoder:
    """One group's pattern (the decoder's) twice, repeated half as often: the compiler then counts its body twice."""
    if isinstance(cfg, config.EncoderDecoder):
        return dataclasses.replace(cfg, decoder=doubled(cfg.decoder, group))
    groups = list(cfg.stack.groups)
    old = groups[group]
    groups[group] = config.Group(old.pattern * 2, max(old.repeats // 2, 1))
    return dataclasses.replace(cfg, stack=config.Stack(tuple(groups)))


class Check:
    """The two programs that generation runs, for one model, slice, batch and length."""

    def __init__(self, arguments: Arguments):
        """Raises:
          ValueError: for sizes that are not positive, lengths that do not fit each other or the model, or an unknown drafter.
        """
        self.arguments, self.whole = arguments, read_config(arguments.model)
        self.config = side(self.whole)
        encodes = isinstance(self.whole, config.EncoderDecoder)
        batch, length, context = arguments.batch, arguments.length, self.config.length
        usual = len(self.whole.start) if encodes else max(length - 128, length // 2)
        prompt = usual if arguments.prompt is None else arguments.prompt
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 1 <= prompt < length <= context:
            raise ValueError(f"it must hold that 1 <= prompt ({prompt}) < length ({length}) <= the model's context ({context})")
        self.mesh = make_mesh(arguments.topology, arguments.mesh)
        self.prompt = generate.prompt_width([[0] * prompt], context) if encodes else min(generate.bucket(prompt), context)
        self.source = min(generate.bucket(arguments.source), self.whole.encoder.length) if encodes else 0
        if encodes and not 1 <= arguments.source <= self.whole.encoder.length:
            raise ValueError(f"source must be 1 to the encoder's context, {self.whole.encoder.length}, got {arguments.source}")
        self.capacity = generate.bucket(length - prompt)
        row = jax.ShapeDtypeStruct((batch,), jnp.int32)
        number = jax.ShapeDtypeStruct((batch,), jnp.float32)
        settings = Settings(temperature=number, top_k=row, top_p=number) if arguments.sample else Settings()
        keys = jax.eval_shape(lambda: generate.row_keys(0, batch))
        self.request = loop.Request(keys, row, jax.ShapeDtypeStruct((4,), jnp.int32), settings, None, None)
        self.seconds: tuple[float, ...] = ()
        self.drafter = None if arguments.drafter == "none" else self._drafter(arguments.drafter, read_tree(arguments.tree))
        if self.drafter is None and arguments.tree is not None:
            raise ValueError("a tree is for speculation: name a drafter with it")

    def _drafter(self, name: str, tree: int | trees.Template | None) -> Drafter:
        """As generation makes it; where that measures what a call costs, the chip's roofline stands in, kept as `seconds`."""
        if name == "auto":
            if isinstance(tree, trees.Template):
                raise ValueError("auto puts its nodes where they are likeliest, in no fixed template: give a number of nodes")
            device, batch = self.mesh.devices.flat[0], self.arguments.batch
            if (chip := cost.chip(device.device_kind)) is None:
                raise ValueError(f"auto needs the bandwidth and FLOP/s of {device.device_kind!r}, which are known of "
                                 f"{', '.join(cost.CHIPS)} only")
            weights = self.weights(self.whole)
            cache = caching.spec(self.config.stack, batch, generate.bucket(self.arguments.length, 64), jnp.bfloat16)
            chips = self.mesh.size
            kept = (cache.layers, self._memory())
            everything = least_bytes(self.config, weights, kept, chips) * chips

            def read(tokens: int) -> float:
                return everything - cost.unread(self.config, weights, tokens)

            sizes = cost.budgets([device], batch, 64 if tree is None else tree, read)
            self.seconds = tuple(cost.roofline(chip, read, models.products(self.config), batch, sizes, chips=chips).tolist())
            made = drafters.automatic(sizes, self.seconds)
        elif name.startswith("layers:"):
            raise ValueError("the first layers as a drafter are not compiled here; there are "
                             f"{', '.join(drafters.NAMES)}, several joined by '+', and auto")
        else:
            made = drafters.make(name, tree, None, self.arguments.batch)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), made)

    def _memory(self) -> PyTree:
        """The source's keys and values, abstract; None without one."""
        if not self.source:
            return None
        shape = (self.arguments.batch, self.source)
        encoded = caching.Memory(jax.ShapeDtypeStruct((*shape, self.whole.source), jnp.bfloat16), None,
                                 jax.ShapeDtypeStruct(shape, jnp.int32))
        weights = params.abstract(models.spec(self.whole), jnp.bfloat16)
        return jax.eval_shape(lambda tree, one: models.remember(tree, self.whole, one).layers, weights, encoded)

    @property
    def slots(self) -> int:
        """Of the cache, as generation has them: what a call rejects is written behind the last token."""
        slack = 0 if self.drafter is None else self.drafter.depth
        return max(generate.slots_for(self.arguments.length, slack), self.prompt)

    def weights(self, cfg: config.Config) -> PyTree:
        """Abstract weights on the mesh."""
        return abstract_weights(cfg, self.mesh, self.arguments.weights)

    def _tokens(self, width: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Rows of tokens and their lengths."""
        batch = self.arguments.batch
        return jax.ShapeDtypeStruct((batch, width), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)

    def _prompts(self) -> dict[str, Any]:
        tokens, lengths = self._tokens(self.prompt)
        source = generate.Source(*self._tokens(self.source)) if self.source else None
        return {"tokens": tokens, "lengths": lengths, "request": self.request, "drafter": self.drafter, "source": source}

    def prefill(self, cfg: config.Decoder | config.EncoderDecoder) -> Any:
        """The prefill, lowered for the slice."""
        return generate._prefill.lower(generate.Forward.of(cfg, None), self.weights(cfg), slots=self.slots,
                                       capacity=self.capacity, logprobs=False, **self._prompts())

    def state(self, cfg: config.Decoder | config.EncoderDecoder, compiled: Any = None) -> loop.State | speculation.State:
        """What the prefill gives, as shapes: split as its compiled program splits it, else as `jaxlm.sharding` says."""
        step = functools.partial(generate._prefill, generate.Forward.of(cfg, None), slots=self.slots, capacity=self.capacity,
                                 logprobs=False)
        shapes = jax.eval_shape(step, self.weights(cfg), **self._prompts())

        def place(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
            axes = (None,) * leaf.ndim
            if leaf.ndim == len(caching.AXES):
                axes = caching.AXES
            elif leaf.ndim and leaf.shape[0] == self.arguments.batch:
                axes = ("batch", None)[:leaf.ndim]
            return jax.sharding.NamedSharding(self.mesh, sharding.partition(axes, leaf.shape, self.mesh.shape))
        places = jax.tree.map(place, shapes) if compiled is None else compiled.output_shardings
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)

    def decode(self, cfg: config.Decoder | config.EncoderDecoder, state: loop.State | speculation.State) -> Any:
        """The loop, lowered for the slice."""
        rule = None if self.drafter is None else rules.make(None, self.drafter)
        return generate._run.lower(generate.Forward.of(cfg, None), self.weights(cfg), state, self.request,
                                   jax.ShapeDtypeStruct((), jnp.int32), self.drafter, rule)

    def flops(self, compiled: Any) -> float:
        """FLOPs per step and chip by the compiler's count, which takes the body of a loop once.

        Each group of layers is therefore compiled once more with its pattern doubled, and the difference multiplied.
        """
        first = compiled.cost_analysis()["flops"]
        total = first
        for index, group in enumerate(self.config.stack.groups):
            if group.repeats > 1:
                cfg = doubled(self.whole, index)
                again = self.decode(cfg, self.state(cfg)).compile().cost_analysis()["flops"]
                total += (group.repeats - 1) * (again - first)
        return total

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the mesh current, where there is one."""
        return contextlib.nullcontext() if self.mesh.size == 1 else jax.set_mesh(self.mesh)

    def step(self) -> dict[str, Any]:
        """What a step of the plain loop takes, for comparison with a call of speculation; empty where it does not fit."""
        with self.context():
            state = self.state(self.whole)
            decode = build(self.decode(self.whole, state))
            facts = {} if decode.compiled is None else self.facts(decode, state)[0]
        return {name: facts[name] for name in ("bytes_per_step", "flops_per_step") if name in facts}

    def run(self) -> dict[str, Any]:
        """Everything that the program prints; bytes, FLOPs and collectives are those of one chip."""
        cfg, chips, drafter = self.whole, self.mesh.size, self.drafter
        sizes = (1,) if drafter is None else drafter.sizes
        with self.context():
            prefill = build(self.prefill(cfg))
            state = self.state(cfg, prefill.compiled)
            decode = build(self.decode(cfg, state))
            facts = [] if decode.compiled is None else self.facts(decode, state)
        cache = (state if drafter is None else state.plain).cache
        layers, kept = cache.layers, (cache.layers, None if cache.memory is None else cache.memory.layers)
        weights, usable = self.weights(cfg), usable_bytes(self.mesh)
        needed = max(prefill.needed, decode.needed)
        result = {
            "model": str(self.arguments.model), "parameters": params.count(models.spec(cfg)),
            "topology": self.arguments.topology, "device": self.mesh.devices.flat[0].device_kind, "chips": chips,
            "mesh": {axis: size for axis, size in self.mesh.shape.items() if size > 1},
            "batch": self.arguments.batch, "length": self.slots, "prompt": self.prompt, "weights": self.arguments.weights,
            "sample": self.arguments.sample,
            "fits": prefill.compiled is not None and decode.compiled is not None,
            "headroom_bytes": usable - needed, "usable_bytes": usable, "weight_bytes": nbytes(weights),
            "source": self.source, "cache_bytes": nbytes(layers), "memory_bytes": nbytes(kept[1]),
            "temporary_bytes": max((one.temporary for one in (prefill, decode) if one.temporary is not None), default=None),
            "prefill": prefill.summary(), "decode": decode.summary(),
            "minimum_bytes_per_step": least_bytes(self.config, weights, kept, chips),
            "minimum_flops_per_step": self._least_flops(sizes[-1]),
            **(facts[-1] if facts else {}),
            "host_callbacks": prefill.host_transfers + decode.host_transfers,
            "compile_s": prefill.seconds + decode.seconds,
            "jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"),
        }
        if drafter is None:
            return result
        plain = Check(dataclasses.replace(self.arguments, drafter="none", tree=None)).step()
        calls = [{
            "nodes": nodes,
            "scratch_bytes": nbytes(layers) // self.slots * nodes,
            "minimum_flops_per_step": self._least_flops(nodes),
        } for nodes in sizes]
        for call, found in zip(calls, facts, strict=bool(facts)):
            call |= {name: value for name, value in found.items() if name in PER_CALL}
        for call, estimate in zip(calls, self.seconds, strict=bool(self.seconds)):
            call["roofline_s"] = estimate
        return result | {"drafter": self.arguments.drafter, "depth": drafter.depth, "calls": calls, "plain": plain}

    def _least_flops(self, nodes: int) -> float:
        """Of a call on trees of so many nodes."""
        return least_flops(self.config, self.arguments.batch * nodes, self.slots, self.mesh.size, self.source)

    def facts(self, program: Program, state: loop.State | speculation.State) -> list[dict[str, Any]]:
        """What the text of the compiled loop says of one step on one chip, for each size of tree.

        A walk along a tree counts as one node: what it does per node is next to nothing. FLOPs are there for one size alone,
        as the compiler adds up those of several. Copies are known by size: scores of as many numbers as a layer's keys (nodes
        times query heads to a key-value head equal to the head's width) are taken for them.
        """
        module = hlo.Module(program.text)
        body, count = module.loop(), 1 if self.drafter is None else len(self.drafter.sizes)
        cache = (state if self.drafter is None else state.plain).cache
        leaves = jax.tree.leaves((cache.layers, None if cache.memory is None else cache.memory.layers))
        whole = {_shard(leaf) for leaf in leaves}
        layer = {_shard(leaf) // leaf.shape[0] for leaf in leaves} - whole
        flops = {"flops_per_step": self.flops(program.compiled)} if count == 1 else {}
        out = []
        for lengths in branches(module, body, count):
            copies, layer_copies = (hlo.copies(module, body, numbers, lengths) for numbers in (whole, layer))
            out.append({
                "bytes_per_step": hlo.traffic(module, body, lengths),
                **flops,
                "collectives": hlo.collectives(module, body, lengths),
                "cache_copies": copies[hlo.HBM],
                "layer_copies": layer_copies[hlo.HBM],
                "copies_on_chip": copies.total() + layer_copies.total() - copies[hlo.HBM] - layer_copies[hlo.HBM],
                "cache_in_place": program.compiled.memory_analysis().alias_size_in_bytes >= sum(map(nbytes, leaves)),
                "entry_copy_bytes": sum(size for one in module.entry.instructions.values()
                                        for shape, size in module.writes(module.entry, one) if shape.space == hlo.HBM),
            })
        return out


PER_CALL = ("bytes_per_step", "flops_per_step", "collectives", "cache_copies", "layer_copies", "copies_on_chip")


def branches(module: hlo.Module, body: hlo.Computation, count: int) -> list[dict[str, int]]:
    """For each of `count` sizes of tree how often the loops in the body run whose length cannot be seen.

    Of several sizes each is a loop of its own, in their order, that runs once where the others do not run. Within them, or
    with one size in the body itself, stand walks.

    Raises:
      ValueError: when there are not as many loops as sizes.
    """
    outer = module.unseen(body)
    if count == 1:
        return [{one.name: 1 for one in outer}]
    if len(outer) != count:
        raise ValueError(f"the loop has {count} sizes of tree, but {len(outer)} loops of unknown length stand in it")
    none = {one.name: 0 for one in outer}
    return [none | {one.name: 1} | {walk.name: 1 for walk in module.unseen(module.computations[one.attribute("body")])}
            for one in outer]


def size(count: float) -> str:
    """Bytes for people."""
    unit = "GiB" if abs(count) >= 1 << 28 else "MiB"
    return f"{count / (1 << (30 if unit == 'GiB' else 20)):,.2f} {unit}"


def rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The table for people."""
    yield "fits", (f"yes, {size(result['headroom_bytes'])} to spare" if result["fits"] else
                   f"NO, {size(-result['headroom_bytes'])} too much") + f" of {size(result['usable_bytes'])} a chip"
    yield "weights a chip", size(result["weight_bytes"])
    yield "cache a chip", size(result["cache_bytes"]) + (
        f", and {size(result['memory_bytes'])} of the source's keys and values" if result["source"] else "")
    for name in ("prefill", "decode"):
        one = result[name]
        temporary = f"{size(one['temporary_bytes'])} of it temporary" if one["fits"] else "which does not fit"
        yield f"{name} a chip", f"{size(one['needed_bytes'])} in all, {temporary}; compiled in {one['compile_s']:.1f} s"
    for call in result.get("calls", ()):
        yield from call_rows(result, call)
    if "bytes_per_step" in result:
        if "calls" not in result:
            for name, unit in (("bytes", "GB"), ("flops", "GFLOP")):
                took, least = result[f"{name}_per_step"], result[f"minimum_{name}_per_step"]
                yield f"{name} a step and chip", f"{took / 1e9:.3f} {unit}, {took / least:.3f} of the model's minimum"
            yield from copy_rows(result)
        yield "cache written in place", "yes" if result["cache_in_place"] else "NO: the state that is given up is not reused"
        yield "laid out anew before the loop", size(result["entry_copy_bytes"])
    yield "host callbacks", str(result["host_callbacks"])


def call_rows(result: dict[str, Any], call: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Of one size of tree."""
    nodes, plain = call["nodes"], result["plain"]
    estimate = f"; {call['roofline_s'] * 1e3:.2f} ms by the roofline, not measured" if "roofline_s" in call else ""
    yield f"a call on {nodes} nodes", f"{size(call['scratch_bytes'])} of their own keys and values{estimate}"
    for name, unit in (("bytes", "GB"), ("flops", "GFLOP")):
        if f"{name}_per_step" in call:
            took = call[f"{name}_per_step"]
            least = call.get(f"minimum_{name}_per_step", result[f"minimum_{name}_per_step"])
            beside = f", {took / plain[f'{name}_per_step']:.2f} times the plain step's" if plain else ""
            yield f"  {name} a chip", (f"{took / 1e9:.3f} {unit}, {took / nodes / 1e9:.3f} a node{beside}, "
                                       f"{took / least:.3f} of the model's minimum")
    if "collectives" in call:
        for name, text in copy_rows(call):
            yield f"  {name}", text


def copy_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a step sends and copies."""
    sent = [f"{one['count']} {kind} of {size(one['bytes'])}" for kind, one in facts["collectives"].items()]
    yield "collectives a step", ", ".join(sent) or "none"
    yield "cache copies in the loop", str(facts["cache_copies"])
    yield "layer copies in the loop", f"{facts['layer_copies']}, and {facts['copies_on_chip']} to memory on the chip"


def main(arguments: Arguments) -> None:
    """Compiles, and prints what came out."""
    console = session.console(arguments.json)
    check = Check(arguments)
    with console.status(f"compiling for {arguments.topology}"):
        result = check.run()
    split = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items()) or "one chip"
    title = (f"{arguments.model} on {arguments.topology} ({split}), {result['weights']}, batch {result['batch']}, "
             f"{result['length']} tokens, " + (f"sources of {result['source']}" if result["source"] else
                                               f"prompts padded to {result['prompt']}")
             + (f", drafter {result['drafter']}" if "drafter" in result else ""))
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    session.finish(result, arguments.json)


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))
