"""The options that commands share, declared once; a command's signature picks the ones it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Place = Annotated[
    Path | None,
    typer.Option("--workspace", "-w", metavar="DIR", help="Folder with a retex.toml. [default: the current one]"),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="REF", help="Pre-trained model: folder, file or hub id org/name[@revision]."),
]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert", metavar="NAME=REF", help="A task's fine-tuned model or LoRA adapter. Repeat; adds to retex.toml."
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--inputs", metavar="NAME=PATH", help="A task's unlabelled reference inputs. Repeat."),
]
Validation = Annotated[
    list[str] | None,
    typer.Option("--validation", metavar="NAME=PATH", help="A task's labelled rows to choose a scale on. Repeat."),
]
Tests = Annotated[
    list[str] | None, typer.Option("--test", metavar="NAME=PATH", help="A task's labelled test data. Repeat.")
]
Merged = Annotated[
    str | None, typer.Option("--merged", metavar="REF", help="The merged checkpoint. [default: merged/]")
]
Offsets = Annotated[
    str | None, typer.Option("--offsets", metavar="FILE", help="The offsets. [default: offsets.safetensors]")
]
Signatures = Annotated[
    str | None,
    typer.Option("--signatures", metavar="FILE", help="The signatures. [default: signatures.safetensors]"),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="MODULE:NAME", help="Function that builds a model transformers cannot."),
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="Store float32, bfloat16 or float16. [default: as the inputs are]"),
]
ShardSize = Annotated[
    str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Split a folder's weights here. [default: 5GB]")
]
AllowMissing = Annotated[
    list[str] | None,
    typer.Option("--allow-missing", metavar="GLOB", help="Base parameters that an expert may lack. Repeat; recorded."),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, metavar="N", help="Inputs per forward pass.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option("--device", metavar="auto|cpu|cuda", help="auto takes CUDA if it is there, and says so if not."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads. [default: as many as cores]")
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="For methods that draw random numbers.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; errors only.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, failures included.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of any error.")]
