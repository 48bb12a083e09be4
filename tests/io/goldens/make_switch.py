"""Makes switch.npz: what transformers computes for tiny encoder-decoders with experts. As make_goldens.py; run it likewise.

    .venv/bin/python -m tests.io.goldens.make_switch

Every source is computed alone, without padding.
"""

import copy
import json
import pathlib

import numpy as np

from tests.io.goldens import make_bart, make_moe

PATH = pathlib.Path(__file__).with_name("switch.npz")

NEW = make_bart.NEW
# The first two in one batch are without padding: room for a fraction of the tokens depends on it.
SOURCES = [make_bart.SOURCES[0], make_bart.SOURCES[0][::-1], make_bart.SOURCES[1]]
TEXTS = [[2, *text] for text in (make_bart.TEXTS[0], make_bart.TEXTS[0][::-1], make_bart.TEXTS[1])]

SWITCH = {"model_type": "switch_transformers", "vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 3,
          "num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2,
          "num_experts": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "pad_token_id": 0,
          "decoder_start_token_id": 2}
NLLB = {**make_bart.SHAPE, "model_type": "nllb-moe", "d_model": 16, "encoder_layers": 2, "decoder_layers": 4, "num_experts": 4,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 20, "encoder_sparse_step": 2, "decoder_sparse_step": 2}

CASES = {
    "switch": SWITCH | {"layer_norm_epsilon": 1e-3, "router_bias": True},
    # Every layer of the encoder, the second alone of the decoder; room for two tokens.
    "switch full, untied": SWITCH | {
        "num_layers": 3, "num_sparse_encoder_layers": 3, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1,
        "expert_capacity": 2,
        "dense_act_fn": "gelu_new", "tie_word_embeddings": False},
    "switch encoder, full": SWITCH | {"architectures": ["SwitchTransformersEncoderModel"], "expert_capacity": 1},
    "nllb-moe": NLLB | {"forced_bos_token_id": 3, "router_bias": True},
    "nllb-moe full": NLLB | {"moe_eval_capacity_token_fraction": 0.3, "decoder_sparse_step": 1, "moe_token_dropout": 0.0,
                             "scale_embedding": False},
    "nllb-moe full, the surest first": NLLB | {
        "moe_eval_capacity_token_fraction": 0.2, "normalize_router_prob_before_dropping": True,
        "batch_prioritized_routing": True, "encoder_sparse_step": 0, "pad_token_id": 4, "activation_function": "gelu"},
}

TEXTS_OF = ("switch", "switch full, untied", "nllb-moe")  # whose greedy texts are kept


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name: large matrices beside embeddings, else a text repeats one token; but for queries and keys of a
    Switch, whose scores are not scaled and whose softmax would magnify what rounding does."""
    plain = len(shape) == 1 or "shared" in name or name.endswith(("Attention.q.weight", "Attention.k.weight"))
    scale = 1.0 if plain else 2.0
    return make_moe.weight(name, shape) * np.float32(scale)


def mixed(self, hidden, mask, shares):
    """NLLB-MoE's experts as the paper, fairseq and version 4 of transformers have them: each output times its expert's share.

    Version 5 takes the one-hot first choice for an index, and so runs the first two experts alone.
    """
    import torch

    outputs = torch.stack([self[f"expert_{e}"](hidden) for e in range(self.num_experts)], dim=1)
    return torch.einsum("ne,ned->nd", shares.to(hidden.dtype), outputs) * (1 - self.moe_token_dropout)


def correct() -> None:
    """Puts `mixed` in its place."""
    from transformers.models.nllb_moe import modeling_nllb_moe

    modeling_nllb_moe.NllbMoeExperts.forward = mixed


def build(config: dict):
    """transformers' model of a config.json, with weights that follow from the tensors' names."""
    import torch
    import transformers

    correct()
    made = transformers.AutoConfig.for_model(**copy.deepcopy(config) | {"eos_token_id": None})
    default = "SwitchTransformers" if config["model_type"] == "switch_transformers" else "NllbMoe"
    named = config.get("architectures", [f"{default}ForConditionalGeneration"])[0]
    made._attn_implementation = "eager"
    model = getattr(transformers, named)(made).eval()
    if config.get("tie_word_embeddings") is False:  # version 5 then gives each side a table of its own
        model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def run(model, source: list[int], text: list[int]) -> np.ndarray:
    """float32 [T, V], or an encoder's hidden states [S, D]."""
    import torch

    with torch.no_grad():
        if hasattr(model, "lm_head"):
            out = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([text]), use_cache=False)
            return out.logits[0].numpy()
        return model(input_ids=torch.tensor([source])).last_hidden_state[0].numpy()


def greedy(model, source: list[int], start: list[int]) -> tuple[list[int], float]:
    """The NEW tokens that follow `start`, each in a call of its own, so that of them none is dropped; and the least distance
    between the best logit and the second."""
    import torch

    out = model.generate(torch.tensor([source]), decoder_input_ids=torch.tensor([start]), max_new_tokens=NEW, do_sample=False,
                         num_beams=1, eos_token_id=None, forced_eos_token_id=None, pad_token_id=0, output_scores=True,
                         return_dict_in_generate=True)
    best = torch.stack(out.scores).topk(2).values
    return out.sequences[0, len(start):].tolist(), float((best[..., 0] - best[..., 1]).min())


def main() -> None:
    arrays, cases = {}, {}
    for name, config in CASES.items():
        model = build(config)
        cases[name] = {"config": config, "written": json.loads(model.config.to_json_string(use_diff=False)),
                       "tensors": {name: list(one.shape) for name, one in model.named_parameters()}}
        outputs = [run(model, source, text) for source, text in zip(SOURCES, TEXTS, strict=True)]
        for i, output in enumerate(outputs):
            arrays[f"{i} {name}"] = output
        if name in TEXTS_OF:
            start = [2, *([config["forced_bos_token_id"]] if "forced_bos_token_id" in config else [])]
            texts = [greedy(model, source, start) for source in SOURCES]
            cases[name] |= {"start": start, "greedy": [text for text, _ in texts], "margin": min(margin for _, margin in texts)}
            print(f"{name}: {texts}")
        print(f"{name}: spread {outputs[0].std():.2f}")
    text = json.dumps(cases).encode()
    np.savez_compressed(PATH, cases=np.frombuffer(text, np.uint8), **arrays)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
