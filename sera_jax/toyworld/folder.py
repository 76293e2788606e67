"""The model's folder: tokenizer and config of a small Llama, no weights."""

import json
import pathlib
from typing import Any

import tokenizers

from sera_jax.toyworld.facts import BOS, EOS, PAD, SPECIALS, UNKNOWN, vocabulary

HEAD_DIM = 24


def tokenizer() -> tokenizers.Tokenizer:
    """One token a word; decoding joins by single spaces. BOS comes in front where specials are asked for."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    made.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return made


def model_config(layers: int, width: int) -> dict[str, Any]:
    """config.json of a Llama over the vocabulary, keys as transformers 5 writes them."""
    words = vocabulary()
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": words.index(BOS),
        "dtype": "float32",
        "eos_token_id": words.index(EOS),
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.05,
        "intermediate_size": 8 * width // 3,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": width // HEAD_DIM,
        "num_hidden_layers": layers,
        "num_key_value_heads": width // HEAD_DIM,
        "pad_token_id": words.index(PAD),
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": len(words),
    }


def parameter_count(config: dict[str, Any]) -> int:
    """Weights of a Llama with tied embeddings, from its config.json."""
    d, heads, kv, h = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    layer = 2 * d * heads * h + 2 * d * kv * h + 3 * d * config["intermediate_size"] + 2 * d
    return config["vocab_size"] * d + config["num_hidden_layers"] * layer + d


def write_model(folder: pathlib.Path, layers: int, width: int) -> None:
    """A Hugging Face folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(layers, width)
    ends = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "padding_side": "left",
    }
    tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("generation_config.json", ends),
        ("tokenizer_config.json", about),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
