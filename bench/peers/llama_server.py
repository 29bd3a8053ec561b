"""llama.cpp's server over HTTP, as an agent program would use it, playing a workflow file.

One slot an agent and every request pinned to its agent's slot, so that prefix caching finds the
whole history; KV of slots apart from each other; no copies of idle prompts in memory, which pinned
slots do not need. Messages go as text and the server renders and tokenises them, each turn the
whole conversation, with its own answers as history.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import PeerFailedError, PeerMissingError
from stateful_kv.apps.workflow import TurnRow, WorkflowFile

VARIABLE = "STATEFUL_KV_LLAMA_SERVER"
SLOT_TOKENS = 8192
START_S, STOP_S, REQUEST_S = 120.0, 10.0, 600.0

# Without drafts, and with the drafters that need no second model.
SETTINGS: dict[str, tuple[str, ...]] = {
    "llama_server": (),
    "llama_server_ngram_map_k": (
        *("--spec-type", "ngram-map-k"),
        *("--spec-ngram-map-k-size-n", "4"),
        *("--spec-ngram-map-k-size-m", "8"),
    ),
    "llama_server_ngram_simple": ("--spec-type", "ngram-simple"),
}


def find_server() -> str:
    """The program, by environment variable or PATH; PeerMissingError where there is none."""
    named = os.environ.get(VARIABLE)
    found = shutil.which(named or "llama-server")
    if found is not None:
        return found
    if named:
        raise PeerMissingError(f"{VARIABLE} does not name a program that can be run")
    raise PeerMissingError(f"llama-server is not on PATH; set {VARIABLE} to the program")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class LlamaServer:
    """A server process; ends with the `with` block, whatever happens in it.

    Attributes:
        arguments: its command line without program, model and port, for the result file.
        build: what it says of its version.
    """

    def __init__(
        self, model: Path, num_slots: int, num_threads: int, options: Sequence[str]
    ) -> None:
        program = find_server()
        self._port = _free_port()
        self.arguments = [
            *("--threads", str(num_threads), "--threads-batch", str(num_threads)),
            *("--parallel", str(num_slots), "--ctx-size", str(num_slots * SLOT_TOKENS)),
            *("--no-kv-unified", "--cache-ram", "0", "--gpu-layers", "0"),
            *options,
        ]
        place = ["--model", str(model), "--host", "127.0.0.1", "--port", str(self._port)]
        self._process = subprocess.Popen(
            [program, *place, *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._wait()
            properties = json.loads(self._request("GET", "/props", None)[1])
            self.build = str(properties.get("build_info"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> None:
        """Until the model is loaded; PeerMissingError if the program does not get there."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise PeerMissingError(f"llama-server ended with status {status} before it served")
            try:
                if self._request("GET", "/health", None)[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass  # not listening yet
            time.sleep(0.1)
        raise PeerMissingError(f"llama-server was not ready after {START_S:.0f} s")

    def _request(self, method: str, path: str, body: str | None) -> tuple[int, bytes]:
        """Status and body; a connection of its own, as the server drops idle ones."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def chat(self, messages: list[dict[str, str]], slot: int, max_tokens: int) -> dict[str, Any]:
        """One greedy reply of `max_tokens` tokens, end of text ignored."""
        body = {
            "messages": messages,
            "id_slot": slot,
            "cache_prompt": True,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        try:
            code, text = self._request("POST", "/v1/chat/completions", json.dumps(body))
            answer: dict[str, Any] = json.loads(text)
        except (OSError, http.client.HTTPException, ValueError) as error:
            status = self._process.poll()
            state = "still runs" if status is None else f"ended with status {status}"
            kind = type(error).__name__
            raise PeerFailedError(f"llama-server {state}, but gave no answer ({kind})") from error
        if code != 200:
            raise PeerFailedError(f"llama-server: HTTP status {code}: {answer}")
        return answer

    def close(self) -> None:
        """Ends the process. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def play(
    server: LlamaServer, file: WorkflowFile, max_tokens: int
) -> Generator[TurnRow, None, None]:
    """Yields one row a turn."""
    for index, workflow in enumerate(file.workflows):
        slots = {agent.name: slot for slot, agent in enumerate(workflow.agents)}
        histories: dict[str, list[dict[str, str]]] = {
            agent.name: [{"role": "system", "content": agent.system}] if agent.system else []
            for agent in workflow.agents
        }
        for number, turn in enumerate(workflow.turns):
            history = histories[turn.agent]
            history.append({"role": "user", "content": turn.message})
            start = time.perf_counter()
            answer = server.chat(history, slots[turn.agent], max_tokens)
            total_s = time.perf_counter() - start
            text = answer["choices"][0]["message"]["content"] or ""
            history.append({"role": "assistant", "content": text})
            yield _row(index, turn.agent, number, answer, total_s, text)


def _row(
    workflow: int, agent: str, turn: int, answer: dict[str, Any], total_s: float, text: str
) -> TurnRow:
    usage, timings = answer["usage"], answer["timings"]
    return TurnRow(
        workflow=workflow,
        agent=agent,
        turn=turn,
        prompt_tokens=usage["prompt_tokens"],
        reused_tokens=usage["prompt_tokens"] - timings["prompt_n"],
        computed_tokens=timings["prompt_n"],
        drafted_tokens=timings.get("draft_n", 0),
        accepted_tokens=timings.get("draft_n_accepted", 0),
        output_tokens=usage["completion_tokens"],
        ttft_s=timings["prompt_ms"] * 1e-3,
        total_s=total_s,
        text=text,
        token_ids=[],
    )
