"""Another checkout of this project, built in place, that plays the same workflows turn by turn.

So a change is timed against the commit before it in one run on one machine. The checkout plays in
a process of its own: it is told when to take its next turn and answers with the turn's row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.harness import PeerFailedError, PeerMissingError
from stateful_kv.apps.workflow import FORMAT, TurnRow, WorkflowFile
from stateful_kv.models.files.loading import LoadedModel

VARIABLE = "STATEFUL_KV_OLDER_TREE"
KV_TOKENS = 16384  # as the suite gives our own engines

# Runs in the other checkout, whose modules may stand elsewhere; a row for every line it reads.
_CHILD = """
import dataclasses, json, sys, torch
try:
    from stateful_kv.apps import workflow
except ImportError:
    from stateful_kv import workflow
from stateful_kv import Engine
asked = json.loads(sys.stdin.readline())
torch.set_num_threads(asked["num_threads"])
engine = Engine.load(asked["model"], kv_tokens=asked["kv_tokens"])
options = workflow.ReplayOptions(max_tokens=asked["max_tokens"], ignore_eos=True)
rows = workflow.Player(engine, options).play(workflow.parse_workflow(asked["workflow"]))
for row in rows:
    print(json.dumps(row.to_json()), flush=True)
    sys.stdin.readline()
"""


def find_tree() -> Path:
    """The checkout, by environment variable; PeerMissingError where there is none."""
    named = os.environ.get(VARIABLE)
    if not named:
        raise PeerMissingError(f"set {VARIABLE} to another checkout, built in place")
    folder = Path(named).resolve() / "python"
    if not list(folder.glob("stateful_kv/_C.*.so")):
        raise PeerMissingError(f"{VARIABLE}: no extension is built in that checkout")
    return folder


def start(
    stack: ExitStack, loaded: LoadedModel, file: WorkflowFile, max_tokens: int
) -> tuple[Generator[TurnRow, None, None], dict[str, Any]]:
    """Starts the checkout's process; returns its turns and what it is."""
    folder = find_tree()
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    stack.callback(child.wait)
    stack.callback(child.kill)
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    asked = {
        "num_threads": torch.get_num_threads(),
        "model": loaded.name,
        "kv_tokens": KV_TOKENS,
        "max_tokens": max_tokens,
        "workflow": {"format": FORMAT, **asdict(file)},
    }
    return _turns(child, asked), {"commit": commit}


def _turns(child: subprocess.Popen[str], asked: dict[str, Any]) -> Generator[TurnRow, None, None]:
    """One row for every time that the child is told to go on."""
    assert child.stdin is not None and child.stdout is not None
    line = json.dumps(asked)
    while True:
        child.stdin.write(line + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
        if not answer:
            if child.wait():
                raise PeerFailedError("the older checkout failed; see its message above")
            return
        yield TurnRow(**json.loads(answer))
        line = ""
