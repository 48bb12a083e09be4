"""A recipe on any mesh: the same batches, the same losses, a state that lies as its weights do."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, model, objectives, params, sharding
from jaxlm.data.source import JsonLines
from jaxlm.data.stream import Batches, Phase
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import save, train
from jaxlm.objectives import (
    AsPrefix,
    AsText,
    CausalLM,
    FillInTheMiddle,
    IdentifierTagging,
    MaskedLM,
    PrefixLM,
    SpanCorruption,
    cross_entropy,
)
from jaxlm.recipe import Program, Recipe, Run, identity
from jaxlm.training.checkpoint import Checkpoints, read_weights
from jaxlm.training.optimizer import Adafactor, AdamW, Lion, Muon, Optimizer
from jaxlm.training.schedule import Constant, Cosine
from tests import tiny

VOCABULARY, SPECIAL = 300, ("<end>", "<prefix>", "<suffix>", "<middle>", *(f"<{i}>" for i in range(12)))
MODEL = tiny.decoder([tiny.block()] * 2, embedding=config.Embedding(VOCABULARY + 20), length=64)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tokenizer and documents of a language that can be learned: words that count up."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    documents = []
    for _ in range(120):
        start, length = random.integers(0, 90), random.integers(5, 40)
        documents.append(" ".join(f"{number} apples" for number in range(start, start + length)))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    save(train(documents, VOCABULARY, SPECIAL), folder / "tokenizer", SPECIAL[0])
    return folder


def recipe(files, **fields):
    source = JsonLines(str(files / "text.jsonl"))
    given = {"model": MODEL, "tokenizer": str(files / "tokenizer"), "phases": (Phase(((source, 1.0),)),),
             "held_out": Phase(((source, 1.0),)), "objective": CausalLM(),
             "optimizer": Optimizer(AdamW(), Cosine(1e-2, 3, 20)), "rows": 8, "length": 32, "steps": 20,
             "evaluation_batches": 2}
    return Recipe(**(given | fields))


def losses(run, steps=20, state=None, rows=None, start=0):
    """The losses of some steps, the last state and what the batches keep."""
    state = run.begin() if state is None else state
    step, found = None, []
    with jax.set_mesh(run.mesh), run.batches(rows, start) as batches:
        for _ in range(steps):
            batch = run.place(next(batches))
            rows = batch.pop("state")
            # Compiled without optimisation: in half the time, for few and small steps.
            step = step or run.step().lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 0})
            state, metrics = step(state, batch)
            found.append(float(metrics.loss))
    return np.array(found), state, rows


@pytest.fixture(scope="module")
def alone(files):
    return losses(Run(recipe(files, mesh=()), jax.devices()[:1]))


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 8}, {"model": 2}, {"fsdp": 2, "model": 2}], ids=str)
def test_every_mesh_gives_the_losses_of_one_device(files, alone, mesh):
    run = Run(recipe(files, mesh=tuple(mesh.items())), jax.devices()[:math.prod(mesh.values())])
    found, state, _ = losses(run)
    assert alone[0][-1] < 0.7 * alone[0][0]  # something was learned, so there was something to get wrong
    np.testing.assert_allclose(found, alone[0], rtol=1e-5)
    shapes = params.paths(run.spec)
    spread = sharding.shardings(run.spec, run.mesh)
    for name, moments in params.paths(state.moments).items():
        ours = [path for path in shapes if name.endswith(path)]
        if ours and moments.shape == shapes[ours[0]].shape:
            assert moments.sharding.is_equivalent_to(params.paths(spread)[ours[0]], moments.ndim), name
    if "fsdp" in mesh:
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
        mine = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params))
        assert mine < 1.2 * whole / mesh["fsdp"] / mesh.get("model", 1) + 20_000


def test_accumulation_over_pieces_changes_nothing(files, alone):
    found, *_ = losses(Run(recipe(files, mesh=(), pieces=4), jax.devices()[:1]), 6)
    np.testing.assert_allclose(found, alone[0][:6], rtol=1e-5)


def test_a_run_goes_on_where_it_was(files, alone):
    run = Run(recipe(files, mesh=()), jax.devices()[:1])
    first, state, rows = losses(run, 9)
    again, state, rows = losses(run, 11, state, rows, 9)
    assert [*first, *again] == alone[0].tolist()
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.asarray, one.params) for one in (state, alone[1])))


@pytest.mark.parametrize("remat", ["full", "products"])
def test_what_is_computed_again_changes_nothing(files, alone, remat):
    found, *_ = losses(Run(recipe(files, mesh=(), remat=remat), jax.devices()[:1]), 4)
    np.testing.assert_allclose(found, alone[0][:4], rtol=1e-5)


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (Lion(), Adafactor())), Muon()],
                         ids=lambda kind: type(kind).__name__)
def test_optimizers_on_a_mesh(files, kind):
    """Reduced and orthogonalised moments too."""
    optimizer = Optimizer(kind, Constant(1e-3))
    want, *_ = losses(Run(recipe(files, optimizer=optimizer, mesh=()), jax.devices()[:1]), 5)
    found, *_ = losses(Run(recipe(files, optimizer=optimizer, mesh=(("fsdp", 2), ("model", 2))), jax.devices()[:4]), 5)
    assert len(set(want)) == 5  # it moves
    np.testing.assert_allclose(found, want, rtol=1e-5)


END, PREFIX, SUFFIX, MIDDLE, *SENTINELS = range(16)
SPANS = SpanCorruption(tuple(SENTINELS), mean=4.0, end=END)
EMBEDDING = config.Embedding(VOCABULARY + 20)
BIAS = config.RelativeBias(8, 20, True)
PAIRED = config.EncoderDecoder(
    tiny.encoder([tiny.block(position=BIAS, causal=False)] * 2, embedding=EMBEDDING),
    tiny.decoder([tiny.block(position=config.RelativeBias(8, 20), cross=tiny.cross())] * 2, embedding=EMBEDDING), (END,))
HIDDEN = tiny.encoder([tiny.block(position=BIAS, causal=False)] * 2, config.Head(True, transform=config.Transform(
    config.Activation.GELU, config.LayerNorm())), embedding=EMBEDDING)


@pytest.mark.parametrize("fields", [
    {"model": PAIRED, "objective": SPANS, "inputs": 48},
    {"model": HIDDEN, "objective": MaskedLM(PREFIX, VOCABULARY, rate=0.3)}], ids=["pairs", "hidden"])
def test_encoder_decoders_and_encoders_learn_on_any_mesh_and_in_pieces(files, fields):
    want, *_ = losses(Run(recipe(files, mesh=(), **fields), jax.devices()[:1]), 12)
    assert want[-1] < 0.8 * want[0]
    mesh = (("fsdp", 2), ("model", 2))
    found, *_ = losses(Run(recipe(files, mesh=mesh, pieces=2, **fields), jax.devices()[:4]), 3)
    np.testing.assert_allclose(found, want[:3], rtol=1e-5)


@pytest.mark.parametrize("objective", [
    FillInTheMiddle(PREFIX, SUFFIX, MIDDLE), AsText(SpanCorruption(tuple(SENTINELS), mean=4.0)), AsText(PrefixLM()),
    objectives.Schedule(((CausalLM(), 3), (AsText(PrefixLM()), None)))], ids=["infilling", "spans", "prefix", "schedule"])
def test_objectives_are_learned(files, objective):
    run = Run(recipe(files, objective=objective, mesh=()), jax.devices()[:1])
    assert run.prefixes == (not isinstance(objective, FillInTheMiddle))
    found, *_ = losses(run, 15)
    assert np.all(np.isfinite(found)) and found[-1] < 0.8 * found[0]


def test_a_document_ends_with_its_end_whatever_is_moved(files):
    objective = objectives.Schedule(((FillInTheMiddle(PREFIX, SUFFIX, MIDDLE, rate=1.0), None),))
    with Run(recipe(files, objective=objective, mesh=()), jax.devices()[:1]).batches() as batches:
        batch = next(batches)
    used = batch["segments"] > 0
    assert (batch["targets"][used] == END).any() and not (batch["tokens"][used] == END).any()


def test_an_encoder_learns_what_is_hidden(files):
    encoder = tiny.decoder([tiny.block(causal=False)] * 2, embedding=config.Embedding(VOCABULARY + 20))
    objective = MaskedLM(PREFIX, VOCABULARY, rate=0.3)
    found, *_ = losses(Run(recipe(files, model=encoder, objective=objective, mesh=()), jax.devices()[:1]), 15)
    assert found[-1] < 0.8 * found[0]


def test_evaluation_is_the_same_whatever_is_being_learned(files):
    run = Run(recipe(files, mesh=(("data", 2),)), jax.devices()[:2])
    state = run.begin()
    evaluate = run.evaluation()
    with jax.set_mesh(run.mesh):
        found = evaluate(state.params)
        assert found == evaluate(state.params)
    plan = dataclasses.replace(run.plan, phases=(run.recipe.held_out,), seed=1)
    with Batches(plan, ahead=0) as batches:
        batch = [next(batches) for _ in range(2)]
    asked = np.concatenate([one["targets"][one["weights"] > 0] for one in batch])
    size = sum(len(run.tokenizer.token_bytes()[token]) for token in asked)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * len(asked) / size / math.log(2), rel=1e-5)
    assert found["loss"] == pytest.approx(math.log(VOCABULARY + 20), rel=0.1)


def test_evaluation_asks_one_thing_whatever_the_schedule(files):
    """The next token of plain text, unless told otherwise."""
    def found(objective, **fields):
        run = Run(recipe(files, objective=objective, mesh=(), **fields), jax.devices()[:1])
        with jax.set_mesh(run.mesh):
            return run.evaluation()(run.begin().params)

    plain = found(CausalLM())
    schedule = objectives.Schedule(((AsText(PrefixLM()), 1), (CausalLM(), 1), (AsText(PrefixLM()), None)))
    assert found(schedule) == pytest.approx(plain, rel=1e-5)
    other = found(CausalLM(), evaluation=AsText(PrefixLM()))
    assert abs(other["loss"] - plain["loss"]) > 1e-4


def test_what_evaluations_ask_of_encoders(files):
    encoder = tiny.decoder([tiny.block(causal=False)] * 2, embedding=config.Embedding(VOCABULARY + 20))
    often, seldom = MaskedLM(PREFIX, VOCABULARY, rate=0.3), MaskedLM(PREFIX, VOCABULARY, rate=0.1)
    assert recipe(files, model=encoder, objective=objectives.Schedule(((often, 3), (seldom, None)))).objectives[-1] is seldom
    assert recipe(files, model=encoder, objective=often, evaluation=seldom).objectives == (often, seldom)
    with pytest.raises(ValueError, match=r"Attention\(causal=False\)"):
        recipe(files, evaluation=seldom)


def test_what_a_checkpoint_must_agree_with(files, tmp_path):
    about = recipe(files).about()
    assert json.loads(json.dumps(about)) == about

    def differs(**fields):
        other = recipe(files, **fields).about()
        return [name for name in about if other[name] != about[name]]

    adam = AdamW(weight_decay=0.05, b2=0.99)
    assert differs(optimizer=Optimizer(adam, Constant(1e-3), clip=0.5), steps=5, pieces=2, z=1e-4, held_out=None) == []
    for given in ({"kind": Lion()}, {"clip": None}, {"multipliers": (("head/*", 2.0),)}, {"kind": AdamW(weight_decay=0.0)},
                  {"frozen": ("embedding/*",)}):
        assert differs(optimizer=Optimizer(**({"kind": AdamW(), "schedule": Constant(1e-3)} | given))) == ["optimizer"], given
    assert differs(objective=AsText(PrefixLM())) == ["objective"]
    source = JsonLines(str(files / "*.jsonl"))
    assert differs(phases=(Phase(((source, 1.0),)),)) == ["phases"]


class Unnamed(JsonLines):
    """A source without a form of its own."""

    __repr__ = object.__repr__


def test_addresses_are_no_difference(files):
    one, two = Unnamed("a"), Unnamed("a")
    assert repr(one) != repr(two)
    assert recipe(files, phases=(Phase(((one, 1),)),)).about() == recipe(files, phases=(Phase(((two, 1),)),)).about()


def test_a_tokenizer_is_what_it_does(files, tmp_path):
    ours = Tokenizer.from_directory(files / "tokenizer")
    ours.save(tmp_path / "saved")
    assert identity(Tokenizer.from_directory(tmp_path / "saved")) == identity(ours)
    assert identity(ours).startswith(f"{VOCABULARY} tokens, ")
    found = {identity(ours)}
    for special, documents in ((SPECIAL, ["other words altogether"] * 9), (SPECIAL[::-1], ["1 apples"])):
        save(train(documents, VOCABULARY, special), tmp_path / special[0], special[0])
        found.add(identity(Tokenizer.from_directory(tmp_path / special[0])))
    settings = json.loads((files / "tokenizer" / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["add_prefix_space"] = True  # the same tokens, another cut
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(settings))
    found.add(identity(Tokenizer.from_directory(tmp_path / "saved")))
    assert len(found) == 4
    assert Run(recipe(files, mesh=()), jax.devices()[:1]).about()["tokenizer"] == identity(ours)


@pytest.mark.parametrize("field", ["phases", "held_out"])
def test_data_is_looked_at_first(files, field):
    """Before the weights, and before a tokenizer is made of other data."""
    for source, says in ((JsonLines("nowhere.jsonl"), "no file matches 'nowhere.jsonl'"),
                         (JsonLines(str(files / "text.jsonl"), "body"), "no field 'body'")):
        phase = Phase(((source, 1.0),))
        with pytest.raises(ValueError, match=says):
            Run(recipe(files, tokenizer="nowhere", **{field: (phase,) if field == "phases" else phase}))


def test_pairs_are_evaluated_by_the_bytes_of_their_targets(files):
    one = recipe(files, model=PAIRED, objective=objectives.Schedule(((PrefixLM(), 1), (SPANS, None))), inputs=48, mesh=())
    assert one.objectives[-1] is SPANS and one.about()["inputs"] == 48 and "inputs" not in recipe(files).about()
    run = Run(one, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        found = run.evaluation()(run.begin().params)
    told = dataclasses.replace(SPANS, edges=(END,))
    plan = dataclasses.replace(run.plan, phases=(run.held_out,), seed=1, objective=lambda step: told)
    with Batches(plan, ahead=0) as batches:
        batch = [next(batches) for _ in range(2)]
    asked = np.concatenate([one["targets"][one["weights"] > 0] for one in batch])
    size = sum(len(run.tokenizer.token_bytes()[token]) for token in asked)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * len(asked) / size / math.log(2), rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Contrasted(objectives.Objective):
    """A loss of its own, with a weight that only it has and an average of a table that it hands on."""

    makes = "encoder"
    prefixes = True
    keep: float = 0.9

    def example(self, tokens, random):
        return MaskedLM(PREFIX, VOCABULARY, rate=0.3).example(tokens, random)

    def extra(self, cfg):
        return {"head": params.Param((cfg.embedding.vocabulary, cfg.width), ("vocab", "embed"), inputs=(1,))}

    def carry(self, cfg):
        table = params.Param((cfg.embedding.vocabulary, cfg.width), ("vocab", "embed"), params.normal(0.02))
        count = params.Param((), (), lambda param, key, dtype: jnp.zeros((), jnp.int32))
        return {"encoder": {"embedding": {"tokens": table}}, "count": count}

    def loss(self, weights, cfg, batch, key, carry, *, dtype=None, remat=None, **_):
        weights = model.cast(weights, cfg, dtype)
        last = model.forward(weights, cfg, batch["tokens"], segments=batch["segments"], logits=False, remat=remat).last
        old = carry["encoder"]["embedding"]["tokens"]
        found = cross_entropy(lambda head, x: jnp.einsum("BTD,VD->BTV", x, head + 0.1 * old), weights["extra"]["head"],
                              last, batch["targets"], batch["weights"])
        new = self.keep * old + (1 - self.keep) * weights["encoder"]["embedding"]["tokens"]
        return found, {"encoder": {"embedding": {"tokens": new}}, "count": carry["count"] + 1}


BARE = dataclasses.replace(HIDDEN, head=None)


def test_an_objective_with_a_loss_of_its_own(files, tmp_path):
    """Its weights are trained, what it hands on begins as the weights, is split as they are, kept, and evaluated with."""
    run = Run(recipe(files, model=BARE, objective=Contrasted(), mesh=(("fsdp", 2),)), jax.devices()[:2])
    begun = run.begin()
    first, carried = (jax.tree.map(np.asarray, tree) for tree in (begun.params, begun.carry))
    np.testing.assert_array_equal(carried["encoder"]["embedding"]["tokens"], first["encoder"]["embedding"]["tokens"])
    found, state, rows = losses(run, 6, begun)
    assert found[-1] < found[0] and np.abs(state.params["extra"]["head"] - first["extra"]["head"]).max() > 1e-3
    table = state.carry["encoder"]["embedding"]["tokens"]
    assert table.sharding.is_equivalent_to(state.params["encoder"]["embedding"]["tokens"].sharding, 2)
    assert state.carry["count"] == 6
    evaluate = run.evaluation()
    with jax.set_mesh(run.mesh):
        now, before = evaluate(state.params, state.carry), evaluate(state.params, carried)
    assert set(now) == {"loss", "accuracy"} and now["loss"] != before["loss"] and state.carry["count"] == 6
    with Checkpoints(tmp_path, run.about()) as kept:
        kept.save(6, state, rows)
        again = kept.restore(run.abstract(), run.abstract_rows())
    np.testing.assert_array_equal(again.state.carry["encoder"]["embedding"]["tokens"], table)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, _, weights = read_weights(tmp_path, lambda about: params.abstract(
        model.spec(BARE), shardings=jax.tree.map(lambda _: place, model.spec(BARE))))
    assert set(weights) == {"encoder"}


def test_one_loss_for_all(files):
    ours, other = Contrasted(), Contrasted(0.5)
    masked = MaskedLM(PREFIX, VOCABULARY)
    for one in (masked, other):
        for make, given in ((objectives.Mixture, ((ours, one), (1, 1))), (objectives.Schedule, (((ours, 1), (one, 1)),))):
            with pytest.raises(ValueError, match="objectives of one model share one loss: Contrasted has that of Contrasted"):
                make(*given)
    mixed = objectives.Mixture((Contrasted(), objectives.Mode(SUFFIX, ours)), (1, 1))
    assert recipe(files, model=BARE, objective=mixed).own == ours and mixed.own == ours and masked.own is None
    assert recipe(files, model=HIDDEN, objective=mixed, evaluation=masked).objectives[-1] is masked
    with pytest.raises(ValueError, match="evaluations have the loss of what is learned or the common one"):
        recipe(files, model=HIDDEN, objective=masked, evaluation=ours)
    with pytest.raises(ValueError, match="ask for tokens or for labels, all of them for as many, these for tokens, 2"):
        objectives.Mixture((masked, IdentifierTagging()), (1, 1))


def test_an_average_follows(files):
    run = Run(recipe(files, mesh=(), average=0.9), jax.devices()[:1])
    before = jax.tree.map(np.asarray, run.begin().params)
    _, state, _ = losses(run, 1)
    want = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before, state.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.average, want)


def test_what_training_costs(files):
    """Counted by hand: 6 FLOPs for each weight in a product and token, and for each pair of scores and values."""
    run = Run(recipe(files, mesh=()), jax.devices()[:1])
    layer = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 24
    products = 2 * layer + (VOCABULARY + 20) * 16
    assert run.flops_per_token == 6 * (products + 2 * 2 * 32 * 32 / 2)
    scores = {}
    for causal in (True, False):
        for window in (1, 8, 31, 32, 40, None):
            blocks = [tiny.block(window=window, causal=causal)] * 2
            model = tiny.decoder(blocks, embedding=config.Embedding(VOCABULARY + 20))
            objective = CausalLM() if causal else MaskedLM(PREFIX, VOCABULARY)
            program = Program(recipe(files, mesh=(), model=model, objective=objective), jax.devices()[:1])
            scores[causal, window] = (program.flops_per_token / 6 - products) / (2 * 2 * 32)
            seen = np.abs(np.arange(32)[:, None] - np.arange(32)) < (window or 32)
            exact = (np.tril(seen) if causal else seen).sum() / 32
            assert scores[causal, window] == pytest.approx(exact, abs=1)
    assert scores[True, 32] == scores[True, 40] == scores[True, None] == 16 and scores[False, None] == 32


def test_what_training_on_pairs_costs(files):
    """Keys and values of the cross-attention are made of the inputs, all else of the decoder's of the targets."""
    run = Program(recipe(files, model=PAIRED, objective=SPANS, inputs=48, mesh=()), jax.devices()[:1])
    attention, feedforward = 16 * 32 + 2 * 16 * 16 + 32 * 16, 3 * 16 * 24
    read = 48 * 2 * (attention + feedforward + 2 * 32 * 48)
    asked = 32 * 2 * (attention + feedforward + 2 * 32 * 32 / 2 + 2 * 16 * 32 + 2 * 32 * 48) + 32 * (VOCABULARY + 20) * 16
    crossed = 48 * 2 * 2 * 16 * 16
    assert run.recipe.tokens == 8 * 80
    assert run.flops_per_token * 80 == pytest.approx(6 * (read + asked + crossed))


