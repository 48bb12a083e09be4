"""CodeT5+ 2B: against a reference in float64 NumPy, which reads the checkpoint's tensors by their names. transformers has no
such model; the reference was written after the released code, which is not run here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
import jaxlm.io
from jaxlm import config, model
from jaxlm.io import families
from jaxlm.io.assemble import assemble
from jaxlm.model import Model
from tests.io.synthetic import Synthetic

VOCABULARY, NEW = 24, 8
RNG = np.random.default_rng(9)
SOURCES = [[int(i) for i in RNG.integers(0, VOCABULARY, length)] for length in (3, 11, 6)]
TARGETS = [[5] + [int(i) for i in RNG.integers(0, VOCABULARY, 9)] for _ in SOURCES]

READER = {"model_type": "codet5p_module", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
          "n_ctx": 32, "rotary_dim": 4, "n_inner": None, "add_cross_attention": False, "is_decoder": False,
          "scale_attn_weights": True, "summary_type": "cls_index", "bos_token_id": 1}
WRITER = READER | {"n_embd": 64, "n_layer": 3, "n_head": 8, "rotary_dim": 6, "n_inner": 48, "add_cross_attention": True,
                   "is_decoder": True, "decoder_start_token_id": 5}
WHOLE = {"model_type": "codet5p", "architectures": ["CodeT5pEncoderDecoderModel"], "is_encoder_decoder": True}
CASES = {"projected": WHOLE | {"encoder": READER, "decoder": WRITER},
         "same width": WHOLE | {"encoder": READER | {"n_embd": 64, "rotary_dim": 16}, "decoder": WRITER | {"n_layer": 1}}}


def tensors(case):
    """Name -> shape of what a checkpoint holds."""
    shapes = {}
    for base, side in (("encoder", case["encoder"]), ("decoder.transformer", case["decoder"])):
        width, inner = side["n_embd"], side["n_inner"] or 4 * side["n_embd"]
        shapes |= {f"{base}.wte.weight": (VOCABULARY, width), f"{base}.ln_f.weight": (width,), f"{base}.ln_f.bias": (width,)}
        for i in range(side["n_layer"]):
            at = f"{base}.h.{i}"
            shapes |= {f"{at}.ln_1.weight": (width,), f"{at}.ln_1.bias": (width,),
                       f"{at}.attn.qkv_proj.weight": (3 * width, width),
                       f"{at}.attn.out_proj.weight": (width, width), f"{at}.attn.causal_mask": (1, 1, 32, 32),
                       f"{at}.mlp.fc_in.weight": (inner, width), f"{at}.mlp.fc_in.bias": (inner,),
                       f"{at}.mlp.fc_out.weight": (width, inner), f"{at}.mlp.fc_out.bias": (width,)}
    at = f"{at}.crossattention"
    shapes |= {f"{at}.q_attn.weight": (width, width), f"{at}.qkv_proj.weight": (2 * width, width),
               f"{at}.out_proj.weight": (width, width), f"{at}.causal_mask": (1, 1, 32, 32),
               "decoder.lm_head.weight": (VOCABULARY, width), "decoder.lm_head.bias": (VOCABULARY,)}
    if case["encoder"]["n_embd"] != width:
        shapes |= {"enc_to_dec_proj.weight": (width, case["encoder"]["n_embd"]), "enc_to_dec_proj.bias": (width,)}
    return shapes


class Reference:
    """The whole model for one source and one text, without padding and without a cache."""

    def __init__(self, case):
        self.case, shapes = case, tensors(case)
        source = Synthetic(case, shapes)
        self.weights = {name: source.read(name).astype(np.float64) for name in shapes}

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def product(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def attend(self, side, q, k, v, causal):
        """Rotary neighbours, each text counted from 0."""
        turned = []
        for x in (q, k):
            x = x.reshape(len(x), side["n_head"], -1).copy()
            for t, pair in np.ndindex(len(x), side["rotary_dim"] // 2):
                angle = t / 10000 ** (2 * pair / side["rotary_dim"])
                a, b = x[t, :, 2 * pair].copy(), x[t, :, 2 * pair + 1].copy()
                x[t, :, 2 * pair] = a * np.cos(angle) - b * np.sin(angle)
                x[t, :, 2 * pair + 1] = b * np.cos(angle) + a * np.sin(angle)
            turned.append(x)
        q, k = turned
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
        if causal:
            scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", shares / shares.sum(-1, keepdims=True), v.reshape(len(v), side["n_head"], -1))
        return mixed.reshape(len(q), -1)

    def runs(self, name, x, parts):
        """What lies side by side in each of four runs of a product's outputs."""
        y = self.product(name, x).reshape(len(x), 4, parts, -1)
        return [y[:, :, part].reshape(len(x), -1) for part in range(parts)]

    def side(self, base, side, tokens, source=None):
        x = self.weights[f"{base}.wte.weight"][tokens]
        for i in range(side["n_layer"]):
            at = f"{base}.h.{i}"
            y = self.norm(f"{at}.ln_1", x)
            q, v, k = self.runs(f"{at}.attn.qkv_proj", y, 3)
            out = self.product(f"{at}.attn.out_proj", self.attend(side, q, k, v, side["is_decoder"]))
            z = self.product(f"{at}.mlp.fc_in", y)
            z = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
            out = out + self.product(f"{at}.mlp.fc_out", z)
            if source is not None and i == side["n_layer"] - 1:
                v, k = self.runs(f"{at}.crossattention.qkv_proj", source, 2)
                q = self.product(f"{at}.crossattention.q_attn", y)
                out = out + self.product(f"{at}.crossattention.out_proj", self.attend(side, q, k, v, False))
            x = x + out
        return self.norm(f"{base}.ln_f", x)

    def logits(self, source, text):
        hidden = self.side("encoder", self.case["encoder"], source)
        if "enc_to_dec_proj.weight" in self.weights:
            hidden = self.product("enc_to_dec_proj", hidden)
        return self.product("decoder.lm_head", self.side("decoder.transformer", self.case["decoder"], text, hidden))

    def greedy(self, source):
        text, margin = [5], np.inf
        for _ in range(NEW):
            last = self.logits(source, text)[-1]
            second, first = np.argsort(last)[-2:]
            text, margin = [*text, int(first)], min(margin, last[first] - last[second])
        return text[1:], margin


