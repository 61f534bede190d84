"""Every rival, each at several sizes.

Offsets are those from the merged checkpoint, which favours forms that were made for task vectors: they are smaller.
Tensors of fewer than two dimensions go into float16 wherever a paper leaves them as they are.
"""

from __future__ import annotations

from functools import partial

from rivals import adapters, drop, low_rank, masks, recreation, signs
from rivals.form import Form, over_base, over_merged


def forms(tasks: int) -> list[Form]:
    """All rows for ``tasks`` experts; some sizes depend on how many there are."""
    return [*_low_rank(tasks), *_recreations(tasks), *_adapters(), *_signs_and_masks(), *_drops()]


def _low_rank(tasks: int) -> list[Form]:
    found = []
    for name, vectors, ranks in (("svd", True, (1, 2, 4, 8, 16)), ("lora-extract", False, (1, 4, 16))):
        for rank in ranks:
            encode = partial(low_rank.encode, rank=low_rank.fixed(rank), vectors=vectors)
            found.append(over_merged(name, f"r = {rank}", encode, low_rank.decode))
    for parts in (1, 4, 16):
        encode = partial(low_rank.encode, rank=low_rank.share(1 / (parts * tasks)), vectors=True)
        found.append(over_base("tsv-compress", f"1/{parts * tasks} of all", encode, low_rank.decode, "over the base"))
    return found


def _recreations(tasks: int) -> list[Form]:
    sizes = [(tasks, tasks), (2 * tasks, tasks), (4 * tasks, tasks), (2 * tasks, max(1, tasks // 2))]
    note = "re-created: the authors' predictor is not public"
    return [
        Form(
            "retex-recreation",
            f"{components} components, d_e = {width}",
            partial(recreation.encode, components=components, width=width),
            recreation.decode,
            note=note,
        )
        for components, width in sizes
    ]


def _adapters() -> list[Form]:
    return [
        Form(
            name,
            f"r = {rank}",
            partial(adapters.adapters, rank=rank, everywhere=everywhere),
            adapters.decode,
            note="on every layer, vectors in float16" if everywhere else "",
        )
        for name, everywhere in (("esm++", False), ("esm++-everywhere", True))
        for rank in (2, 8, 32)
    ]


def _signs_and_masks() -> list[Form]:
    note = "its vector of all tasks stands in for the merged checkpoint; the base is needed as well"
    tall = [
        Form("tall-masks", f"λ = {strictness}", partial(masks.tall, strictness=strictness), masks.decode, True, note)
        for strictness in (0.2, 0.4, 0.6)
    ]
    return [
        over_merged("bitdelta", "1 bit", signs.encode, signs.decode, "scales not trained"),
        Form("emr", "1 bit", masks.emr, masks.decode, True, note),
        *tall,
    ]


def _drops() -> list[Form]:
    dares = [
        over_merged(
            "dare" if seeded else "dare-coded",
            f"p = {rate}",
            partial(drop.dare, drop=rate, seeded=seeded),
            drop.dare_decode,
            "the mask costs nothing: it is drawn again from its seed" if seeded else "",
        )
        for rate, seeded in ((0.9, True), (0.99, True), (0.999, True), (0.9, False), (0.99, False))
    ]
    ultras = [
        over_merged(
            "ultradelta-style", f"s = {rate}", partial(drop.ultra, drop=rate), drop.ultra_decode, "without its rescaler"
        )
        for rate in (0.8, 0.9, 0.95, 0.99)
    ]
    return [*dares, *ultras]
