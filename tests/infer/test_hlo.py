"""Facts out of HLO text, on a small module written in the form in which TPU compilers print theirs."""

import jax
import jax.numpy as jnp
import pytest

from infer import hlo

# Over tokens (of unknown length) loops a body that loops four times over layers, whose number comes in through both tuples.
TEXT = """HloModule jit_run, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%take (stack: bf16[4,16,8], at: s32[]) -> f32[16,8] {
  %stack = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %nought = s32[]{:T(128)} constant(0)
  %slice = bf16[1,16,8]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %at, %nought, %nought), dynamic_slice_sizes={1,16,8}
  %flat = bf16[16,8]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %wide = f32[16,8]{1,0:T(8,128)} convert(%flat)
}

%put (cache: bf16[4,32,8], row: bf16[1,1,8], place: s32[]) -> (bf16[4,32,8], bf16[8]) {
  %cache = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %row = bf16[1,1,8]{2,1,0:T(8,128)(2,1)} parameter(1)
  %place = s32[]{:T(128)} parameter(2)
  %nil = s32[]{:T(128)} constant(0)
  %update = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%cache, %row, %nil, %place, %nil)
  %kept = bf16[8]{0:T(256)} bitcast(%row)
  ROOT %both = (bf16[4,32,8]{2,1,0:T(8,128)(2,1)}, bf16[8]{0:T(256)}) tuple(%update, %kept)
}

%send (value: f32[16,8]) -> f32[16,8] {
  %value = f32[16,8]{1,0:T(8,128)} parameter(0)
  ROOT %reduced = f32[16,8]{1,0:T(8,128)} all-reduce(%value), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%layer_body (layer_arg: (s32[], bf16[4,16,8], bf16[4,32,8], s32[])) -> (s32[], bf16[4,16,8], bf16[4,32,8], s32[]) {
  %layer_arg = (s32[], bf16[4,16,8], bf16[4,32,8], s32[]) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%layer_arg), index=0
  %weights = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%layer_arg), index=1
  %kv = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%layer_arg), index=2
  %layers = s32[]{:T(128)} get-tuple-element(%layer_arg), index=3
  %one = s32[]{:T(128)} constant(1)
  %index_copy = s32[]{:T(128)S(6)} copy(%index)
  %next = s32[]{:T(128)} add(%index_copy, %one)
  %weight = f32[16,8]{1,0:T(8,128)} fusion(%weights, %index), kind=kLoop, calls=%take
  %start = ((f32[16,8]{1,0:T(8,128)}), f32[16,8]{1,0:T(8,128)}) call-start(%weight), to_apply=%send
  %done = f32[16,8]{1,0:T(8,128)} call-done(%start)
  ROOT %layer_out = (s32[], bf16[4,16,8], bf16[4,32,8], s32[]) tuple(%next, %weights, %kv, %layers)
}

%layer_condition (layer_test: (s32[], bf16[4,16,8], bf16[4,32,8], s32[])) -> pred[] {
  %layer_test = (s32[], bf16[4,16,8], bf16[4,32,8], s32[]) parameter(0)
  %counted = s32[]{:T(128)} get-tuple-element(%layer_test), index=0
  %until = s32[]{:T(128)} get-tuple-element(%layer_test), index=3
  ROOT %more = pred[]{:T(512)} compare(%counted, %until), direction=LT
}

%body (p: (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8])) -> (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8]) {
  %p = (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8]) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%p), index=0
  %all_weights = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %all_kv = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %depth = s32[]{:T(128)} get-tuple-element(%p), index=3
  %token = bf16[1,1,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=4
  %zero = s32[]{:T(128)} constant(0)
  %entered = (s32[], bf16[4,16,8], bf16[4,32,8], s32[]) tuple(%zero, %all_weights, %all_kv, %depth)
  %layer_loop = (s32[], bf16[4,16,8], bf16[4,32,8], s32[]) while(%entered), condition=%layer_condition, body=%layer_body
  %written = (bf16[4,32,8]{2,1,0:T(8,128)(2,1)}, bf16[8]{0:T(256)}) fusion(%all_kv, %token, %step), kind=kLoop, calls=%put
  %kv_out = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%written), index=0
  COPIES
  %gathered = (bf16[8]{0:T(256)}, bf16[16]{0:T(256)}) all-gather-start(%kv_out), dimensions={0}
  %gather_done = bf16[16]{0:T(256)} all-gather-done(%gathered)
  ROOT %out = (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8]) tuple(%step, %all_weights, %kv_out, %depth, %token)
}

%condition (test: (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8])) -> pred[] {
  %test = (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8]) parameter(0)
  ROOT %go = pred[]{:T(512)} constant(true)
}

ENTRY %main (w: bf16[4,16,8], k: bf16[4,32,8], t: bf16[1,1,8]) -> (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8]) {
  %w = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="state.cache(0)"}
  %t = bf16[1,1,8]{2,1,0:T(8,128)(2,1)} parameter(2)
  %none = s32[]{:T(128)} constant(0)
  %four = s32[]{:T(128)} constant(4)
  %begin = (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8]) tuple(%none, %w, %k, %four, %t)
  ROOT %loop = (s32[], bf16[4,16,8], bf16[4,32,8], s32[], bf16[1,1,8]) while(%begin), condition=%condition, body=%body
}
"""


