"""Tiny real models, built from their families' own configurations with random weights; nothing is downloaded."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

VOCABULARY = 101
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 16}
NEOX = {**COMMON}
FALCON = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    **{key: value for key, value in COMMON.items() if key != "intermediate_size"},
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}
MOE = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}

# name: (model class, configuration, parts its feed-forward has or None where experts are left alone)
FAMILIES: dict[str, tuple[type, object, str | None]] = {
    "llama-mha": (tf.LlamaForCausalLM, tf.LlamaConfig(**COMMON), "ffn"),
    "llama-gqa": (tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED, tie_word_embeddings=True), "ffn"),
    "llama-mqa": (tf.LlamaForCausalLM, tf.LlamaConfig(**{**COMMON, "num_key_value_heads": 1}), "ffn"),
    "llama-biased": (tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True), "ffn"),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**WIDE_HEADS), "ffn"),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**GROUPED), "ffn"),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**WIDE_HEADS), "ffn"),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**WIDE_HEADS), "ffn"),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**WIDE_HEADS), "ffn"),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config(**GROUPED), "ffn"),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2, n_inner=48), "ffn"),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**NEOX), "ffn"),
    "falcon-mqa": (tf.FalconForCausalLM, tf.FalconConfig(**FALCON, multi_query=True, bias=False), "ffn"),
    "falcon-mha": (tf.FalconForCausalLM, tf.FalconConfig(**FALCON, multi_query=False, alibi=True, bias=True), "ffn"),
    "falcon-gqa": (
        tf.FalconForCausalLM,
        tf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=False),
        "ffn",
    ),
    "opt": (tf.OPTForCausalLM, tf.OPTConfig(**OPT), "ffn"),
    "bert": (tf.BertForMaskedLM, tf.BertConfig(**COMMON), "ffn"),
    "roberta": (tf.RobertaForMaskedLM, tf.RobertaConfig(**COMMON), "ffn"),
    "mpnet": (tf.MPNetModel, tf.MPNetConfig(**COMMON), "ffn"),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**MOE), None),
    "qwen3-moe": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(**WIDE_HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        None,
    ),
}

# types that share a row with those above, or nearly; tests of what is rare look at some of them
RELATIVES: dict[str, tuple[type, Any, str | None]] = {
    "gemma": (tf.GemmaForCausalLM, tf.GemmaConfig(**WIDE_HEADS), "ffn"),
    "granite": (tf.GraniteForCausalLM, tf.GraniteConfig(**GROUPED), "ffn"),
    "ministral": (tf.MinistralForCausalLM, tf.MinistralConfig(**WIDE_HEADS), "ffn"),
    "olmo": (tf.OlmoForCausalLM, tf.OlmoConfig(**GROUPED), "ffn"),
    "qwen2_moe": (
        tf.Qwen2MoeForCausalLM,
        tf.Qwen2MoeConfig(**GROUPED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        None,
    ),
    "smollm3": (tf.SmolLM3ForCausalLM, tf.SmolLM3Config(**GROUPED), "ffn"),
    "xlm-roberta": (tf.XLMRobertaForMaskedLM, tf.XLMRobertaConfig(**COMMON), "ffn"),
    "camembert": (tf.CamembertForMaskedLM, tf.CamembertConfig(**COMMON), "ffn"),
}


def make(name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **save: object) -> Path:
    """A checkpoint folder of this family, stored in this type. `save` goes to save_pretrained (max_shard_size)."""
    model_class, config, _ = FAMILIES[name]

    def built() -> Any:
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too, so that a test can see them go missing
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter if parameter.ndim == 1 else 0))
        return model.to(dtype)

    return _saved(built, folder, seed, save, config, model_class, dtype)


def make_llama(folder: Path, *, seed: int = 0, save: dict | None = None, **changes: object) -> Path:
    """A tiny grouped-query Llama with some settings changed."""
    config = tf.LlamaConfig(**{**GROUPED, **changes})
    return _saved(lambda: tf.LlamaForCausalLM(config), folder, seed, save or {}, config)


_MADE: dict[str, tuple[Path, torch.Tensor]] = {}


def _saved(built: Callable[[], Any], folder: Path, seed: int, save: dict, config: Any, *told: object) -> Path:
    """A folder with the model that is built from this seed, or a copy of one that this process has built before.

    What is drawn at random after it is the same either way.
    """
    said = {name: value for name, value in config.to_dict().items() if name not in ("architectures", "dtype")}
    what = repr((seed, save, said, told))
    if what not in _MADE or not _MADE[what][0].exists():
        torch.manual_seed(seed)
        place = Path(tempfile.mkdtemp(prefix="tiny-"))
        built().save_pretrained(place, **save)
        _MADE[what] = place, torch.get_rng_state()
    place, after = _MADE[what]
    shutil.copytree(place, folder, copy_function=shutil.copy, dirs_exist_ok=True)
    folder.chmod(0o755)  # a folder that is made for a time is its owner's alone
    torch.set_rng_state(after)
    return folder


def make_baichuan(folder: Path, *, seed: int = 0, layers: int = 4, heads: int = 4, hidden: int = 32) -> Path:
    """A Baichuan 2 checkpoint as its authors store it; its model code is remote, so there are only tensors."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"model.embed_tokens.weight": random(VOCABULARY, hidden), "lm_head.weight": random(VOCABULARY, hidden)}
    for layer in range(layers):
        base = f"model.layers.{layer}."
        tensors[base + "self_attn.W_pack.weight"] = random(3 * hidden, hidden)
        tensors[base + "self_attn.o_proj.weight"] = random(hidden, hidden)
        for part, shape in (("gate", (48, hidden)), ("up", (48, hidden)), ("down", (hidden, 48))):
            tensors[f"{base}mlp.{part}_proj.weight"] = random(*shape)
        tensors[base + "input_layernorm.weight"] = random(hidden)
    config = {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": 48,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_baichuan.py").write_text("raise SystemExit('remote code must not run')\n")
    return folder


def tokens(count: int = 10, batch: int = 2) -> torch.Tensor:
    """Token ids that every tiny model has. Shape: batch x count."""
    return torch.randint(5, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(7))
