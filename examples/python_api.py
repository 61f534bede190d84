"""The whole job as function calls, experts switched inside a loaded model, and mixed inputs answered by their experts.

    python python_api.py FOLDER

``FOLDER`` holds ``base/``, an expert per task in ``experts/NAME/``, and ``data/NAME-inputs.jsonl`` (unlabelled) and
``data/NAME-test.jsonl`` (labelled) for each; models may just as well be hub ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoModel

import retex_cli as retex


class Lines:
    """Progress as lines; any object with these three methods will do."""

    def start(self, label: str, total: int) -> None:
        """A stage begins."""
        print(f"{label} ({total})")

    def advance(self, steps: int = 1) -> None:
        """Steps are done."""

    def note(self, text: str) -> None:
        """Something worth reading."""
        print(text)


def main(folder: Path) -> None:
    """Merge, fit, build, recover, evaluate, switch, answer."""
    experts = {path.name: str(path) for path in sorted((folder / "experts").iterdir())}
    inputs = {task: str(folder / f"data/{task}-inputs.jsonl") for task in experts}
    tests = {task: str(folder / f"data/{task}-test.jsonl") for task in experts}
    merged = str(folder / "merged")
    offsets, signatures = str(folder / "offsets.safetensors"), str(folder / "signatures.safetensors")

    retex.merge(str(folder / "base"), experts, merged, method="ties", options={"density": 0.3}, progress=Lines())
    retex.fit_offsets(merged, experts, offsets, budget="5%")
    retex.build_signatures(merged, inputs, signatures)
    for task in experts:
        retex.recover(merged, offsets, str(folder / "recovered" / task), task=task)
    report = retex.evaluate(merged, offsets, experts, tests, signatures=signatures)
    for line in report.lines():
        print(line)

    predictor = retex.Predictor.load(merged, offsets)
    model = AutoModel.from_pretrained(merged)
    for task in experts:
        predictor.apply_(model, task, head=False)  # the encoder alone: this model has no place for a head
        print(f"switched to {task}: weights sum to {sum(value.sum().item() for value in model.parameters()):.6f}")
    predictor.apply_(model, None)

    mixed = [json.loads(Path(file).read_text().splitlines()[0])["text"] for file in tests.values()]
    for reply in retex.Experts.load(merged, offsets, signatures)([*mixed, ""]):  # each by its own task's expert
        print(reply.error or f"{reply.task}: {reply.label} (the task is {100 * reply.probability:.0f} % sure)")

    try:
        retex.recover(merged, offsets, str(folder / "recovered" / "boats"), task="boats")
    except retex.RetexError as error:  # every failure says what is wrong and what to do next
        print(f"{error.message} ({error.hint})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
