"""Maximal update parametrisation, by its coordinate check: what a few steps change does not depend on the width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, model, params
from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, stack_of
from jaxlm.objectives import text
from jaxlm.training import mup
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Constant
from jaxlm.training.step import advance, begin
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")


def decoder(width, head=16, tied=True):
    block = Block(Attention(width // head, width // head, head), Dense(2 * width), PreNorm(RmsNorm()))
    return Decoder(width, Embedding(61), stack_of([block] * 2), RmsNorm(), Head(tied), 32)


def moved(cfg, multipliers):
    """How far, on average, four steps move the logits."""
    spec = model.spec(cfg)
    transform = Optimizer(AdamW(weight_decay=0.0), Constant(1e-2), multipliers=multipliers).transform(spec)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (4, 17)), jnp.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((4, 16)),
             "segments": jnp.ones((4, 16), jnp.int32)}

    @tiny.jit
    def steps(key):
        state = begin(params.init(spec, key), transform, key)
        first = model.forward(state.params, cfg, batch["tokens"]).logits

        def once(state, _):
            return advance(lambda weights, batch, *_: (text.loss(weights, cfg, batch), ()), transform, state, batch)[0], None

        state, _ = jax.lax.scan(once, state, None, length=4)
        return jnp.mean(jnp.abs(model.forward(state.params, cfg, batch["tokens"]).logits - first))

    return float(steps(jax.random.key(1)))


def test_what_steps_change_does_not_depend_on_the_width():
    base = decoder(32)
    found = [moved(*mup.scaled(decoder(width), base)) for width in (32, 128, 512)]
    plain = [moved(decoder(width), ()) for width in (32, 512)]
    print(f"muP {found}, standard {plain}")
    assert max(found) < 1.6 * min(found)
    assert plain[1] > 3 * plain[0]  # the check sees a difference where there is one


def test_the_base_itself_is_left_as_it_is():
    cfg, multipliers = mup.scaled(decoder(32), decoder(32))
    assert multipliers == () and cfg.head.scale == 1.0
    assert {block.attention.scale for block in cfg.stack.blocks()} == {16**-0.5}


def test_rates_scales_and_scores():
    cfg, multipliers = mup.scaled(decoder(128, head=32, tied=False), decoder(32, tied=False))
    rates = dict(multipliers)
    assert rates["decoder/blocks/0/0/attention/q"] == 1 / 4 and rates["decoder/blocks/0/0/feedforward/down"] == 1 / 4
    assert not any("embedding" in path or "head" in path or "norm" in path for path in rates)
    assert cfg.head.scale == 32 / 128
    assert {block.attention.scale for block in cfg.stack.blocks()} == {16**-0.5 * 16 / 32}


def test_another_kind_of_model_is_no_base():
    with pytest.raises(ValueError, match="differ in decoder/head/out"):
        mup.scaled(decoder(32), decoder(32, tied=False))
    deeper = config.Decoder(32, Embedding(61), stack_of([decoder(32).stack.blocks()[0]] * 3), RmsNorm(), Head(True), 32)
    with pytest.raises(ValueError, match="differ in layers"):
        mup.scaled(decoder(32), deeper)
