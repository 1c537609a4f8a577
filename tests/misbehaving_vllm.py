"""A server that misbehaves where a vLLM server is expected; it stands in for nothing else.

    python misbehaving_vllm.py HOW FOLDER --port PORT ...

It writes its process ids to the log, starts a child as vLLM does, and answers a completion with EOS alone until it
does what HOW says. Where it echoes, it answers with the prompt's first token, the later the larger that is, and leaves
what it was asked in FOLDER. `fake_vllm` makes an interpreter of it, for `ppo.vllm_python`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

EOS = 257
GOOD: dict[str, Any] = {"choices": [{"token_ids": [EOS], "logprobs": {"token_logprobs": [-1.0]}}]}


def completion(token_ids: Any, log_probs: Any) -> bytes:
    """A completion with these contents."""
    return json.dumps({"choices": [{"token_ids": token_ids, "logprobs": {"token_logprobs": log_probs}}]}).encode()


NONSENSE = {
    "no JSON": b"<html>busy</html>",
    "no choice": b'{"choices": []}',
    "no token ids": b'{"choices": [{"text": "Hi", "logprobs": {"token_logprobs": [-1.0]}}]}',
    "no log-probabilities": b'{"choices": [{"token_ids": [257], "logprobs": null}]}',
    "an empty answer": completion([], []),
    "a log-probability too few": completion([5, EOS], [-1.0]),
    "a token beyond the vocabulary": completion([99_999, EOS], [-1.0, -1.0]),
    "a token after the end": completion([EOS, 5, EOS], [-1.0, -1.0, -1.0]),
    "an answer that stops early": completion([5, 6], [-1.0, -1.0]),
    "an answer that is too long": completion([5] * 7 + [EOS], [-1.0] * 8),
    "a log-probability above 0": completion([5, EOS], [0.5, -1.0]),
    "a log-probability that is not a number": completion([5, EOS], [float("nan"), -1.0]),
}


def fake_vllm(folder: Path, how: str) -> str:
    """Path of a program that takes an interpreter's arguments (`-m MODULE ...`) and starts this server."""
    program = folder / "python"
    command = f"{sys.executable} {Path(__file__).absolute()} '{how}' '{folder.absolute()}'"
    program.write_text(f'#!/bin/sh\nshift 2\nexec {command} "$@"\n')
    program.chmod(0o755)
    return str(program)


class Handler(BaseHTTPRequestHandler):
    how = ""
    folder = Path()
    served = 0

    def do_GET(self) -> None:
        self.reply(b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/chat/completions" and self.how == "chats":
            self.reply(b'{"choices": [{"message": {"role": "assistant", "content": "Fried rice."}}]}')
            return
        if self.path != "/v1/completions":
            self.reply(b"{}")
            return
        type(self).served += 1
        if self.how == "dies" or (self.how == "dies in the second batch" and self.served > 4):
            os._exit(9)
        elif self.how == "hangs up":
            self.reply(json.dumps(GOOD).encode(), missing=10)
        elif self.how == "refuses":
            self.reply(b"the engine is dead", status=500)
        elif self.how == "is silent":
            time.sleep(600)
        elif self.how == "echoes":
            self.reply(self.echo(body))
        else:
            self.reply(NONSENSE.get(self.how, json.dumps(GOOD).encode()))

    def echo(self, body: bytes) -> bytes:
        with (self.folder / "requests.jsonl").open("ab") as file:  # one write, at the end: no other comes in between
            file.write(body + b"\n")
        first = json.loads(body)["prompt"][0]
        time.sleep(first / 50)
        return completion([first, EOS], [-1.0, -1.0])

    def reply(self, content: bytes, status: int = 200, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) + missing))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


if __name__ == "__main__":
    Handler.how, Handler.folder = sys.argv[1], Path(sys.argv[2])
    child = subprocess.Popen(["sleep", "600"])
    print(f"server pids {os.getpid()} {child.pid}", *sys.argv[3:], flush=True)
    if Handler.how == "does not start":
        sys.exit("no accelerator was found")
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
