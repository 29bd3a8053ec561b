"""The server peer against a stand-in program: it plays a file, fails clearly and always ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import harness
from bench.peers import llama_server
from bench.suites import workflow as suite
from stateful_kv.apps.workflow import TurnRow, parse_workflow

# Answers with the number of messages it was sent; ends when a message says so.
PROGRAM = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {{"status": "ok", "build_info": "b1"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = body["messages"]
        if messages[-1]["content"] == "die":
            os._exit(7)
        if messages[-1]["content"] == "refuse":
            return self.reply(400, {{"error": "no"}})
        assert body["ignore_eos"] and body["cache_prompt"] and body["temperature"] == 0
        text = "%d messages in slot %d" % (len(messages), body["id_slot"])
        if len(messages) > 3:
            text += ", I said: " + messages[2]["content"]
        self.reply(200, {{
            "choices": [{{"message": {{"content": text}}}}],
            "usage": {{"prompt_tokens": 30, "completion_tokens": body["max_tokens"]}},
            "timings": {{"prompt_n": 10, "prompt_ms": 2.0, "draft_n": 4, "draft_n_accepted": 3}},
        }})

    def reply(self, status, answer):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def _file(*messages: str):
    agents = [{"name": "a", "system": "be brief"}, {"name": "b"}]
    turns = [{"agent": "ab"[i % 2], "message": message} for i, message in enumerate(messages)]
    workflow = {"agents": agents, "turns": turns}
    document = {"format": "stateful-kv-workflow/1", "name": "n", "workflows": [workflow]}
    return parse_workflow(document)


@pytest.fixture
def program(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "server"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv(llama_server.VARIABLE, str(path))
    return path


def _server(tmp_path: Path) -> llama_server.LlamaServer:
    return llama_server.LlamaServer(tmp_path / "model.gguf", 2, 1, ())


def test_plays_a_file_with_its_own_answers_as_history(program, tmp_path):
    with _server(tmp_path) as server:
        rows = list(llama_server.play(server, _file("one", "two", "three", "four"), 8))
    assert server._process.poll() is not None
    assert [row.text for row in rows] == [
        "2 messages in slot 0",
        "1 messages in slot 1",
        "4 messages in slot 0, I said: 2 messages in slot 0",
        "3 messages in slot 1",
    ]
    row = rows[2]
    assert (row.prompt_tokens, row.reused_tokens, row.computed_tokens) == (30, 20, 10)
    assert (row.drafted_tokens, row.accepted_tokens, row.output_tokens) == (4, 3, 8)
    assert row.ttft_s == 0.002 and row.total_s > 0 and row.turn == 2
    assert server.build == "b1"
    assert "--model" not in server.arguments and str(tmp_path) not in " ".join(server.arguments)


def test_ends_with_an_error_in_the_block(program, tmp_path):
    with pytest.raises(KeyError), _server(tmp_path) as server:
        raise KeyError
    assert server._process.poll() is not None


def test_a_server_that_dies_is_an_error_of_one_line(program, tmp_path, monkeypatch, capsys):
    with _server(tmp_path) as server:
        turns = llama_server.play(server, _file("one", "die"), 8)
        next(turns)
        with pytest.raises(harness.PeerFailedError, match="llama-server") as caught:
            next(turns)
        assert "\n" not in str(caught.value)
        assert server._process.wait(5) == 7

    def fail(*_):
        raise caught.value

    monkeypatch.setattr(suite, "run", fail)
    assert command.main(["run", "workflow", "--smoke"]) == 1
    assert "bench: peer failed: llama-server" in capsys.readouterr().err


def test_an_error_status_is_an_error(program, tmp_path):
    with (
        _server(tmp_path) as server,
        pytest.raises(harness.PeerFailedError, match="HTTP status 400"),
    ):
        next(llama_server.play(server, _file("refuse"), 8))


def test_a_program_that_does_not_serve(program, tmp_path):
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(harness.PeerMissingError, match="ended with status 3"):
        _server(tmp_path)


def test_no_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(llama_server.VARIABLE, raising=False)
    with pytest.raises(harness.PeerMissingError, match=llama_server.VARIABLE):
        llama_server.find_server()
    monkeypatch.setenv(llama_server.VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(harness.PeerMissingError, match="does not name a program"):
        llama_server.find_server()


def test_runs_and_peers_are_chosen():
    def chosen(peer: str | None) -> tuple[list[str], list[str], list[str]]:
        return suite._chosen(harness.Settings(peer=peer))

    every = ["stateful", "stateless", "no_draft"]
    assert chosen(None) == (every, every[1:], [])
    assert chosen("stateless") == (every, ["stateless"], [])
    assert chosen("llama_server") == (["stateful", "no_draft"], [], ["llama_server"])
    assert chosen("all") == (every, every[1:], list(suite.PEERS))


def _row(turn: int, prompt: int, output: int) -> TurnRow:
    return TurnRow(0, "a", turn, prompt, 0, prompt, 0, 0, output, 0.1, 0.2, "", [])


def test_peer_checks():
    ours = [_row(0, 30, 8), _row(1, 60, 8)]
    assert all(suite.peer_checks(ours, [_row(0, 30, 8), _row(1, 61, 8)]).values())
    other = suite.peer_checks(ours, [_row(0, 31, 8), _row(1, 60, 8)])
    assert other == {"first_prompts_are_as_long": False, "replies_are_as_long": True}
    other = suite.peer_checks(ours, [_row(0, 30, 8), _row(1, 60, 7)])
    assert other == {"first_prompts_are_as_long": True, "replies_are_as_long": False}