def parse(*lines):
    return hlo.Module(TEXT.replace("COPIES", "\n  ".join(lines)))


def test_shapes_carry_their_memory():
    module = parse("%near = bf16[4,32,8]{1,2,0:T(8,128)(2,1)S(1)} copy(%all_kv)")
    near = module.loop().instructions["near"]
    assert near.shapes == (hlo.Shape("bf16", (4, 32, 8), 1),)
    assert near.operands == ("all_kv",)
    assert near.shapes[0].nbytes == 4 * 32 * 8 * 2
    assert hlo.Shape("s4", (3, 3), 0).nbytes == 5
    assert hlo.Shape("pred", (8,), 0).nbytes == 8
    assert hlo.Shape("token", (), 0).nbytes == 0


def test_loops_are_counted_through_the_tuples():
    module = parse()
    body = module.loop()
    assert body.name == "body"
    assert module.trips(body, body.instructions["layer_loop"]) == 4
    assert module.trips(module.entry, module.entry.instructions["loop"]) is None
    times = {one.name: times for _, one, times in module.run(body)}
    assert (times["weight"], times["written"], times["more"], times["reduced"]) == (4, 1, 4, 4)


@pytest.mark.parametrize("old, new", [
    ("add(%index_copy, %one)", "multiply(%index_copy, %one)"),
    ("compare(%counted, %until), direction=LT", "compare(%counted, %until), direction=GE"),
    ("tuple(%step, %all_weights, %kv_out, %depth, %token)", "tuple(%step, %all_weights, %kv_out, %step, %token)"),
])
def test_a_loop_whose_length_cannot_be_seen_is_an_error(old, new):
    assert old in TEXT
    module = hlo.Module(TEXT.replace("COPIES", "").replace(old, new))
    with pytest.raises(ValueError, match="how often the loop layer_loop in body runs cannot be seen"):
        list(module.run(module.computations["body"]))


def test_a_loop_runs_as_often_as_is_said_where_that_cannot_be_seen():
    module = hlo.Module(TEXT.replace("COPIES", "").replace("compare(%counted, %until), direction=LT",
                                                           "compare(%counted, %until), direction=GE"))
    body = module.loop()
    assert [one.name for one in module.unseen(body)] == ["layer_loop"]
    for count in (0, 1, 4):
        lengths = {"layer_loop": count}
        assert [times for _, one, times in module.run(body, lengths) if one.name == "weight"] == [count] * (count > 0)
        sums = hlo.collectives(module, body, lengths).get("all-reduce")
        assert sums == ({"count": count, "bytes": count * 16 * 8 * 4} if count else None)
    assert hlo.traffic(module, body, {"layer_loop": 4}) == hlo.traffic(parse(), parse().loop())
    line = "  %weight = f32[16,8]"
    module = hlo.Module(TEXT.replace("COPIES", "").replace("direction=LT", "direction=GE").replace(
        line, "  %mine = bf16[1,32,8]{2,1,0} slice(%kv)\n" + line))
    assert hlo.copies(module, module.loop(), {32 * 8}, {"layer_loop": 3}) == {0: 3}


def test_only_one_loop_may_be_that_over_tokens():
    with pytest.raises(ValueError, match="there are 0"):
        hlo.Module(TEXT.replace("COPIES", "").replace("while(%begin)", "custom-call(%begin)")).loop()
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.Module("HloModule jit_run")


