"""Training that begins with weights that are there already, and trains some of them later than others."""

import dataclasses
import functools
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import adapt, config, model, params, sharding, weight
from jaxlm.data.source import JsonLines
from jaxlm.data.stream import Phase
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import save, train
from jaxlm.objectives import CausalLM, Contrastive, MaskedLM, PrefixLM, text
from jaxlm.objectives.contrastive import Momentum
from jaxlm.recipe import Pretrained, Recipe, Run
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.optimizer import AdamW, Freeze, Optimizer
from jaxlm.training.schedule import Constant
from tests import tiny
from train.__main__ import Arguments, read, run
from train.__main__ import changed as overruled

TEXTS = [" ".join(f"{n} figs" for n in range(start, start + 30)) for start in range(60)]
VOCABULARY = 272
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NORM = config.RmsNorm(1e-5)  # what a Llama's files say where they say nothing else


def decoder(width=16, base=10000.0):
    blocks = [tiny.block(config.PreNorm(NORM), position=config.Rope(base))] * 2
    return config.Decoder(width, config.Embedding(VOCABULARY), config.stack_of(blocks), NORM, config.Head(tied=True), 64)


DECODER, READER = decoder(), decoder(24)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Documents, two tokenizers of the same size, and decoders of two widths with one of them."""
    folder = tmp_path_factory.mktemp("initial")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    for name, documents in (("tokenizer", TEXTS), ("other", ["wholly other words"] * 30)):
        save(train(documents, 262, ("<end>", "<mask>")), folder / name, "<end>")
    tokenizer = Tokenizer.from_directory(folder / "tokenizer")
    for name, cfg in (("decoder", DECODER), ("reader", READER)):
        jaxlm.save(jaxlm.Model(cfg, tiny.weights(model.spec(cfg)), tokenizer), folder / name)
    return folder


def recipe(files, **fields):
    phase = Phase(((JsonLines(str(files / "text.jsonl")), 1.0),))
    given = {"model": DECODER, "tokenizer": str(files / "tokenizer"), "phases": (phase,), "objective": CausalLM(),
             "optimizer": Optimizer(AdamW(weight_decay=0.5), Constant(1e-2)), "rows": 8, "length": 16, "steps": 2,
             "mesh": (("fsdp", 2), ("model", 2)), "initial": str(files / "decoder")}
    return Recipe(**(given | fields))


def stepped(job, steps, state=None, rows=None, start=0, step=None):
    """The losses of some steps, the states before and after each, as NumPy arrays, and what it takes to go on."""
    state, losses = job.begin() if state is None else state, []
    states = [jax.tree.map(np.asarray, (state.params, state.moments))]
    with jax.set_mesh(job.mesh), job.batches(rows, start) as batches:
        for _ in range(steps):
            batch = job.place(next(batches))
            rows = batch.pop("state")
            step = step or job.step().lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 0})
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
            states.append(jax.tree.map(np.asarray, (state.params, state.moments)))
    return losses, states, (state, rows, start + steps, step)


def test_a_run_begins_with_a_models_weights_split_over_the_mesh(files):
    """Those of the files, to the bit, each device its part; the first loss is that model's, not a random one's."""
    job = Run(recipe(files), jax.devices()[:4])
    state, loaded = job.begin(), jaxlm.load(files / "decoder")
    jax.tree.map(np.testing.assert_array_equal, state.params, loaded.params)
    spread = params.paths(sharding.shardings(job.spec, job.mesh))
    for path, leaf in params.paths(state.params).items():
        assert leaf.dtype == jnp.float32 and leaf.sharding.is_equivalent_to(spread[path], leaf.ndim), path
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)) < 0.4 * whole
    (first,), *_ = stepped(job, 1)
    with job.batches() as batches:
        batch = {name: jnp.asarray(part) for name, part in next(batches).items()}
    random = model.spec(DECODER)
    for weights, same in ((loaded.params, True), (params.init(random, jax.random.key(0)), False)):
        found = tiny.jit(lambda weights: text.loss(weights, DECODER, batch))(weights)
        assert (first == pytest.approx(float(found.sum / found.weight), rel=1e-5)) == same


def test_bfloat16_files_are_trained_in_float32(files, tmp_path):
    loaded = jaxlm.load(files / "decoder", jnp.bfloat16)
    jaxlm.save(loaded, tmp_path / "half")
    state = Run(recipe(files, initial=str(tmp_path / "half")), jax.devices()[:4]).begin()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    want = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), loaded.params)
    jax.tree.map(np.testing.assert_array_equal, state.params, want)


def both(decoder, encoder):
    return adapt.to_encoder_decoder(decoder, encoder, key=jax.random.key(0))


@pytest.fixture(scope="module")
def paired(files):
    """The fields of a recipe whose encoder is the wider: what is fresh is trained alone for two steps."""
    cfg = both(*(jaxlm.load(files / name) for name in ("decoder", "reader"))).config
    optimizer = Optimizer(AdamW(weight_decay=0.5), Constant(1e-2), freeze=Freeze(adapt.but_cross_attention(cfg), 2))
    return {"model": cfg, "objective": PrefixLM(), "inputs": 16, "optimizer": optimizer,
            "initial": Pretrained((str(files / "decoder"), str(files / "reader")), both)}


def changed(one, other):
    one, other = params.paths(one), params.paths(other)
    return {path for path, leaf in one.items() if leaf.tobytes() != other[path].tobytes()}


def test_cross_attention_is_trained_alone_first(files, paired, tmp_path):
    """To the bit, on a mesh; then everything is, from moments that are those of a first step. So it is when it was stopped."""
    job = Run(recipe(files, **paired), jax.devices()[:4])
    frozen = set(paired["optimizer"].freeze.paths)
    free = set(params.paths(job.spec)) - frozen
    _, states, (state, rows, _, step) = stepped(job, 1)
    with Checkpoints(tmp_path, job.about()) as kept:
        kept.save(1, state, rows)
        read = kept.restore(job.abstract(), job.abstract_rows())
    _, whole, _ = stepped(job, 2, state, rows, 1, step)
    _, again, _ = stepped(job, 2, read.state, read.rows, 1, step)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    weights, moments = zip(*states, *whole[1:], strict=True)
    loaded = jaxlm.load(files / "reader").params["decoder"]["blocks"]["0"]["0"]["attention"]["q"]
    np.testing.assert_array_equal(weights[0]["encoder"]["blocks"]["0"]["0"]["attention"]["q"], loaded)
    assert [changed(*pair) for pair in zip(weights[:-1], weights[1:], strict=True)] == [free, free, free | frozen]
    for step in (1, 2):
        for path, leaf in params.paths(moments[step]).items():
            if leaf.ndim:
                assert leaf.any() == (not any(path.endswith(f"/{one}") for one in frozen)), path
    # The first update of what was frozen is as large as a first update is: the rate, for what does not decay.
    path = "encoder/norm/scale"
    moved = params.paths(weights[3])[path] - params.paths(weights[2])[path]
    np.testing.assert_allclose(np.abs(moved), 1e-2, rtol=1e-3)


def test_a_run_that_goes_on_reads_its_own_weights(files, tmp_path):
    """The files may be gone; another beginning, and other parts frozen at first, are noticed."""
    def go(steps, arguments=(), **fields):
        fields = {"mesh": (("fsdp", 8),), "steps": steps, "initial": str(tmp_path / "decoder")} | fields
        return run(recipe(files, **fields), tmp_path / "run", Arguments("any", **dict(arguments)), quiet=True)[1]

    shutil.copytree(files / "decoder", tmp_path / "decoder")
    before = jax.device_get(go(1).state.params)
    shutil.rmtree(tmp_path / "decoder")
    jax.tree.map(np.testing.assert_array_equal, go(1).state.params, before)
    assert str(tmp_path / "decoder") in json.loads((tmp_path / "run" / "config.json").read_text())["initial"]
    frozen = Optimizer(AdamW(), Constant(1e-2), freeze=Freeze(("decoder/embedding/*",), 2))
    for fields, says in (({"initial": str(files / "decoder")}, "its initial is .*, here it is .*--changed-data goes on"),
                         ({"initial": None}, "it has initial, here there is none"),
                         ({"optimizer": frozen}, "it has no optimizer.freeze, here there is one")):
        with pytest.raises(ValueError, match=says):
            go(1, **fields)
    assert go(1, {"changed_data": True}, initial=None).step == 1


def test_what_the_command_line_says(files, tmp_path):
    """--initial begins with a model, of which is made what the configuration makes of its own."""
    there, none = recipe(files), recipe(files, initial=None)
    given = [overruled(one, Arguments("any", initial="elsewhere")) for one in (there, none)]
    assert given[0].initial == given[1].initial == Pretrained(("elsewhere",)) and overruled(there, Arguments("any")) == there
    assert given[0].about()["initial"] == "Pretrained(paths=('elsewhere'), adapt=None)" and "initial" not in none.about()
    adapted = recipe(files, initial=Pretrained("there", adapt.to_encoder))
    assert overruled(adapted, Arguments("any", initial="elsewhere")).initial == Pretrained("elsewhere", adapt.to_encoder)
    with pytest.raises(ValueError, match="--initial names one model, and the configuration makes its own of 2, one, two"):
        overruled(recipe(files, initial=Pretrained(("one", "two"), both)), Arguments("any", initial="elsewhere"))


def test_paths_are_what_load_takes(files):
    given, said = files / "decoder", str(files / "decoder")
    for one in (Pretrained(given), Pretrained((given,)), Pretrained([said]), recipe(files, initial=given).initial):
        assert one.paths == (said,) and hash(one) == hash(Pretrained(said))


def test_an_encoder_of_a_decoder_and_what_only_training_has(files):
    """Fresh weights of an objective stay fresh, and a copy that follows the weights begins as they do."""
    cfg = adapt.to_encoder(jaxlm.load(files / "decoder")).config
    initial = Pretrained(str(files / "decoder"), adapt.to_encoder)
    asked = Contrastive(2, PrefixLM(), config.Vector(config.Pooling.MEAN, width=5), momentum=Momentum(0.75, 5))
    state = Run(recipe(files, model=cfg, objective=asked, inputs=16, initial=initial), jax.devices()[:4]).begin()
    table = jaxlm.load(files / "decoder").params["decoder"]["embedding"]["tokens"]
    for tree in (state.params, state.carry):
        np.testing.assert_array_equal(tree["encoder"]["embedding"]["tokens"], table)
    jax.tree.map(np.testing.assert_array_equal, state.params["extra"], state.carry["extra"])


def quantised(lm):
    spec = model.spec(lm.config)
    return dataclasses.replace(lm, params=jax.tree.map(
        lambda param, leaf: weight.quantize(leaf, param.inputs) if param.inputs else leaf, spec, lm.params))


@pytest.mark.parametrize(("fields", "says"), [
    ({"initial": "reader"}, r"reader are not those of the recipe's model: decoder/\S+ is \((.*24.*)\), the recipe's is \(.*16"),
    ({"model": decoder(base=500.0)}, "fit the recipe's model, but are of another one: .*base is 10000.0, here it is 500.0"),
    ({"initial": Pretrained(("decoder",), functools.partial(adapt.to_encoder, head="masked"))},
     r"decoder/\S+ is missing, the recipe's is \("),
    ({"initial": Pretrained(("decoder",), quantised)}, "cannot be trained: decoder/.* is a Int8, it has to be a plain array"),
    ({"initial": Pretrained(("decoder",), lambda lm: lm.params)}, "gives a jaxlm.Model, .* gave a dict"),
    ({"tokenizer": "other"}, r"decoder were made with another tokenizer \(262 tokens, .*\) than the recipe's \(262 tokens"),
    ({"initial": "nowhere"}, "nowhere does not exist: give a directory"),
], ids=["size", "config", "kind", "int8", "tree", "tokenizer", "path"])
def test_weights_that_are_not_the_recipes(files, fields, says):
    def place(one):
        if isinstance(one, Pretrained):
            return dataclasses.replace(one, paths=tuple(map(place, one.paths)))
        return str(files / one) if isinstance(one, str) else one

    job = Run(recipe(files, **{name: place(one) for name, one in fields.items()}), jax.devices()[:4])
    with pytest.raises(ValueError, match=says):
        job.begin()


def test_weights_of_another_kind_where_that_is_meant(files):
    """A longer context needs no more than to be asked for, all else a function that says so."""
    other = dataclasses.replace(decoder(base=500.0), length=128)
    run = Run(recipe(files, model=dataclasses.replace(DECODER, length=128)), jax.devices()[:4])
    want = jaxlm.load(files / "decoder").params
    meant = Pretrained(str(files / "decoder"), lambda lm: model.Model(other, lm.params))
    for job in (run, Run(recipe(files, model=other, initial=meant, tokenizer=str(files / "other")), jax.devices()[:4])):
        jax.tree.map(np.testing.assert_array_equal, job.begin().params, want)


@pytest.mark.parametrize(("make", "says"), [
    (lambda: Pretrained(()), "the path of a model, or several and a function .*, got 0 paths and no function"),
    (lambda: Pretrained(("a", "b")), "got 2 paths and no function"),
    (lambda: Pretrained(3), "is the path of a model, or a tuple of several, got 3"),
    (lambda: Pretrained(("a", None), both), r"tuple of several, got \('a', None\)"),
    (lambda: Pretrained(b"a"), "tuple of several, got b'a'"),
    (lambda: Pretrained("a", "to_encoder"), "adapt is a function of models that gives a model, got 'to_encoder'"),
    (lambda: Pretrained("a", both), "does not take as many models as there are paths, 1: missing .* 'encoder'"),
    (lambda: Pretrained(("a", "b"), adapt.split), "does not take as many models as there are paths, 2"),
    (lambda: Freeze("blocks/*", 2), r"tuple of patterns, like \(.*\), got 'blocks/\*'"),
    (lambda: Freeze(("blocks/*", 2), 2), "tuple of patterns"), (lambda: Freeze(("*",), 2.5), "is a whole number, got 2.5"),
    (lambda: Freeze((), 3), "has paths, and at least 1 step"), (lambda: Freeze(("*",), 0), "at least 1 step")])
def test_what_says_nothing(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_what_is_no_beginning(files):
    with pytest.raises(ValueError, match="initial is the path of a model, a jaxlm.recipe.Pretrained or None, got 3"):
        recipe(files, initial=3)


def test_the_configurations_fit_each_other(monkeypatch):
    """What `adapt` makes of the decoder's configuration is the model of each."""
    def given(name, **environment):
        for variable in ("WIDTH", "DECODER", "ENCODER", "WARMUP"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        return read(str(CONFIGS / f"{name}.py"))

    def empty(width):
        cfg = given("clm_code", WIDTH=width).model
        weights = jax.tree.map(lambda param: np.broadcast_to(np.float32(0), param.shape), model.spec(cfg))
        return jaxlm.Model(cfg, weights, types.SimpleNamespace(bos_id=None, eos_id=0))

    small, large = empty("128"), empty("192")
    masked = given("clm_to_mlm_code", DECODER="there")
    assert masked.initial.adapt(large).config == masked.model == given("clm_to_mlm_code").model
    assert given("clm_to_mlm_code", DECODER="there", WIDTH="128").model == masked.initial.adapt(small).config
    assert masked.initial.paths == ("there",) and given("clm_to_mlm_code").initial is None
    pair = given("adapted_code", DECODER="one", ENCODER="two")
    assert pair.initial.paths == ("one", "two") and given("adapted_code", WARMUP="0").optimizer.freeze is None
    made = []
    jax.eval_shape(lambda: made.append(pair.initial.adapt(small, large).config))
    assert made == [pair.model]
    for name in ("clm_code", "clm_to_mlm_code"):
        for width in ("100", "0"):
            with pytest.raises(ValueError, match=f"WIDTH is a multiple of 64, the width of a head, got {width}"):
                given(name, WIDTH=width)


def test_masked_tokens_are_learned_by_what_was_a_decoder(files):
    cfg = adapt.to_encoder(jaxlm.load(files / "decoder"), head="masked").config
    initial = Pretrained(str(files / "decoder"), functools.partial(adapt.to_encoder, head="masked"))
    job = Run(recipe(files, model=cfg, objective=MaskedLM(1, VOCABULARY, rate=0.3), initial=initial), jax.devices()[:4])
    losses, *_ = stepped(job, 6)
    assert losses[-1] < 0.9 * losses[0]