@pytest.mark.parametrize(("fields", "says"), [
    ({"rows": 12, "mesh": (("data", 8),)}, "12 rows does not divide over 8 devices .* multiple of 8"),
    ({"rows": 16, "pieces": 4, "mesh": (("data", 8),)}, "over 8 devices .* and 4 pieces: it needs a multiple of 32"),
    ({"mesh": (("data", 16),)}, "need 16 devices, there are 8"),
    ({"mesh": (("planets", 2),)}, "no mesh axis is called planets"),
    ({"tokenizer": "nowhere"}, "nowhere"),
    ({"model": tiny.decoder([tiny.block()], embedding=config.Embedding(250))}, "300 tokens, the model a vocabulary of 250"),
])
def test_what_does_not_fit_together(files, fields, says):
    with pytest.raises((ValueError, OSError), match=says):
        Run(recipe(files, **fields))


@pytest.mark.parametrize(("fields", "says"), [
    ({"length": 65}, "65 tokens are longer than the model's context of 64"), ({"steps": 0}, "at least 1"),
    ({"rows": 8, "pieces": 3}, "8 rows cannot be taken in 3 pieces"),
    ({"mesh": (("data", 1), ("data", 7))}, "names an axis twice: data=1 data=7"),
    ({"remat": "some"}, "remat is one of none, full, products"),
    ({"model": PAIRED, "objective": SPANS, "inputs": 65}, "65 tokens are longer than the model's context of 64"),
    ({"model": PAIRED, "objective": SPANS}, "SpanCorruption makes pairs: Recipe.inputs says how many .* got None"),
    ({"inputs": 32}, "CausalLM makes texts, which have no inputs: leave out Recipe.inputs, got 32"),
    ({"average": 1.0}, "between 0 and 1"), ({"objective": PrefixLM()}, r"AsText\(PrefixLM\(\.\.\.\)\)"),
    ({"objective": MaskedLM(1, 300)}, r"Attention\(causal=False\)"),
    ({"objective": CausalLM(), "model": tiny.decoder([tiny.block(causal=False)])}, "attention that sees it"),
])
def test_what_is_no_recipe(files, fields, says):
    with pytest.raises(ValueError, match=says):
        recipe(files, **fields)


