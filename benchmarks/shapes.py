"""Models to merge that are shaped like real ones: random weights, small random task vectors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH = 768
CONFIGS: dict[str, dict[str, object]] = {
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": WIDTH,
        "n_head": 12,
        "n_positions": 1024,
    },
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": WIDTH,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "tie_word_embeddings": False,
    },
}


def shapes(model: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors: ``gpt2`` (124 M parameters at 12 layers) or ``llama`` (134 M)."""
    return _gpt2(layers) if model == "gpt2" else _llama(layers)


def _gpt2(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"wte.weight": (50257, WIDTH), "wpe.weight": (1024, WIDTH)}
    block = {
        "ln_1": (WIDTH,),
        "attn.c_attn": (WIDTH, 3 * WIDTH),
        "attn.c_proj": (WIDTH, WIDTH),
        "ln_2": (WIDTH,),
        "mlp.c_fc": (WIDTH, 4 * WIDTH),
        "mlp.c_proj": (4 * WIDTH, WIDTH),
    }
    for layer in range(layers):
        for name, shape in block.items():
            found[f"h.{layer}.{name}.weight"] = shape
            found[f"h.{layer}.{name}.bias"] = shape[-1:]
    return {**found, "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}


def _llama(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, WIDTH)}
    block = {
        **{f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"},
        "mlp.gate_proj": (2048, WIDTH),
        "mlp.up_proj": (2048, WIDTH),
        "mlp.down_proj": (WIDTH, 2048),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {**found, "model.norm.weight": (WIDTH,), "lm_head.weight": (32000, WIDTH)}


def make(folder: Path, model: str, layers: int, experts: int, dtype: torch.dtype) -> int:
    """Write ``base/`` and ``expert0/`` .. as model folders; the number of parameters of one."""
    base = {}
    for index, (name, shape) in enumerate(shapes(model, layers).items()):
        base[name] = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(index))
    config = CONFIGS[model] | {"n_layer" if model == "gpt2" else "num_hidden_layers": layers}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _save(folder / "base", {name: tensor.to(dtype) for name, tensor in base.items()}, config)
    for expert in range(experts):
        generator = torch.Generator().manual_seed(1000 + expert)
        moved = {
            name: (tensor + 0.002 * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for name, tensor in base.items()
        }
        _save(folder / f"expert{expert}", moved, config)
    return sum(tensor.numel() for tensor in base.values())


def _save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
