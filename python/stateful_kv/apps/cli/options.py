"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MAX_INT = 2**31 - 1
DEFAULT_KV_DTYPE = "auto"
ModelOption = Annotated[
    str, typer.Option(help="smollm2 (the default), a GGUF file, a model folder, or a Hub id.")
]
MaxTokensOption = Annotated[
    int, typer.Option(min=1, max=MAX_INT, help="Longest reply of a turn, in tokens.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="CPU threads (default: what torch chooses)."),
]
KvTokensOption = Annotated[
    int, typer.Option(min=64, max=10**15, help="Capacity of the KV pool, in tokens.")
]
KvDtypeOption = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="KV stored as float16 (auto on the CPU), bfloat16 (auto on CUDA), float32 or int8.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda or cuda:N.")
]
WorkflowArgument = Annotated[
    str, typer.Argument(metavar="WORKFLOW.json|NAME", help="A file, or a shipped workflow.")
]
IgnoreEosOption = Annotated[
    bool, typer.Option("--ignore-eos", help="Always generate --max-tokens tokens.")
]
NoDraftOption = Annotated[
    bool, typer.Option("--no-draft", help="Generate without drafts (same tokens, other time).")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="OUT", help="Write the result as JSON; - prints.")
]
