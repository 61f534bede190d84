"""Names of files and names of modules: what transformers saved is loaded, whatever the module calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from retex_cli.errors import RetexError
from retex_cli.models.names import saved_names
from retex_cli.models.network import Network

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def test_a_file_of_other_names_than_the_modules_is_loaded_whole(tmp_path: Path) -> None:
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    own = model.state_dict()
    strange = tensors.keys() - own.keys()
    assert strange, "this is what the test is about"
    assert strange <= saved_names(model).keys()
    network = Network(tmp_path, torch.device("cpu"))
    network.load(tensors.items(), "here")
    assert all(torch.equal(value, own[name]) for name, value in network.module.state_dict().items())


def test_a_model_with_a_head_is_filled_from_the_file_of_a_base_model(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=5, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    wanted = GPT2LMHeadModel(config).state_dict()
    file = {name.removeprefix("transformer."): value for name, value in wanted.items() if name != "lm_head.weight"}
    network = Network(tmp_path, torch.device("cpu"))
    network.load({**file, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}.items(), "a file of version 4")
    assert all(torch.equal(value, wanted[name]) for name, value in network.module.state_dict().items())
    with pytest.raises(RetexError, match=r"'h\.0\.mask' has no place"):
        network.load({**file, "h.0.mask": torch.ones(1)}.items(), "here")


def test_most_modules_are_called_what_their_files_call_them() -> None:
    assert saved_names(BertModel(BertConfig(vocab_size=5, **SIZES))) == {}
    assert saved_names(torch.nn.Linear(2, 2)) == {}