def test_traffic_counts_slices_updates_and_loops():
    module = parse()
    # Each of 4 layers reads its slice of the weights (16 x 8 bfloat16) and writes it as float32, which the reduction reads
    # and writes; the loop reads and writes one row (8 bfloat16) in the cache, hands it on, and gathers.
    layer = 16 * 8 * 2 + 16 * 8 * 4 + 2 * (16 * 8 * 4)
    row = 8 * 2
    token = 4 + row + row + row  # place and row in; row into the cache and out of the fusion
    gather = 4 * 32 * 8 * 2 + 16 * 2
    assert hlo.traffic(module, module.loop()) == pytest.approx(4 * layer + token + gather, abs=200)  # and the counters
    more = parse("%again = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} copy(%all_kv)")
    near = parse("%again = bf16[4,32,8]{2,1,0:T(8,128)(2,1)S(1)} copy(%all_kv)")
    whole = 4 * 32 * 8 * 2
    assert hlo.traffic(more, more.loop()) - hlo.traffic(module, module.loop()) == 2 * whole
    assert hlo.traffic(near, near.loop()) - hlo.traffic(module, module.loop()) == whole


@pytest.mark.parametrize("line, space", [
    ("%again = bf16[4,32,8]{0,1,2:T(8,128)(2,1)} copy(%all_kv)", 0),
    ("%again = f32[4,32,8]{2,1,0:T(8,128)} convert(%all_kv)", 0),
    ("%again = bf16[128,8]{1,0:T(8,128)(2,1)} reshape(%all_kv)", 0),
    ("%again = (bf16[4,32,8]{2,1,0}, bf16[4,32,8]{2,1,0}, u32[]{:S(2)}) copy-start(%all_kv)", 0),
    ("%again = bf16[4,32,8]{2,1,0:T(8,128)(2,1)S(1)} copy(%all_kv)", 1),
])
def test_whole_copies_are_found(line, space):
    module = parse(line)
    assert hlo.copies(module, module.loop(), {4 * 32 * 8}) == {space: 1}
    assert hlo.copies(module, module.loop(), {32 * 8}) == {}


def test_what_is_updated_in_place_is_no_copy():
    module = parse()
    assert hlo.copies(module, module.loop(), {4 * 32 * 8}) == {}
    # An update of what the fusion itself made first is none in place.
    first = "%update = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%cache, "
    moved = "%moved = bf16[4,32,8]{2,1,0:T(8,128)(2,1)} copy(%cache)\n  "
    module = hlo.Module(TEXT.replace("COPIES", "").replace(first, moved + first.replace("%cache", "%moved")))
    assert hlo.copies(module, module.loop(), {4 * 32 * 8}) == {0: 1}


def test_copies_in_the_layer_loop_count_once_a_layer():
    line = "  %weight = f32[16,8]"
    module = hlo.Module(TEXT.replace("COPIES", "").replace(line, "  %mine = bf16[1,32,8]{2,1,0} slice(%kv)\n" + line))
    assert hlo.copies(module, module.loop(), {32 * 8}) == {0: 4}


def test_collectives_count_what_runs_on_other_threads():
    module = parse()
    assert hlo.collectives(module, module.loop()) == {
        "all-gather": {"count": 1, "bytes": 32}, "all-reduce": {"count": 4, "bytes": 4 * 16 * 8 * 4}}


def test_host_transfers_are_counted():
    def quiet(x):
        return jax.lax.while_loop(lambda x: x[0] < 9, lambda x: x + 1, x)

    def loud(x):
        jax.debug.print("{}", x[0])
        return jax.pure_callback(lambda x: x, x, quiet(x))

    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    assert hlo.host_transfers(jax.jit(quiet).lower(shape).as_text()) == 0
    assert hlo.host_transfers(jax.jit(loud).lower(shape).as_text()) == 2


