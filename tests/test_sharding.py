import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import cache, model, params, sharding
from tests import tiny

SIZES = {"data": 2, "fsdp": 2, "model": 4}


@pytest.mark.parametrize("axes, shape, want", [
    (("embed", "heads", "head"), (16, 8, 5), ("fsdp", "model", None)),
    (("batch", "length", "embed"), (8, 6, 16), None),
    (("batch", "length"), (8, 6), (("data", "fsdp"), None)),
    (("batch", "length"), (6, 6), ("data", None)),  # 6 rows over 4 devices: over the first axis alone
    (("batch", "length"), (5, 6), (None, None)),
    (("embed", "kv_heads", "head"), (16, 2, 5), ("fsdp", None, None)),  # 2 heads over 4 devices
    (("layers", None, "mlp"), (3, 4, 8), (None, None, "model")),
    (("experts", "embed", "mlp"), (8, 16, 8), (None, "fsdp", "model")),  # the mesh does not have this axis
])
def test_partition(axes, shape, want):
    if want is None:
        with pytest.raises(ValueError, match="mesh axis 'fsdp' would split both 'batch' and 'embed'"):
            sharding.partition(axes, shape, SIZES)
    else:
        assert tuple(sharding.partition(axes, shape, SIZES)) == want


def test_axes_of_size_one_collide_with_nothing():
    assert tuple(sharding.partition(("batch", "embed"), (8, 16), {"data": 8, "fsdp": 1})) == ("data", None)


def test_partition_by_other_rules():
    rules = sharding.RULES | {"head": "model", "heads": None}
    assert tuple(sharding.partition(("heads", "head"), (8, 8), SIZES, rules)) == (None, "model")
    with pytest.raises(ValueError, match="'model' would split both 'heads' and 'head'"):
        sharding.partition(("heads", "head"), (8, 8), SIZES, sharding.RULES | {"head": "model"})


def test_partition_names_an_axis_without_a_rule():
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'width'; there are rules for batch"):
        sharding.partition(("width",), (8,), SIZES)


def test_every_param_and_the_cache_have_rules():
    for cfg in tiny.CAUSAL.values():
        for param in params.paths(model.spec(cfg)).values():
            sharding.partition(param.axes, param.shape, dict.fromkeys(sharding.AXES, 2))
    assert tuple(sharding.partition(cache.AXES, (3, 4, 2, 8, 8), SIZES)) == (None, ("data", "fsdp"), None, None, None)


@pytest.mark.parametrize("sizes, message", [
    ({"tensor": 8}, "no mesh axis is called tensor; the axes are data, fsdp, expert, sequence, model"),
    ({"data": 3}, "need 3 devices, there are 8"),
    ({"data": 3, "model": -1}, "need 6 devices, there are 8"),
    ({"data": 16, "model": -1}, "need 16 devices, there are 8"),
    ({"data": -1, "model": -1}, "only one mesh axis may be -1, got data, model"),
    ({"data": 0, "model": -1}, "the size of mesh axis 'data' must be positive, or -1 for what is left, got 0"),
    ({"data": -2, "model": -4}, "the size of mesh axis 'data' must be positive"),
])
def test_mesh_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.mesh(**sizes)


def test_mesh_fills_what_is_left():
    assert dict(sharding.mesh(fsdp=2, model=-1).shape) == {"data": 1, "fsdp": 2, "expert": 1, "sequence": 1, "model": 4}
    assert sharding.mesh(data=3, devices=jax.devices()[:3]).size == 3


CFG = tiny.LOCAL
TOKENS = tiny.tokens(8, 6)


@functools.cache
def single(kind):
    """Weights, and their logits on one device."""
    spec = model.spec(CFG)
    tree = tiny.weights(spec)
    tree = tiny.quantised(spec, tree) if kind == "int8" else tree
    return tree, np.asarray(tiny.jit(lambda p, t: model.forward(p, CFG, t).logits)(tree, TOKENS))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"model": 2, "data": 4},
                                   {"data": 2, "fsdp": 2, "model": 2}, {"model": 4, "fsdp": 2}], ids=str)
@pytest.mark.parametrize("kind", ["array", "int8"])
def test_any_mesh_gives_the_same_logits(sizes, kind):
    mesh, spec = sharding.mesh(**sizes), model.spec(CFG)
    tree, want = single(kind)
    shardings = sharding.match(tree, spec, mesh)
    assert kind == "int8" or shardings == sharding.shardings(spec, mesh)
    tree = jax.device_put(tree, shardings)
    if sizes.get("fsdp", 1) * sizes.get("model", 1) == 8:
        up = tree["decoder"]["blocks"]["0"]["0"]["feedforward"]["up"]
        leaf = up.values if kind == "int8" else up
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    rows = NamedSharding(mesh, sharding.partition(("batch", None), TOKENS.shape, mesh.shape))
    out = tiny.jit(lambda p, t: model.forward(p, CFG, t).logits)(tree, jax.device_put(TOKENS, rows))
    np.testing.assert_allclose(out, want, atol=2e-5)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "model": 2}, {"model": 4, "data": 2}], ids=str)
def test_latent_attention_on_a_mesh(sizes):
    """A prefill and a step on its cache: heads are split, what the cache keeps of a token is on all devices of its row."""
    cfg, mesh = tiny.LATENT, sharding.mesh(**sizes)
    weights = tiny.weights(model.spec(cfg))

    def run(params, tokens):
        first = model.forward(params, cfg, tokens[:, :4])
        known = cache.append(cache.allocate(cfg.stack, 8, 8), first.kv, jnp.full(8, 4, jnp.int32))
        known = known.replace(layers=cache.constrained(known.layers))
        out = model.forward(params, cfg, tokens[:, 4:], cache=known)
        return out.logits, cache.append(known, out.kv, jnp.full(8, 2, jnp.int32))

    want, kept = tiny.jit(run)(weights, TOKENS)
    placed = jax.device_put(weights, sharding.shardings(model.spec(cfg), mesh))
    assert placed["decoder"]["blocks"]["0"]["0"]["attention"]["k"].sharding.spec[1] == "model"
    rows = NamedSharding(mesh, sharding.partition(("batch", None), TOKENS.shape, mesh.shape))
    with jax.set_mesh(mesh):
        got, split = tiny.jit(run)(placed, jax.device_put(TOKENS, rows))
    np.testing.assert_allclose(got, want, atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_an_int8_scale_is_split_like_its_values_where_it_can_be():
    mesh, spec = sharding.mesh(fsdp=4, model=2), model.spec(CFG)
    up = sharding.match(single("int8")[0], spec, mesh)["decoder"]["blocks"]["0"]["0"]["feedforward"]["up"]
    assert tuple(up.values.spec) == (None, "fsdp", "model") and tuple(up.scale.spec) == (None, None, "model")


def test_constrain():
    x = jnp.zeros((8, 4, 16))
    assert sharding.constrain(x, ("batch", "length", None)) is x
    with jax.set_mesh(sharding.mesh(data=4, model=2)):
        out = jax.jit(lambda x: sharding.constrain(x, ("batch", "length", "mlp")))(x)
        assert out.sharding.spec == PartitionSpec("data", None, "model")
    with jax.set_mesh(sharding.mesh(devices=jax.devices()[:1])):
        assert sharding.constrain(x, ("batch", "length", None)) is x
