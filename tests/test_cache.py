"""However a text is cut into calls, its logits are those of one call without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cache, model
from tests import tiny

LENGTHS = np.array([12, 7, 3], np.int32)
ROWS, WIDTH = len(LENGTHS), 12
SLOTS = 16


def positions_of(starts, counts, width):
    index = np.arange(width)[None]
    return np.where(index < counts[:, None], starts[:, None] + index, -1).astype(np.int32)


@functools.cache
def setting(name):
    """(config, weights, text [3, 12], its logits without a cache)"""
    cfg = tiny.CAUSAL[name]
    params, tokens = tiny.weights(model.spec(cfg)), np.asarray(tiny.tokens(ROWS, WIDTH))
    whole = tiny.jit(lambda p, t: model.forward(p, cfg, t, positions=positions_of(0 * LENGTHS, LENGTHS, WIDTH)).logits)
    return cfg, params, tokens, np.asarray(whole(params, tokens))


@functools.cache
def step(cfg):
    def run(params, memory, tokens, positions, context, count):
        out = model.forward(params, cfg, tokens, positions=positions, cache=memory, context=context)
        return out.logits, cache.append(memory, out.kv, count)
    return tiny.jit(run)


def empty(cfg, unrolled, slots=SLOTS):
    memory = cache.allocate(cfg.stack, ROWS, slots)
    return cache.unstack(memory) if unrolled else memory


def play(name, unrolled, chunks, width, memory=None, done=0 * LENGTHS):
    """Runs the text in calls of `width` tokens, of which row b takes chunks[i][b]; checks every call's logits."""
    cfg, params, tokens, whole = setting(name)
    params = model.unstack(params, cfg) if unrolled else params
    memory = empty(cfg, unrolled) if memory is None else memory
    for wanted in chunks:
        counts = np.minimum(wanted, LENGTHS - done)
        index = np.minimum(done[:, None] + np.arange(width), WIDTH - 1)
        logits, memory = step(cfg)(params, memory, np.take_along_axis(tokens, index, axis=1),
                                   positions_of(done, counts, width), LENGTHS, counts)
        logits = np.asarray(logits)
        for row in range(ROWS):
            np.testing.assert_allclose(logits[row, :counts[row]],
                                       whole[row, done[row]:done[row] + counts[row]], atol=2e-5)
        done = done + counts
        np.testing.assert_array_equal(memory.length, done)
    np.testing.assert_array_equal(done, LENGTHS)


@pytest.mark.parametrize("unrolled", [False, True], ids=["scan", "unrolled"])
@pytest.mark.parametrize("name", tiny.CAUSAL)
class TestCuts:
    def test_one_token_at_a_time(self, name, unrolled):
        play(name, unrolled, [np.ones(ROWS, np.int32)] * WIDTH, 1)

    def test_chunks(self, name, unrolled):
        play(name, unrolled, [np.full(ROWS, 4, np.int32)] * 3, 4)

    def test_ragged_rows(self, name, unrolled):
        play(name, unrolled, np.array([[4, 1, 0], [1, 4, 2], [3, 0, 1], [4, 2, 0]], np.int32), 4)

    def test_prefill_without_a_cache_before_it(self, name, unrolled):
        cfg, params, tokens, _ = setting(name)
        params = model.unstack(params, cfg) if unrolled else params
        counts = np.array([4, 2, 3], np.int32)

        @tiny.jit
        def prefill(params, tokens):
            out = model.forward(params, cfg, tokens, positions=positions_of(0 * counts, counts, 4), context=LENGTHS)
            return cache.filled(out.kv, SLOTS, jnp.asarray(counts))

        memory = prefill(params, tokens[:, :4])
        assert memory.slots == SLOTS
        play(name, unrolled, [np.full(ROWS, 4, np.int32)] * 2, 4, memory, counts)


@pytest.mark.parametrize("name", ["local", "alibi", "sinks"])
def test_prefill_into_an_empty_cache(name):
    play(name, False, [np.full(ROWS, WIDTH, np.int32)], WIDTH)


def test_one_row_is_written_as_many_are():
    cfg, params, tokens, whole = setting("local")
    memory = cache.allocate(cfg.stack, 1, WIDTH)
    for done in range(0, WIDTH, 4):
        logits, memory = step(cfg)(params, memory, tokens[:1, done:done + 4],
                                   np.arange(done, done + 4, dtype=np.int32)[None], LENGTHS[:1], np.int32([4]))
        np.testing.assert_allclose(logits, whole[:1, done:done + 4], atol=2e-5)