# A loop that counts by twos to eight. Within: a product of a batch of 3, as a convolution whose places each meet one of
# the kernel's; one that sums over 4 heads of width 16 as well; and a gather that is spread over two fusions.
PRODUCTS = """HloModule jit_run, is_scheduled=true

%each (a: bf16[3,8,16], b: bf16[3,16,32]) -> bf16[3,8,32] {
  %a = bf16[3,8,16]{2,1,0} parameter(0)
  %b = bf16[3,16,32]{2,1,0} parameter(1)
  %gathered = bf16[64]{0} all-gather(%b), channel_id=5, dimensions={0}
  ROOT %product = bf16[3,8,32]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}

%rest (c: bf16[8,4,16]) -> bf16[64] {
  %c = bf16[8,4,16]{2,1,0} parameter(0)
  ROOT %again = bf16[64]{0} all-gather(%c), channel_id=5, dimensions={0}
}

%body (arg: (u32[], u32[], bf16[3,8,16], bf16[3,16,32], bf16[8,4,16], bf16[4,16,32])) -> (u32[], u32[], bf16[3,8,16], bf16[3,16,32], bf16[8,4,16], bf16[4,16,32]) {
  %arg = (u32[], u32[], bf16[3,8,16], bf16[3,16,32], bf16[8,4,16], bf16[4,16,32]) parameter(0)
  %count = u32[] get-tuple-element(%arg), index=0
  %two = u32[] get-tuple-element(%arg), index=1
  %x = bf16[3,8,16]{2,1,0} get-tuple-element(%arg), index=2
  %w = bf16[3,16,32]{2,1,0} get-tuple-element(%arg), index=3
  %heads = bf16[8,4,16]{2,1,0} get-tuple-element(%arg), index=4
  %out = bf16[4,16,32]{2,1,0} get-tuple-element(%arg), index=5
  %next = u32[] add(%count, %two)
  %begun = bf16[3,8,32]{2,1,0} fusion(%x, %w), kind=kOutput, calls=%each
  %ended = bf16[64]{0} fusion(%heads), kind=kCustom, calls=%rest
  %summed = bf16[8,1,32]{2,1,0} convolution(%heads, %out), window={size=4}, dim_labels=b0f_0io->b0f
  ROOT %result = (u32[], u32[], bf16[3,8,16], bf16[3,16,32], bf16[8,4,16], bf16[4,16,32]) tuple(%next, %two, %x, %w, %heads, %out)
}

%until (test: (u32[], u32[], bf16[3,8,16], bf16[3,16,32], bf16[8,4,16], bf16[4,16,32])) -> pred[] {
  %test = (u32[], u32[], bf16[3,8,16], bf16[3,16,32], bf16[8,4,16], bf16[4,16,32]) parameter(0)
  %at = u32[] get-tuple-element(%test), index=0
  %eight = u32[] constant(8)
  ROOT %less = pred[] compare(%at, %eight), direction=LT
}

ENTRY %main (p0: bf16[3,8,16], p1: bf16[3,16,32], p2: bf16[8,4,16], p3: bf16[4,16,32]) -> f32[5,7] {
  %p0 = bf16[3,8,16]{2,1,0} parameter(0)
  %p1 = bf16[3,16,32]{2,1,0} parameter(1)
  %p2 = bf16[8,4,16]{2,1,0} parameter(2)
  %p3 = bf16[4,16,32]{2,1,0} parameter(3)
  %from = u32[] constant(1)
  %by = u32[] constant(2)
  %given = (u32[], u32[], bf16[3,8,16], bf16[3,16,32], bf16[8,4,16], bf16[4,16,32]) tuple(%from, %by, %p0, %p1, %p2, %p3)
  %loop = (u32[], u32[], bf16[3,8,16], bf16[3,16,32], bf16[8,4,16], bf16[4,16,32]) while(%given), condition=%until, body=%body
  %left = f32[5,9,2]{2,1,0} constant({...})
  %right = f32[9,2,7]{2,1,0} constant({...})
  ROOT %dot = f32[5,7]{1,0} dot(%left, %right), lhs_contracting_dims={1,2}, rhs_contracting_dims={0,1}
}
"""  # noqa: E501


# Two sums over one channel, of which one is fused with the cut of each chip's part; and one that stands there twice unfused.
SUMS = """HloModule jit_sums, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (a: f32[16,8]) -> f32[4,8] {
  %a = f32[16,8]{1,0} parameter(0)
  %whole = f32[16,8]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (p: f32[16,8], q: f32[]) -> (f32[4,8], f32[], f32[]) {
  %p = f32[16,8]{1,0} parameter(0)
  %q = f32[] parameter(1)
  %mine = f32[4,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %scalar = f32[] all-reduce(%q), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %second = f32[] all-reduce(%scalar), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = (f32[4,8]{1,0}, f32[], f32[]) tuple(%mine, %scalar, %second)
}
"""


def test_collectives_that_share_a_channel():
    module = hlo.Module(SUMS)
    assert hlo.collectives(module, module.entry) == {"all-reduce": {"count": 2, "bytes": 8},
                                                     "reduce-scatter": {"count": 1, "bytes": 4 * 8 * 4}}


def test_products_and_what_is_spread_over_fusions():
    module = hlo.Module(PRODUCTS)
    assert hlo.flops(module, module.entry) == 4 * (2 * 3 * 8 * 32 * 16 + 2 * 8 * 32 * 4 * 16) + 2 * 5 * 7 * 9 * 2
    assert hlo.collectives(module, module.entry) == {"all-gather": {"count": 4, "bytes": 4 * 128}}