def test_the_step_stays_on_the_devices(files):
    """No callbacks to the host, and the old state's memory is the new one's."""
    run = Run(recipe(files, mesh=(("fsdp", 2),)), jax.devices()[:2])
    with jax.set_mesh(run.mesh):
        compiled = run.step().lower(run.abstract(), run.abstract_batch()).compile()
    words = compiled.as_text()
    assert "callback" not in words and "infeed" not in words
    memory = compiled.memory_analysis()
    state = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(run.abstract()) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
    assert memory.alias_size_in_bytes >= state


@functools.cache
def _alone_in_bfloat16(files):
    return losses(Run(recipe(files, dtype="bfloat16", mesh=()), jax.devices()[:1]), 4)[0]


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "model": 2}], ids=str)
def test_a_mesh_gives_the_losses_of_one_device_in_bfloat16_too(files, mesh):
    found, *_ = losses(Run(recipe(files, dtype="bfloat16", mesh=tuple(mesh.items())), jax.devices()[:4]), 4)
    want = _alone_in_bfloat16(files)
    assert want[-1] < 0.99 * want[0]
    np.testing.assert_allclose(found, want, rtol=2e-3)


@dataclasses.dataclass(frozen=True)
class _Own(objectives.Objective):
    """A user's, whose examples are prefixes and nothing else."""

    makes = "decoder"

    def example(self, tokens, random):
        return CausalLM().example(tokens, random)._replace(prefix=1)