# Node 0 is the root; two branches, one of which splits again.
PARENTS = np.array([-1, 0, 0, 1, 1, 2])
PATHS = [[0, 1, 3], [0, 1, 4], [0, 2, 5]]


@pytest.mark.parametrize("unrolled", [False, True], ids=["scan", "unrolled"])
@pytest.mark.parametrize("name", ["local", "alibi", "scalings", "sinks", "learned", "latent"])
def test_a_tree_is_its_paths(name, unrolled):
    """Each node's logits are those of the text along its path; after a commit the text goes on from that path."""
    cfg, stacked, tokens, _ = setting(name)
    params = model.unstack(stacked, cfg) if unrolled else stacked
    starts, context = np.array([4, 2, 0], np.int32), np.full(ROWS, 12, np.int32)
    nodes, after = (np.asarray(tiny.tokens(ROWS, width, seed=width)) for width in (len(PARENTS), 4))

    memory = empty(cfg, unrolled)
    _, memory = step(cfg)(params, memory, tokens[:, :4], positions_of(0 * starts, starts, 4), context, starts)

    ancestors = np.eye(len(PARENTS), dtype=bool)
    depth = np.zeros(len(PARENTS), np.int32)
    for node, parent in enumerate(PARENTS[1:], 1):
        ancestors[node] |= ancestors[parent]
        depth[node] = depth[parent] + 1

    @tiny.jit
    def grow(params, memory, path, count):
        out = model.forward(params, cfg, jnp.asarray(nodes), positions=starts[:, None] + depth[None],
                            mask=ancestors[None], cache=memory, context=context)
        return out.logits, cache.commit(memory, out.kv, path, count)

    counts = np.array([3, 2, 3], np.int32)
    logits, memory = grow(params, memory, np.array(PATHS), counts)
    np.testing.assert_array_equal(memory.length, starts + counts)
    last, _ = step(cfg)(params, memory, after, positions_of(starts + counts, np.full(ROWS, 4), 4), context, counts)
    logits, last = np.asarray(logits), np.asarray(last)

    for row, mine in enumerate(PATHS):
        for path in (*PATHS, mine):
            text = [tokens[row, :starts[row]], nodes[row, np.array(path)]]
            if path is mine:
                text = [text[0], text[1][:counts[row]], after[row]]
            text = np.concatenate(text)
            positions = positions_of(np.array([0]), np.array([len(text)]), WIDTH)
            want = plain(cfg)(stacked, np.pad(text, (0, WIDTH - len(text)))[None], positions, context[:1])
            want = np.asarray(want)
            if path is mine:
                begin = starts[row] + counts[row]
                np.testing.assert_allclose(last[row], want[0, begin:begin + 4], atol=2e-5)
            else:
                np.testing.assert_allclose(logits[row, np.array(path)], want[0, starts[row]:starts[row] + 3], atol=2e-5)


@functools.cache
def plain(cfg):
    return tiny.jit(lambda p, t, positions, context: model.forward(p, cfg, t, positions=positions,
                                                                 context=context).logits)


class TestFull:
    cfg = tiny.decoder([tiny.block(window=2)] * 2)

    def new(self, batch, width):
        shape = (2, batch, 2, width, 8)
        return ((cache.KeyValue(jnp.ones(shape), jnp.ones(shape)),),)

    def test_a_cache_that_is_just_full_works(self):
        memory = cache.allocate(self.cfg.stack, 2, 6)
        memory = cache.append(memory, self.new(2, 4), jnp.array([4, 2]))
        memory = cache.append(memory, self.new(2, 2), jnp.array([2, 2]))
        np.testing.assert_array_equal(memory.length, [6, 4])
        np.testing.assert_array_equal(memory.layers[0][0].k[1, 0, 0, :, 0], np.ones(6))
        np.testing.assert_array_equal(memory.layers[0][0].v[0, 1, 1, :, 7], [1, 1, 1, 1, 0, 0])

    @pytest.mark.parametrize("batch", [1, 2])
    def test_known_lengths_raise(self, batch):
        memory = cache.append(cache.allocate(self.cfg.stack, batch, 6), self.new(batch, 4),
                              jnp.array([3, 4][-batch:]))
        message = f"row {batch - 1} holds 4 of 6 slots and 3 more were to be written"
        with pytest.raises(ValueError, match=message):
            cache.append(memory, self.new(batch, 3), jnp.ones(batch, jnp.int32))

    @pytest.mark.parametrize("unrolled", [False, True], ids=["scan", "unrolled"])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_traced_lengths_give_nan_for_that_row_only(self, batch, unrolled):
        params = tiny.weights(model.spec(self.cfg))
        params = model.unstack(params, self.cfg) if unrolled else params
        memory = cache.allocate(self.cfg.stack, batch, 6).replace(length=jnp.array([2, 4][-batch:]))
        memory = cache.unstack(memory) if unrolled else memory
        tokens = tiny.tokens(batch, 3)

        @tiny.jit
        def write(memory):
            out = model.forward(params, self.cfg, tokens, cache=memory)
            return out.logits, cache.append(memory, out.kv, jnp.full(batch, 1, jnp.int32))

        logits, memory = write(memory)
        assert np.isfinite(logits).all()  # the call that did not fit is itself right
        logits, _ = write(memory)
        assert np.isnan(logits[-1]).all()
        assert batch == 1 or np.isfinite(logits[0]).all()


