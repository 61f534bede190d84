"""Models to merge that are shaped like real ones: random weights, small random task vectors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
    "llama-1b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Llama:
    """Widths of a Llama: of the stream, inside the MLP, of keys and values; and how many layers the real one has."""

    width: int
    inner: int
    keys: int
    layers: int


LLAMAS = {"llama": Llama(WIDTH, 2048, WIDTH, 12), "llama-1b": Llama(2048, 5632, 256, 22)}
LAYERS = {"gpt2": 12, **{name: sizes.layers for name, sizes in LLAMAS.items()}}


def shapes(model: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors: ``gpt2`` (124 M parameters at 12 layers), ``llama`` (134 M) or
    ``llama-1b`` (1.1 B at 22 layers)."""
    return _gpt2(layers) if model == "gpt2" else _llama(layers, LLAMAS[model])


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


def _llama(layers: int, sizes: Llama) -> dict[str, tuple[int, ...]]:
    width, inner, keys = sizes.width, sizes.inner, sizes.keys
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, width)}
    block = {
        **{f"self_attn.{part}_proj": (keys if part in "kv" else width, width) for part in "qkvo"},
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {**found, "model.norm.weight": (width,), "lm_head.weight": (32000, width)}


def make(folder: Path, model: str, layers: int, experts: int, dtype: torch.dtype, shard: int = sys.maxsize) -> int:
    """Write ``base/`` and ``expert0/`` .. as model folders, in shards of ``shard`` bytes; the parameters of one.

    One tensor at a time is in memory, and the shard at hand.
    """
    named = shapes(model, layers)
    config = CONFIGS[model] | {"n_layer" if model == "gpt2" else "num_hidden_layers": layers}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _save(folder / "base", ((name, tensor.to(dtype)) for name, tensor in _base(named)), config, shard)
    for expert in range(experts):
        _save(folder / f"expert{expert}", _moved(named, expert, dtype), config, shard)
    return sum(math.prod(shape) for shape in named.values())


def _base(named: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    for index, (name, shape) in enumerate(named.items()):
        yield name, 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(index))


def _moved(named: Mapping[str, tuple[int, ...]], expert: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1000 + expert)
    for name, tensor in _base(named):
        yield name, (tensor + 0.002 * torch.randn(tensor.shape, generator=generator)).to(dtype)


def _save(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], config: dict[str, object], shard: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    held: dict[str, torch.Tensor] = {}
    homes: dict[str, str] = {}
    for name, tensor in tensors:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > shard:
            homes |= _flush(folder, held, f"part-{len(set(homes.values())):05d}.safetensors")
            held = {}
        held[name] = tensor
    if not homes:
        _flush(folder, held, "model.safetensors")
        return
    homes |= _flush(folder, held, f"part-{len(set(homes.values())):05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


def _flush(folder: Path, tensors: dict[str, torch.Tensor], file: str) -> dict[str, str]:
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)
