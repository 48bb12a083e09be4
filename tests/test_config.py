import contextlib
import dataclasses
import enum
import types
import typing

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

from jaxlm import config, model, params
from jaxlm.cache import Memory
from jaxlm.config import (
    Alibi,
    Attention,
    Block,
    Decoder,
    Dense,
    DynamicNtkScaling,
    Embedding,
    Group,
    Head,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Moe,
    PreNorm,
    RmsNorm,
    Rope,
    Stack,
    TopK,
    YarnScaling,
    stack_of,
)
from tests import tiny

CONFIGS = (*tiny.CAUSAL.values(), tiny.BIDIRECTIONAL, *tiny.ENCODERS.values(), *tiny.ENCODER_DECODERS.values(),
           tiny.ENCODER_DECODERS["shared"].decoder,
           *(tiny.decoder([tiny.block(feedforward=one)]) for one in tiny.MOES.values()))

# What a forward pass does not read, with the place where it is read.
LIMITS = {("Decoder", "length"), ("Encoder", "length"),  # the longest text that generation and data programs make
          ("EncoderDecoder", "start")}  # what generation begins with


def program(cfg):
    """What is computed: every weight's shape and axes, and the traced forward pass with its constants."""
    spec = model.spec(cfg)
    weights = {path: (param.shape, param.axes, param.inputs) for path, param in params.paths(spec).items()}
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)

    def run(weights, tokens):
        source = model.encode(weights, cfg, tokens) if isinstance(cfg, config.EncoderDecoder) else None
        crossing = [block.cross for block in cfg.stack.blocks() if block.cross] if isinstance(cfg, Decoder) else None
        if crossing:
            source = Memory(jnp.ones((2, 5, crossing[0].source)), None, jnp.ones((2, 5), jnp.int32))
        out = model.forward(weights, cfg, tokens, memory=source)
        return out.last if out.logits is None else out.logits

    return str(weights) + jax.jit(run).lower(params.abstract(spec), tokens).as_text()