def load(name):
    source = Synthetic(CASES[name], tensors(CASES[name]))
    cfg = families.read(source.config)
    return Model(cfg, assemble(cfg, families.find(source.config), source, jnp.float32))


def run(lm, sources, targets):
    """Logits of all rows side by side."""
    width = max(map(len, sources))
    tokens = jnp.asarray([one + [0] * (width - len(one)) for one in sources], jnp.int32)
    lengths = jnp.asarray([len(one) for one in sources], jnp.int32)

    def both(params):
        memory = model.encode(params, lm.config, tokens, lengths=lengths)
        return model.forward(params, lm.config, jnp.asarray(targets, jnp.int32), memory=memory).logits
    return np.asarray(jax.jit(both)(lm.params))


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_greedy_text_as_the_reference(name):
    lm, reference = load(name), Reference(CASES[name])
    want = np.stack([reference.logits(*pair) for pair in zip(SOURCES, TARGETS, strict=True)])
    assert want.std() > 0.5
    np.testing.assert_allclose(run(lm, SOURCES, TARGETS), want, rtol=0, atol=1e-4)
    if name == "projected":
        texts = [reference.greedy(source) for source in SOURCES]
        assert min(margin for _, margin in texts) > 2e-4
        out = jaxlm.generate(lm, SOURCES, NEW, eos=())
        assert [row.tolist() for row in out.tokens] == [text for text, _ in texts]


def test_what_is_read():
    cfg = families.read(CASES["projected"])
    assert cfg.start == (5,) and cfg.projection and not cfg.shared and not families.read(CASES["same width"]).projection
    crossing = [block.cross for block in cfg.decoder.stack.blocks()]
    assert crossing[:-1] == [None] * 2 and crossing[-1].source == 64
    assert crossing[-1].position == cfg.decoder.stack.blocks()[0].attention.position == config.Rope(10000.0, 6, True)
    # A text begins with what the whole says, then with what the decoder says.
    writer = {key: value for key, value in WRITER.items() if key != "decoder_start_token_id"}
    starts = [families.read(WHOLE | {"encoder": READER, "decoder": writer} | more).start
              for more in ({}, {"bos_token_id": 3}, {"decoder_start_token_id": 4, "bos_token_id": 3})]
    assert starts == [(1,), (3,), (4,)]


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    lm = load(name)
    assert families.read(families.write(lm.config, "codet5p")[1]) == lm.config
    jaxlm.io.save(lm, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CodeT5pEncoderDecoderModel"]
    again = jaxlm.load(tmp_path)
    assert again.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    from safetensors import safe_open
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {
            name: shape for name, shape in tensors(CASES[name]).items() if "causal_mask" not in name}


@pytest.mark.parametrize("changes, message", [
    ({"encoder": READER | {"n_head": 2}}, "n_head = 2 is not supported.*four runs"),
    ({"decoder": WRITER | {"is_decoder": False}}, "is_decoder = False is not supported.*it must be True"),
    ({"decoder": WRITER | {"add_cross_attention": False}}, "add_cross_attention = False is not supported.*it must be True"),
    ({"decoder": WRITER | {"cross_attention_hidden_size": 32}}, "cross_attention_hidden_size = 32 .*it must be null"),
    ({"encoder": READER | {"odd": 2}}, r"odd = 2 is not supported for codet5p \(encoder\)"),
    ({"decoder": WRITER | {"decoder_start_token_id": None, "bos_token_id": None}}, "lacks decoder_start_token_id, which"),
    ({"tie_encoder_decoder": True}, "tie_encoder_decoder = True is not supported"),
    ({"is_encoder_decoder": False}, "is_encoder_decoder = False is not supported")])
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        families.read(CASES["projected"] | changes)


def test_what_cannot_be_expressed_is_not_written():
    text = config.to_json(families.read(CASES["projected"])).replace('"bias": true', '"bias": false', 1)
    with pytest.raises(ValueError, match="codet5p: config.encoder"):
        families.write(config.from_json(text), "codet5p")
