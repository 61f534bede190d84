"""Which name of one checkpoint is which name of another, and what a name says about a tensor's role.

Only headers are read: names and shapes. The rules are those of "shared tensors" and "task tensors": one model prefix
is removed, the base's names win.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from retex_cli.errors import RetexError

Shape = tuple[int, ...]


class Prefix(NamedTuple):
    """What is removed from the front of the base's and of the expert's names; usually one of them is empty."""

    base: str
    expert: str


#: Modules that map features to answers: of another size in every task, so never merged when the sizes differ.
OUTPUT_MODULES = frozenset(
    "classifier cls_classifier distillation_classifier score head heads head_dist cls_head fc _fc lm_head logits "
    "logits_proj qa_outputs seq_relationship classification_head span_classifier output_layer predictor".split()
)

#: Modules with one row per token of the vocabulary: they grow when tokens are added.
VOCABULARY_MODULES = frozenset(
    "word_embeddings embed_tokens wte tok_embeddings token_embedding token_embeddings shared embed_in embed_out "
    "lm_head decoder predictions".split()
)

#: Floating-point buffers that the model computes for itself; integer and boolean tensors are buffers too.
BUFFER_LEAVES = frozenset(
    "inv_freq original_inv_freq masked_bias cos_cached sin_cached position_ids token_type_ids num_batches_tracked "
    "relative_position_index relative_coords_table attn_mask".split()
)

# Checkpoints converted from TensorFlow still call a LayerNorm's parameters gamma and beta; transformers renames them.
_LEGACY = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")
_MODERN = {"gamma": "weight", "beta": "bias"}


def canonical(name: str) -> str:
    """``LayerNorm.gamma`` and ``LayerNorm.beta`` under the names that today's files give them."""
    return _LEGACY.sub(lambda match: _MODERN[match.group()], name)


def _suffixes(name: str) -> list[tuple[str, str]]:
    """Every way to cut a name behind a dot: ``a.b.c`` -> ("", "a.b.c"), ("a.", "b.c"), ("a.b.", "c")."""
    cuts = [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]
    return [(name[:at], name[at:]) for at in cuts]


def _votes(base: Mapping[str, Shape | None], expert: Mapping[str, Shape | None]) -> Counter[Prefix]:
    """For each pair of prefixes, how many tensors of one name and one shape it would match."""
    votes: Counter[Prefix] = Counter()
    for name, shape in expert.items():
        for prefix, rest in _suffixes(name):
            if rest in base and base[rest] == shape:
                votes[Prefix("", prefix)] += 1
    for name, shape in base.items():
        for prefix, rest in _suffixes(name)[1:]:
            if rest in expert and expert[rest] == shape:
                votes[Prefix(prefix, "")] += 1
    first = {rest: (prefix, shape) for name, shape in base.items() for prefix, rest in _suffixes(name)[1:2]}
    for name, shape in expert.items():
        for prefix, rest in _suffixes(name)[1:2]:
            found = first.get(rest)
            if found and found[1] == shape and found[0] != prefix:
                votes[Prefix(found[0], prefix)] += 1
    return votes


def find_prefix(base: Mapping[str, Shape], expert: Mapping[str, Shape], where: str) -> Prefix:
    """The pair of prefixes under which most tensors match in name and shape; no prefix if nothing matches.

    A tie goes to the shorter pair. RetexError, naming ``where``, when two different prefixes match equally well and are
    equally long to say, as for two identical towers in one expert.
    """
    ours = {canonical(name): shape for name, shape in base.items()}
    theirs = {canonical(name): shape for name, shape in expert.items()}
    # where no shape agrees the names still say what should have matched, and the shapes make the error message
    votes = _votes(ours, theirs) or _votes(dict.fromkeys(ours), dict.fromkeys(theirs))
    if not votes:
        return Prefix("", "")

    def rank(prefix: Prefix) -> tuple[int, int]:
        return -votes[prefix], (prefix.base + prefix.expert).count(".")

    best, *rest = sorted(votes, key=lambda prefix: (*rank(prefix), prefix))
    if rest and rank(rest[0]) == rank(best) and votes[best] > 1:
        one, other = best.base + best.expert, rest[0].base + rest[0].expert
        raise RetexError(
            f"{where}: the base matches two parts of it equally well, {one!r} and {other!r}",
            "give a checkpoint with one of the two parts",
        )
    return best


def strip(name: str, prefix: str) -> str:
    """The canonical name without the prefix, where it has it."""
    return canonical(name.removeprefix(prefix))


def _module_path(name: str) -> list[str]:
    """The modules above a tensor without the numbers of a trailing ``Sequential``: ``heads.0.weight`` -> [heads]."""
    path = name.split(".")[:-1]
    while path and path[-1].isdigit():
        path.pop()
    return path


def is_output_module(name: str) -> bool:
    """Whether a tensor belongs to an output layer by its name; modules inside numbered layers never do."""
    path = _module_path(name)
    if not path or any(part.isdigit() for part in path):
        return False
    return path[-1] in OUTPUT_MODULES or (path[-1] == "out_proj" and path[-2:-1] == ["classifier"])


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token, by the name of its module."""
    path = _module_path(name)
    return bool(path) and path[-1] in VOCABULARY_MODULES and not any(part.isdigit() for part in path)


def is_buffer(name: str, shape: Shape, floating: bool) -> bool:
    """Whether a tensor is computed by the model and not learned: by its type, its name, or as a causal mask."""
    leaf = name.rpartition(".")[2]
    causal_mask = leaf == "bias" and len(shape) == 4 and shape[:2] == (1, 1)
    return not floating or leaf in BUFFER_LEAVES or causal_mask
