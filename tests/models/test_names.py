"""Names of files and names of modules: what transformers saved is loaded, whatever the module calls it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

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
    assert strange == saved_names(model).keys()
    network = Network(tmp_path, torch.device("cpu"))
    network.load(tensors, "here")
    assert all(torch.equal(value, own[name]) for name, value in network.module.state_dict().items())


def test_most_modules_are_called_what_their_files_call_them() -> None:
    assert saved_names(BertModel(BertConfig(vocab_size=5, **SIZES))) == {}
    assert saved_names(torch.nn.Linear(2, 2)) == {}