def test_what_lies_beyond_the_length_is_never_seen():
    cfg, params, tokens, whole = setting("sinks")
    memory = empty(cfg, False)
    junk = memory.replace(layers=jax.tree.map(lambda leaf: leaf + 1e6, memory.layers))
    counts = np.minimum(LENGTHS, 4)
    logits, _ = step(cfg)(params, junk, tokens[:, :4], positions_of(0 * LENGTHS, counts, 4), LENGTHS, counts)
    np.testing.assert_allclose(logits[0], whole[0, :4], atol=2e-5)


def test_commit_picks_rows_by_path():
    cfg = tiny.decoder([tiny.block()] * 3)
    rows = jax.random.normal(jax.random.key(0), (3, 2, 2, 5, 8))
    new = ((cache.KeyValue(rows, -rows),),)
    memory = cache.allocate(cfg.stack, 2, 8).replace(length=jnp.array([1, 4]))
    memory = cache.commit(memory, new, jnp.array([[0, 2, 4], [1, 3, 3]]), jnp.array([3, 2]))
    got = memory.layers[0][0]
    np.testing.assert_array_equal(got.k[:, 0, :, 1:4], rows[:, 0][:, :, np.array([0, 2, 4])])
    np.testing.assert_array_equal(got.v[:, 1, :, 4:6], -rows[:, 1][:, :, np.array([1, 3])])
    assert not np.asarray(got.k[:, 0, :, :1]).any() and not np.asarray(got.k[:, 0, :, 4:]).any()
    np.testing.assert_array_equal(memory.length, [4, 6])


def test_shapes_are_those_of_the_config():
    memory = cache.allocate(tiny.GROUPS.stack, 3, 5, jnp.bfloat16)
    shapes = [[kv.k.shape for kv in group] for group in memory.layers]
    assert shapes == [[(2, 3, 2, 5, 8)], [(1, 3, 1, 5, 4), (1, 3, 2, 5, 8)], [(2, 3, 2, 5, 8)] * 2]
    assert {leaf.dtype for leaf in jax.tree.leaves(memory.layers)} == {jnp.dtype(jnp.bfloat16)}
    abstract = cache.spec(tiny.GROUPS.stack, 3, 5, jnp.bfloat16)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), memory)
    (first, second), = cache.allocate(tiny.LATENT.stack, 3, 5).layers  # a latent of 12 and 4 dimensions that turn, no values
    assert first.k.shape == second.k.shape == (2, 3, 1, 5, 16) and first.v is None
    unrolled = cache.unstack(memory)
    assert [len(kv.v) for kv in unrolled.layers[2]] == [2, 2] and unrolled.slots == memory.slots == 5


@pytest.mark.parametrize("batch, slots", [(0, 4), (2, 0), (-1, 4)])
def test_an_empty_cache_must_have_room(batch, slots):
    with pytest.raises(ValueError, match=f"got {batch} rows of {slots} slots"):
        cache.allocate(tiny.LOCAL.stack, batch, slots)


@pytest.mark.parametrize("unrolled", ["weights", "cache"])
def test_weights_and_cache_must_be_laid_out_alike(unrolled):
    cfg = tiny.LOCAL
    params, memory = tiny.weights(model.spec(cfg)), cache.allocate(cfg.stack, 1, 4)
    if unrolled == "weights":
        params = model.unstack(params, cfg)
    else:
        memory = cache.unstack(memory)
    with pytest.raises(ValueError, match="both be stacked or both be unstacked"):
        model.forward(params, cfg, tiny.tokens(1, 2), cache=memory)