class _Declared(_Own):
    prefixes = True


@pytest.mark.parametrize(("objective", "prefixes"), [
    (CausalLM(), False), (AsPrefix(MaskedLM(PREFIX, VOCABULARY)), True), (_Declared(), True),
    (objectives.Mode(SUFFIX, _Declared()), True), (objectives.Mixture((CausalLM(), AsText(PrefixLM())), (1.0, 1.0)), True),
    (objectives.Schedule(((CausalLM(), 1), (_Declared(), None))), True)])
def test_which_steps_look_for_prefixes(files, objective, prefixes):
    program = Program(recipe(files, objective=objective, mesh=()), jax.devices()[:1])
    assert program.prefixes == ("prefix" in program.batch_shardings()) == prefixes


def test_encoders_need_not_look_for_prefixes(files):
    encoder = tiny.decoder([tiny.block(causal=False)] * 2, embedding=config.Embedding(VOCABULARY + 20))
    found = recipe(files, model=encoder, objective=MaskedLM(PREFIX, VOCABULARY), mesh=())
    assert not Program(found, jax.devices()[:1]).prefixes


def test_a_prefix_that_is_not_declared_is_an_error(files):
    with (pytest.raises(ValueError, match=r"_Own made an example with a prefix of 1 tokens, and _Own.prefixes says"),
          Run(recipe(files, objective=_Own(), mesh=()), jax.devices()[:1]).batches() as batches):
        next(batches)


def test_a_decoder_learns_the_next_token_and_then_what_is_hidden(files):
    masked = AsPrefix(MaskedLM(PREFIX, VOCABULARY, rate=0.3, never=(END,)))
    run = Run(recipe(files, objective=objectives.Schedule(((CausalLM(), 3), (masked, None))), mesh=()), jax.devices()[:1])
    found, *_ = losses(run, 15)
    assert found[-1] < 0.85 * found[3]


def test_a_recipe_says_what_arrays_it_holds(files):
    def said(starts):
        return recipe(files, objective=AsPrefix(MaskedLM(PREFIX, VOCABULARY, starts=starts))).about()["objective"]

    starts = np.zeros(5000, bool)
    other = starts.copy()
    other[2500] = True
    assert said(starts) == said(starts.copy()) != said(other)


def test_what_only_learns_hidden_tokens_is_evaluated_so(files):
    hidden = AsPrefix(MaskedLM(PREFIX, VOCABULARY))
    assert recipe(files, objective=hidden).objectives[-1] is hidden
    assert recipe(files, objective=objectives.Schedule(((CausalLM(), 1), (hidden, None)))).objectives[-1] == CausalLM()