def changed(value):
    """Values that differ from `value` and may stand in its place."""
    match value:
        case bool():
            yield not value
        case enum.Enum():
            yield from (member for member in type(value) if member is not value)
        case int():
            yield from (value + 1, value * 2, value // 2, value - 2)
        case float():
            yield from (value * 1.5 + 0.25, value / 2)
        case None:
            yield from (3, 0.7, Rope(), LinearScaling(2.0), RmsNorm(), config.QkNorm(RmsNorm()), Learned(80),
                        tiny.cross(12), config.Transform(config.Activation.RELU), Head(False), config.CapacityTokens(1),
                        config.ExpertGroups(2, 1))
        case tuple() if isinstance(value[0], float):
            yield (value[0] * 1.5, *value[1:])
        case tuple():
            yield (*value, value[-1])
        case _:
            yield from (RmsNorm(3e-5), LayerNorm(3e-5), PreNorm(LayerNorm(3e-5)), LinearScaling(3.5), Rope(123.0),
                        None, Dense(7), Attention(2, 2, 4), tiny.latent().attention, Embedding(23), Head(False), TopK(1),
                        config.CapacityTokens(5), config.ExpertGroups(1, 1), stack_of([tiny.block()] * 3),
                        stack_of([tiny.block(causal=False)] * 3), tiny.decoder([tiny.block(cross=tiny.cross())]),
                        tiny.encoder([tiny.block(causal=False)]))


def places(cfg):
    """(type, field, function from a value to the whole config with that value there) of every field within."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)

        def put(new, field=field):
            return dataclasses.replace(cfg, **{field.name: new})

        yield type(cfg), field, value, put
        inside = value if isinstance(value, tuple) else (value,)
        for index, item in enumerate(inside):
            if dataclasses.is_dataclass(item):
                for kind, deeper, old, outer in places(item):
                    def through(new, index=index, outer=outer, value=value, put=put):
                        made = outer(new)
                        return put((*value[:index], made, *value[index + 1:]) if isinstance(value, tuple) else made)
                    yield kind, deeper, old, through


def fits(kind, field, value):
    hint = typing.get_type_hints(kind)[field.name]
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(type(value) is (typing.get_origin(member) or member) for member in members)


def others(kind, field, value, put):
    """The whole config with other values in this field, as far as they are valid."""
    for new in changed(value):
        if fits(kind, field, new):
            with contextlib.suppress(ValueError):
                yield put(new)


EVERY_FIELD = {(name, field.name) for name, kind in config.TYPES.items() for field in dataclasses.fields(kind)}


def test_every_field_changes_the_program():
    seen = set()
    for cfg in CONFIGS:
        base = program(cfg)
        for kind, field, value, put in places(cfg):
            name = (kind.__name__, field.name)
            valid = [] if name in seen else list(others(kind, field, value, put))
            if valid:
                assert any(program(other) != base for other in valid) == (name not in LIMITS), name
                seen.add(name)
    assert seen == EVERY_FIELD


def test_types_are_all_there():
    made = {name for name, kind in vars(config).items()
            if dataclasses.is_dataclass(kind) and isinstance(kind, type)}
    assert made == set(config.TYPES)
    assert all(kind.__dataclass_params__.frozen for kind in config.TYPES.values())


def test_every_activation_is_another_function():
    programs = {program(tiny.decoder([tiny.block(feedforward=Dense(24, kind))])) for kind in config.Activation}
    assert len(programs) == len(config.Activation)


norms = st.builds(RmsNorm, st.floats(0, 1), st.floats(-2, 2)) | st.builds(LayerNorm, st.floats(0, 1), st.booleans())
positive = st.floats(0.01, 1e6)
scalings = st.one_of(
    st.none(), st.builds(LinearScaling, positive),
    st.builds(DynamicNtkScaling, st.floats(1, 100), st.integers(1, 9999)),
    st.builds(YarnScaling, positive, st.integers(1, 9999), positive, st.floats(2, 99), st.floats(0.1, 1.5), st.booleans()),
    st.builds(Llama3Scaling, positive, st.floats(0.1, 1), st.floats(2, 9), st.integers(1, 9999)),
    st.builds(LongRopeScaling, st.tuples(positive, positive), st.tuples(positive, positive), st.integers(1, 9999),
              positive))


feedforwards = st.one_of(
    st.builds(Dense, st.integers(1, 99), st.sampled_from(config.Activation), st.booleans(), st.booleans()),
    st.builds(Dense, st.integers(1, 99), clip=st.none() | positive, offset=st.floats(-2, 2)))
choices = st.builds(TopK, st.integers(1, 3), st.sampled_from(config.Score), st.booleans(), positive,
                    st.none() | st.builds(config.ExpertGroups, st.just(3), st.integers(1, 3), st.integers(1, 3)), st.booleans(),
                    st.booleans())
routers = st.one_of(
    choices, st.builds(config.Hash, st.integers(1, 9), st.integers(0, 99)), st.builds(config.ReluNorm, norms),
    st.builds(config.Recurrent, st.just(5), choices), st.builds(config.AverageKey, st.integers(1, 9)),
    st.builds(config.ExpertChoice, positive))


@st.composite
def blocks(draw):
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    position = draw(st.one_of(
        st.none(), st.builds(Rope, positive, st.sampled_from([4]), st.booleans(), scalings),
        st.builds(Alibi, st.tuples(*[positive] * heads)),
        st.builds(config.RelativeBias, st.sampled_from([8, 32]), st.integers(33, 999), st.booleans(), st.just(False))))
    maybe = st.none() | positive
    attention = Attention(
        heads, kv_heads, draw(st.sampled_from([4, 8])), position, draw(st.booleans()),
        draw(st.none() | st.integers(1, 99)), draw(maybe), draw(maybe), draw(maybe), draw(st.booleans()),
        draw(st.booleans()), draw(st.none() | st.builds(config.QkNorm, norms, st.booleans())), draw(st.booleans()))
    feedforward = draw(feedforwards | st.sampled_from(list(tiny.MOES.values())) | st.builds(
        lambda expert, shared, router: Moe(9, expert, router, shared, shared is not None), feedforwards,
        st.none() | feedforwards, routers))
    one_norm = st.sampled_from([config.PostNorm, config.OutputNorm, config.SandwichNorm])
    residual = st.builds(lambda kind, norm: kind(norm), one_norm, norms) | st.builds(
        lambda kind, norm, flag: kind(norm, flag), st.sampled_from([config.PreNorm, config.ParallelNorm]), norms, st.booleans())
    cross = draw(st.none() | st.integers(1, 99).map(lambda source: Attention(2, 1, 4, None, False, source=source)))
    return Block(attention, feedforward, draw(residual), draw(positive), cross)


decoders = st.builds(
    lambda width, embedding, groups, norm, head, length: Decoder(width, embedding, Stack(groups), norm, head, length),
    st.integers(1, 99),
    st.builds(Embedding, st.integers(1, 99), st.none() | positive,
              st.none() | st.builds(Learned, st.integers(99, 200), st.integers(0, 3)) | st.builds(
                  config.Sinusoidal, st.floats(2, 1e5), st.integers(0, 3), st.booleans()),
              st.none() | norms, st.none() | st.integers(1, 3)),
    st.lists(st.builds(lambda pattern, repeats: Group(tuple(pattern), repeats),
                       st.lists(blocks(), min_size=1, max_size=2), st.integers(1, 9)),
             min_size=1, max_size=2).map(tuple),
    st.none() | norms, st.builds(Head, st.booleans(), st.booleans(), positive, st.none() | positive,
                                    st.none() | st.builds(config.Transform, st.sampled_from(config.Activation), norms)),
    st.integers(1, 90))


@hypothesis.given(decoders)
def test_json_round_trip(cfg):
    text = config.to_json(cfg)
    again = config.from_json(text)
    assert again == cfg and hash(again) == hash(cfg)
    assert config.to_json(again) == text


@pytest.mark.parametrize("cfg", CONFIGS)
def test_json_names_every_field(cfg):
    data = config.to_dict(cfg)
    assert data["type"] == type(cfg).__name__ and data.keys() == {"type"} | {f.name for f in dataclasses.fields(cfg)}
    assert config.from_json(config.to_json(cfg)) == cfg


def test_json_takes_whole_numbers_for_fractions():
    head = config.from_dict({"type": "Head", "tied": True, "scale": 2, "softcap": 30})
    assert head == Head(True, scale=2.0, softcap=30.0)
    assert isinstance(head.scale, float) and isinstance(head.softcap, float)
    slopes = config.from_dict({"type": "Alibi", "slopes": [1, 0.5]}).slopes
    assert slopes == (1.0, 0.5) and all(isinstance(slope, float) for slope in slopes)


@hypothesis.given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_stack_of_keeps_the_blocks_in_order(names):
    kinds = {name: tiny.block(window=i + 1) for i, name in enumerate("abc")}
    wanted = tuple(kinds[name] for name in names)
    stack = stack_of(wanted)
    assert stack.blocks() == wanted and stack.layers == len(wanted)
    for layer, one in enumerate(wanted):
        group, place, repeat = stack.place(layer)
        assert stack.groups[group].pattern[place] == one and repeat < stack.groups[group].repeats


@pytest.mark.parametrize("names, groups", [
    ("a" * 32, [("a", 32)]), ("aaabaaabaaab", [("aaab", 3)]), ("abbbbb", [("a", 1), ("b", 5)]),
    ("aab" * 3 + "aa", [("aab", 3), ("a", 2)]), ("abcb", [("abcb", 1)])])
def test_stack_of_finds_the_pattern(names, groups):
    kinds = {name: tiny.block(window=i + 1) for i, name in enumerate("abc")}
    got = stack_of([kinds[name] for name in names]).groups
    assert got == tuple(Group(tuple(kinds[name] for name in pattern), repeats) for pattern, repeats in groups)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(ValueError, match=f"layer must be 0 to 1, got {layer}"):
        stack_of([tiny.block()] * 2).place(layer)


REFUSED = {
    "RmsNorm.eps must not be negative, got -1": lambda: RmsNorm(-1.0),
    "LayerNorm.eps must not be negative, got -1": lambda: LayerNorm(-1.0),
    "LinearScaling.factor must be positive, got 0": lambda: LinearScaling(0.0),
    "DynamicNtkScaling.factor must be at least 1, got 0.5": lambda: DynamicNtkScaling(0.5, 8),
    "DynamicNtkScaling.length must be positive, got 0": lambda: DynamicNtkScaling(2.0, 0),
    "DynamicNtkScaling needs more than 2 rotated dimensions":
        lambda: tiny.attention(position=Rope(width=2, scaling=DynamicNtkScaling(2.0, 4))),
    "YarnScaling.factor must be positive, got 0": lambda: YarnScaling(0.0, 8, 1.0),
    "YarnScaling.length must be positive, got 0": lambda: YarnScaling(2.0, 0, 1.0),
    "YarnScaling.beta_fast must be above beta_slow": lambda: YarnScaling(2.0, 8, 1.0, 1.0, 1.0),
    "Llama3Scaling.factor must be positive, got 0": lambda: Llama3Scaling(0.0, 1.0, 4.0, 8),
    "Llama3Scaling.length must be positive, got 0": lambda: Llama3Scaling(8.0, 1.0, 4.0, 0),
    "Llama3Scaling.high must be above low, got 1.0 and 4.0": lambda: Llama3Scaling(8.0, 4.0, 1.0, 8),
    "LongRopeScaling.short and .long must be of the same length": lambda: LongRopeScaling((1.0,), (), 8, 1.0),
    "LongRopeScaling.short and .long must be positive": lambda: LongRopeScaling((1.0,), (0.0,), 8, 1.0),
    "LongRopeScaling.length must be positive, got 0": lambda: LongRopeScaling((1.0,), (1.0,), 0, 1.0),
    "LongRopeScaling needs 4 factors, got 1":
        lambda: tiny.attention(position=Rope(scaling=LongRopeScaling((1.0,), (1.0,), 8, 1.0))),
    "Rope.base must be positive, got 0": lambda: Rope(0.0),
    "Rope.width must be a positive even number, got 3": lambda: Rope(width=3),
    r"Rope.width must be even and at most head_width \(8\), got 10": lambda: tiny.attention(position=Rope(width=10)),
    r"Rope.width must be even and at most head_width \(5\), got 5": lambda: tiny.attention(head_width=5),
    "Learned.length must be positive, got 0": lambda: Learned(0),
    "Learned.offset must not be negative, got -1": lambda: Learned(8, -1),
    "Attention.heads, kv_heads and head_width must be positive, got 4, 0, 8": lambda: tiny.attention(kv_heads=0),
    r"Attention.heads \(4\) must be a multiple of kv_heads \(3\)": lambda: tiny.attention(kv_heads=3),
    "Attention.window must be positive, got 0": lambda: tiny.attention(window=0),
    "Attention.softcap must be positive, got 0": lambda: tiny.attention(softcap=0.0),
    "Attention.clip must be positive, got -1": lambda: tiny.attention(clip=-1.0),
    "Alibi needs a slope per head: 4 heads, 1 slopes": lambda: tiny.attention(position=Alibi((0.5,))),
    r"Block.cross needs Attention\(position=None\), or a Rope without scaling":
        lambda: tiny.block(cross=tiny.cross(position=Rope(scaling=LinearScaling(2.0)))),
    r"Block.cross needs Attention\(causal=False, window=None\)": lambda: tiny.block(cross=tiny.cross(window=3)),
    "LatentAttention.heads, latent, key_width, rotated and value_width must be positive, got 4, 12, 6, 4, 0":
        lambda: tiny.latent(value_width=0),
    "LatentAttention.query_latent must be positive, got 0": lambda: tiny.latent(query_latent=0),
    "LatentAttention.window must be positive, got 0": lambda: tiny.latent(window=0),
    r"LatentAttention.rotated .* must be even, got 3, and Rope.width None, got None": lambda: tiny.latent(rotated=3),
    r"LatentAttention.rotated .* even, got 4, and Rope.width None, got 2": lambda: tiny.latent(position=Rope(width=2)),
    "LongRopeScaling needs 2 factors, got 1":
        lambda: tiny.latent(position=Rope(scaling=LongRopeScaling((1.0,), (1.0,), 8, 1.0))),
    "Dense.width must be positive, got 0": lambda: Dense(0),
    "Dense.clip must be positive, got 0": lambda: Dense(8, clip=0.0),
    "Dense.clip and Dense.offset belong to gated layers": lambda: Dense(8, gated=False, offset=1.0),
    "TopK.k must be positive, got 0": lambda: TopK(0),
    "Hash.k must be positive, got 0": lambda: config.Hash(0),
    "AverageKey.k must be positive, got 0": lambda: config.AverageKey(0),
    "Recurrent.width must be positive, got 0": lambda: config.Recurrent(0, TopK(1)),
    "ExpertChoice.capacity must be positive, got 0": lambda: config.ExpertChoice(0.0),
    "CapacityFactor.factor must be positive, got 0": lambda: config.CapacityFactor(0.0),
    "CapacityTokens.tokens must be positive, got 0": lambda: config.CapacityTokens(0),
    "ExpertGroups.chosen must be 1 to 4, got 5": lambda: config.ExpertGroups(4, 5),
    "ExpertGroups.best must be positive, got 0": lambda: config.ExpertGroups(4, 2, 0),
    "Moe.experts must be positive, got 0": lambda: Moe(0, Dense(8), TopK(1)),
    "Moe.shared_gate multiplies a shared layer: give one": lambda: Moe(2, Dense(8), TopK(1), shared_gate=True),
    "CapacityFraction.fraction must be above 0 and at most 1, got 1.5": lambda: config.CapacityFraction(1.5),
    "with ExpertChoice it must be None": lambda: Moe(2, Dense(8), config.ExpertChoice(1.0), capacity=config.CapacityTokens(1)),
    "a router cannot choose 3 of 2 experts": lambda: Moe(2, Dense(8), config.Recurrent(4, TopK(3))),
    "6 experts do not divide into 4 groups of equal size": lambda: Moe(6, Dense(8), TopK(1, groups=config.ExpertGroups(4, 1))),
    "ExpertGroups.best is 3, and a group has 2 experts": lambda: Moe(8, Dense(8), TopK(1, groups=config.ExpertGroups(4, 1, 3))),
    "TopK.k is 3, and 1 groups have 2 experts": lambda: Moe(8, Dense(8), TopK(3, groups=config.ExpertGroups(4, 1))),
    r"Recurrent routers share one state: their widths must be equal, got \[3, 4\]": lambda: stack_of(
        [tiny.block(feedforward=Moe(2, Dense(8), config.Recurrent(width, TopK(1)))) for width in (3, 4)]),
    "Group.pattern must hold at least one block": lambda: Group((), 1),
    "Group.repeats must be positive, got 0": lambda: Group((tiny.block(),), 0),
    "Stack.groups must hold at least one group": lambda: Stack(()),
    "a stack needs at least one block": lambda: stack_of([]),
    "Embedding.vocabulary must be positive, got 0": lambda: Embedding(0),
    "Head.softcap must be positive, got 0": lambda: Head(True, softcap=0.0),
    "Decoder.width must be positive, got 0": lambda: dataclasses.replace(tiny.LOCAL, width=0),
    "Decoder.length must be positive, got 0": lambda: dataclasses.replace(tiny.LOCAL, length=0),
    r"Decoder.length \(65\) is longer than the learned positions reach":
        lambda: dataclasses.replace(tiny.LEARNED, length=65),
    "unknown config type 'Norm'; known: RmsNorm, LayerNorm": lambda: config.from_json('{"type": "Norm"}'),
    "unknown config type None": lambda: config.from_json("{}"),
    "Head has no field tie, ties; it has tied, bias":
        lambda: config.from_dict({"type": "Head", "tied": True, "ties": 1, "tie": 1}),
    "Dense lacks width": lambda: config.from_dict({"type": "Dense", "gated": True}),
    "Dense.width must be int, got '8'": lambda: config.from_dict({"type": "Dense", "width": "8"}),
    "Dense.width must be int, got True": lambda: config.from_dict({"type": "Dense", "width": True}),
    "Dense.activation must be one of silu, gelu, gelu_tanh, relu, squared_relu, tanh, quick_gelu, got 'swish'":
        lambda: config.from_dict({"type": "Dense", "width": 8, "activation": "swish"}),
    "PreNorm.norm must be RmsNorm or LayerNorm, got {'type': 'Head'":
        lambda: config.from_dict({"type": "PreNorm", "norm": {"type": "Head", "tied": True}}),
    "Alibi.slopes must be float, got 'a'": lambda: config.from_dict({"type": "Alibi", "slopes": [0.5, "a"]}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
