"""Whole models with mixtures of experts: against the oracle, through a cache, on meshes, in speculation, by the other doors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jaxlm.flax as doors
from jaxlm import block, cache, config, model, params, sharding
from jaxlm.layers import moe
from jaxlm.weight import Int8
from tests import oracle, tiny

LENGTHS = np.array([9, 5, 2])
POSITIONS = np.where(np.arange(9)[None] < LENGTHS[:, None], np.arange(9)[None], -1).astype(np.int32)
VALID = POSITIONS >= 0


def by_layer(routing, cfg):
    """What `Result.routing` says of each block that has a mixture, in order."""
    places = (cfg.place(layer) for layer in range(cfg.layers))
    found = (jax.tree.map(lambda leaf, r=repeat: leaf[r], routing[group][place]) for group, place, repeat in places)
    return [one for one in found if one is not None]


@pytest.mark.parametrize("name, unrolled", [("routers", False), ("routers", True), ("groups", False), ("drops", True)])
def test_decoders_equal_numpy(name, unrolled):
    """Logits, and what the routers of each layer did, of padded rows."""
    cfg = tiny.EXPERTS[name]
    weights, tokens, routers = tiny.weights(model.spec(cfg)), tiny.tokens(3, 9), oracle.Routers()
    want, _ = oracle.decoder(weights, cfg, tokens, POSITIONS, routers=routers)
    tree = model.unstack(weights, cfg) if unrolled else weights
    out = tiny.jit(lambda p, t: model.forward(p, cfg, t, positions=POSITIONS))(tree, tokens)
    np.testing.assert_allclose(np.asarray(out.logits)[VALID], want[VALID], atol=3e-5)
    did = by_layer(out.routing, cfg.stack)
    assert len(did) == len(routers.did) == sum(isinstance(one.feedforward, config.Moe) for one in cfg.stack.blocks())
    for ours, theirs in zip(did, routers.did, strict=True):
        for field in ("tokens", "scores", "load", "entropy", "squares", "dropped"):
            np.testing.assert_allclose(getattr(ours, field), theirs[field], atol=1e-3, rtol=1e-5, err_msg=field)
        if theirs["experts"] is not None:
            np.testing.assert_array_equal(ours.experts, theirs["experts"])


def test_an_encoder_where_experts_choose_equals_numpy():
    cfg = tiny.EXPERT_ENCODER
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(3, 9)
    got = tiny.jit(lambda p, t: model.forward(p, cfg, t, lengths=LENGTHS).logits)(weights, tokens)
    np.testing.assert_allclose(got, oracle.side(weights["encoder"], cfg, tokens, POSITIONS)[0], atol=3e-5)


def test_mixtures_on_both_sides_equal_numpy():
    cfg = tiny.EXPERT_SIDES
    weights, inputs, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 6), tiny.tokens(2, 5, seed=1)
    got = tiny.jit(lambda p: model.forward(p, cfg, tokens, memory=model.encode(p, cfg, inputs)).logits)(weights)
    np.testing.assert_allclose(got, oracle.encoder_decoder(weights, cfg, inputs, tokens), atol=3e-5)


@pytest.mark.parametrize("name, unrolled", [pytest.param("routers", False, marks=pytest.mark.slow), ("groups", True)])
def test_a_text_in_calls_is_the_text_at_once(name, unrolled):
    """Routers that drop nothing: a prompt of ragged rows, then tokens one by one, four at a time."""
    cfg = tiny.EXPERTS[name]
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 11)
    whole = tiny.jit(lambda w: model.forward(w, cfg, tokens).logits)(weights)
    known = cache.allocate(cfg.stack, 2, 16)
    if unrolled:
        weights, known = model.unstack(weights, cfg), cache.unstack(known)
    forward = tiny.jit(lambda w, t, known, lengths: model.forward(w, cfg, t, cache=known, lengths=lengths))
    length = np.zeros(2, np.int32)
    for counts in ([4, 2], [3, 4], [1, 4], [3, 1]):
        part = np.zeros((2, 4), np.int32)
        for row, (start, count) in enumerate(zip(length, counts, strict=True)):
            part[row, :count] = tokens[row, start:start + count]
        out = forward(weights, part, known, jnp.asarray(counts))
        for row, (start, count) in enumerate(zip(length, counts, strict=True)):
            np.testing.assert_allclose(out.logits[row, :count], whole[row, start:start + count], atol=3e-5)
        known = cache.append(known, out.kv, jnp.asarray(counts))
        length = length + counts
    assert length.tolist() == [11, 11]


@pytest.mark.parametrize("sizes, kind", [({"expert": 4, "model": 2}, "int8"), ({"data": 2, "fsdp": 2, "expert": 2}, "array")],
                         ids=str)
def test_a_mesh_gives_the_same_logits(sizes, kind):
    cfg = tiny.decoder([tiny.block(feedforward=tiny.MOES["groups"])] * 2)
    spec, mesh, tokens = model.spec(cfg), sharding.mesh(**sizes), tiny.tokens(8, 6)
    weights = tiny.weights(spec)
    weights = tiny.quantised(spec, weights) if kind == "int8" else weights
    forward = tiny.jit(lambda p, t: model.forward(p, cfg, t).logits)
    want = forward(weights, tokens)
    with jax.set_mesh(mesh):
        tree = jax.device_put(weights, sharding.match(weights, spec, mesh))
        rows = NamedSharding(mesh, sharding.partition(("batch", None), tokens.shape, mesh.shape))
        np.testing.assert_allclose(forward(tree, jax.device_put(tokens, rows)), want, atol=3e-5)
        up = tree["decoder"]["blocks"]["0"]["0"]["feedforward"]["experts"]["up"]
        leaf = up.values if isinstance(up, Int8) else up
        assert leaf.addressable_shards[0].data.size * 8 // mesh.shape["data"] == leaf.size


@pytest.mark.slow
def test_remat_changes_no_gradient():
    cfg = tiny.decoder([tiny.block(feedforward=tiny.MOES["recurrent"])] * 2)
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 5)

    def gradient(remat):
        return tiny.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.forward(p, cfg, tokens, remat=remat).logits))))(weights)

    for got, want in zip(*(jax.tree.leaves(gradient(remat)) for remat in (None, jax.checkpoint_policies.nothing_saveable)),
                         strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_every_param_has_a_rule():
    for cfg in (*tiny.EXPERTS.values(), tiny.EXPERT_ENCODER, tiny.EXPERT_SIDES):
        for param in params.paths(model.spec(cfg)).values():
            sharding.partition(param.axes, param.shape, dict.fromkeys(sharding.AXES, 2))


def test_a_prefix_that_ends_before_the_recurrent_router_runs_without_it():
    """The first layers of a stack are a model of their own: the weights that routers share are then left alone."""
    cfg = tiny.decoder([tiny.block(), tiny.block(feedforward=tiny.MOES["recurrent"])])
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(1, 3)
    shorter, tree, _ = model.prefix(cfg, weights, cache.allocate(cfg.stack, 1, 4), 1)
    states = tiny.jit(lambda *trees: [model.forward(tree, cfg, tokens, logits=False, hidden=(1,)).hidden[0]
                                      for tree, cfg in zip(trees, (shorter, cfg), strict=True)])(tree, weights)
    np.testing.assert_allclose(*states, atol=1e-6)


DENSE = tiny.decoder([tiny.block()])


@pytest.mark.parametrize("name, active", [
    ("softmax", 4 * 16 + 2 * 3 * 16 * 8),  # the router, then two experts of three matrices
    ("gate", 6 * 16 + 2 * 3 * 16 * 6 + 2 * 16 * 8 + 16), ("switch", 4 * 16 + 2 * 16 * 6), ("hash", 2 * 2 * 16 * 6),
    ("keys", 2 * 3 * 16 * 6 + 4 * 16), ("relu", 4 * 16 + 4 * 3 * 16 * 6), ("choice", 4 * 16 + 1.5 * 3 * 16 * 6 + 3 * 16 * 6),
    ("recurrent", 5 * 16 + 5 * 4 + 2 * 3 * 16 * 6 + 2 * 3 * 5 * 5)])
def test_products_are_those_of_the_experts_that_a_token_goes_to(name, active):
    dense = model.products(DENSE) - 3 * 16 * 24
    assert model.products(tiny.decoder([tiny.block(feedforward=tiny.MOES[name])])) == dense + active


X, TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32), tiny.tokens(2, 5)


class TestFlax:
    def test_a_decoder(self):
        """Of which the routers share weights that belong to no block."""
        cfg = tiny.decoder([tiny.block(feedforward=tiny.MOES["recurrent"])] * 2)
        weights = tiny.weights(model.spec(cfg))
        want, _ = oracle.decoder(weights, cfg, TOKENS)
        got = tiny.jit(lambda w: doors.Decoder(cfg).apply({"params": w}, TOKENS).logits)(weights)
        np.testing.assert_allclose(got, want, atol=3e-5)
        module = doors.to_nnx(model.Model(cfg, weights))
        assert jax.tree.structure(module.weights()) == jax.tree.structure(weights)

    def test_a_layer(self):
        cfg = tiny.MOES["capacity"]
        module, spec = doors.Moe(cfg), moe.spec(cfg, 16)
        positions = np.where(np.arange(5)[None] < np.array([[5], [3]]), np.arange(5)[None], -1).astype(np.int32)
        fresh = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
        assert jax.tree.map(lambda leaf: leaf.shape, fresh) == jax.tree.map(lambda param: param.shape, spec)
        weights = tiny.weights(spec)
        out, routing = tiny.jit(lambda w: module.apply({"params": w}, X, positions=positions))(weights)
        want, did = oracle.moe(weights, cfg, np.asarray(X, np.float64), positions)
        np.testing.assert_allclose(np.asarray(out)[positions >= 0], want[positions >= 0], atol=3e-5)
        assert routing.dropped == did["dropped"] > 0

    @pytest.mark.parametrize("name", ["groups", "hash"])
    def test_a_block(self, name):
        """A hash needs the ids."""
        one = tiny.block(feedforward=tiny.MOES[name])
        weights = tiny.weights(block.spec(one, 16))
        out = tiny.jit(lambda w: doors.Block(one).apply({"params": w}, X, tokens=TOKENS))(weights)[0]
        routers = oracle.Routers(np.asarray(TOKENS))
        want = oracle.block(weights, one, np.asarray(X, np.float64), np.arange(5)[None].repeat(2, 0), routers=routers)
        np.testing.assert_allclose(out, want, atol=3e-5)

    def test_a_block_whose_router_is_recurrent_belongs_in_a_stack(self):
        one = tiny.block(feedforward=tiny.MOES["recurrent"])
        with pytest.raises(ValueError, match="run its block as part of a stack"):
            jax.eval_shape(lambda w: doors.Block(one).apply({"params": w}, X), tiny.weights(block.spec(one, 16)))
