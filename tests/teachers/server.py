"""A server of a tiny language model, in a process of its own, which answers as vLLM does or misbehaves as told."""

import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.faults.training import fork, wait

Answer = dict[str, Any]
Spoil = Callable[[Answer], None]


def _entries(answer: Answer) -> list[Any]:
    """What the answer says at each token, in either shape."""
    choice = answer["choices"][0]
    return choice["prompt_logprobs"] if "prompt_logprobs" in choice else choice["logprobs"]["top_logprobs"]


def _drop_entry(answer: Answer) -> None:
    for _ in range(2):  # one entry more than was asked for may stand there
        _entries(answer)[2].popitem()


def _drop_token(answer: Answer) -> None:
    choice = answer["choices"][0]
    lists = [choice["prompt_logprobs"]] if "prompt_logprobs" in choice else list(choice["logprobs"].values())
    for one in lists:
        del one[-2:]


def _set_value(answer: Answer, value: Any) -> None:
    entries = _entries(answer)[2]
    name = next(iter(entries))
    entries[name] = {**entries[name], "logprob": value} if isinstance(entries[name], dict) else value


def _shift_ids(answer: Answer) -> None:
    entries = _entries(answer)
    prefix = "token_id:" if any(":" in name for name in entries[2]) else ""
    entries[2] = {f"{prefix}{100_000 + number}": entry for number, entry in enumerate(entries[2].values())}


def _swap_ranks(answer: Answer) -> None:
    first, second = sorted(_entries(answer)[2].values(), key=lambda entry: entry["rank"])[:2]
    first["rank"], second["rank"] = second["rank"], first["rank"]


def _echo_others(answer: Answer) -> None:
    choice = answer["choices"][0]
    if "prompt_logprobs" in choice:
        del choice["prompt_logprobs"][3][str(choice["sent"][3])]
    else:
        choice["logprobs"]["tokens"][1] = "token_id:0"


def _raise_mass(answer: Answer) -> None:
    for name, entry in _entries(answer)[2].items():
        _entries(answer)[2][name] = {**entry, "logprob": -0.01} if isinstance(entry, dict) else -0.01


SPOILED: dict[str, Spoil] = {
    "wrong k": _drop_entry,
    "wrong token count": _drop_token,
    "NaN": lambda answer: _set_value(answer, math.nan),
    "infinity": lambda answer: _set_value(answer, -math.inf),
    "a string": lambda answer: _set_value(answer, "-1.0"),
    "a positive log-probability": lambda answer: _set_value(answer, 0.5),
    "ids outside the vocabulary": _shift_ids,
    "other tokens": _echo_others,
    "too much mass": _raise_mass,
    "no choices": lambda answer: answer.update(choices=[]),
    "null": lambda answer: answer["choices"][0].update(prompt_logprobs=None, logprobs=None),
}
"""Answers that look right and are not."""

BROKEN = ("500", "503 later", "stall", "drip", "truncated JSON", "cut short", "reset", "no JSON", "list")
"""Ways to give no answer at all."""

ROGUE_RANKS: dict[str, Spoil] = {"ranks": _swap_ranks}


@contextmanager
def serving(
    model: nn.Module, script: Sequence[str], log: Path, names: Sequence[str] = (), port: int = 0
) -> Iterator[str]:
    """A server's address.

    Args:
        model: the teacher.
        script: what the first answers are, in order: "right", or a name from above; a last entry "always X" is
            for all further ones, which are right without it.
        log: receives a line of JSON for each request.
        names: of the tokens, for the older shape; `token_id:N` without.
        port: to listen at; a free one if 0.
    """
    listener = socket.create_server(("127.0.0.1", port))
    child = fork(lambda: _serve(listener, model.eval(), list(script), log, list(names)))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.close()
        os.kill(child, signal.SIGKILL)
        wait(child)


def _serve(listener: socket.socket, model: nn.Module, script: list[str], log: Path, names: list[str]) -> None:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                how = script[0].removeprefix("always ") if script else "right"
                if script and not script[0].startswith("always "):
                    script.pop(0)
                with log.open("a") as file:
                    said = {"how": how, "path": self.path, "key": self.headers["Authorization"]}
                    file.write(json.dumps({**said, **body}) + "\n")
                answer = answer_to(model, body, names)
            _reply(self, how, answer)

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket = listener
    server.serve_forever()


@torch.no_grad()
def answer_to(model: nn.Module, body: dict[str, Any], names: list[str]) -> Answer:
    """The right answer to a request, in the shape that it asks for."""
    ids, k = body["prompt"], body.get("prompt_logprobs") or body["logprobs"]
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    log_probs = logits.double().log_softmax(-1)
    values, tops = log_probs.topk(k, -1)
    places = []
    for place in range(1, len(ids)):
        chosen = dict(zip(tops[place - 1].tolist(), values[place - 1].tolist(), strict=True))
        places.append({ids[place]: float(log_probs[place - 1, ids[place]])} | chosen)
    if "prompt_logprobs" in body:
        shown = [None, *map(_ranked, places)]
        return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": shown, "sent": ids}]}
    name = (lambda token: names[token]) if names else (lambda token: f"token_id:{token}")
    echoed = {
        "tokens": [name(token) for token in ids],
        "token_logprobs": [None, *(place[ids[n + 1]] for n, place in enumerate(places))],
        "top_logprobs": [None, *({name(i): v for i, v in place.items()} for place in places)],
    }
    if body["max_tokens"]:
        for part, extra in zip(echoed.values(), ("token_id:1", -0.5, {"token_id:1": -0.5}), strict=True):
            part.append(extra)
    return {"object": "text_completion", "choices": [{"index": 0, "text": "x", "logprobs": echoed}]}


def _ranked(place: dict[int, float]) -> dict[str, dict[str, Any]]:
    in_order = sorted(place.items(), key=lambda pair: -pair[1])
    return {str(i): {"logprob": v, "rank": rank, "decoded_token": ""} for rank, (i, v) in enumerate(in_order, 1)}


def _reply(handler: BaseHTTPRequestHandler, how: str, answer: Answer) -> None:
    spoil = {**SPOILED, **ROGUE_RANKS}.get(how)
    if spoil is not None:
        spoil(answer)
    content = json.dumps(answer).encode()
    if how == "500" or how == "503 later":
        handler.send_response(int(how[:3]))
        content = b"the model fell over"
        if how.endswith("later"):
            handler.send_header("Retry-After", "0.05")
    elif how == "401":
        handler.send_response(401)
        content = b"who are you?"
    elif how == "stall":
        time.sleep(30)
        return
    elif how == "reset":
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        handler.connection.close()
        handler.close_connection = True
        return
    else:
        handler.send_response(200)
        half = content[: len(content) // 2]
        content = {"truncated JSON": half, "no JSON": b"<html>", "list": b"[]"}.get(how, content)
    handler.send_header("Content-Length", str(len(content) + (50 if how == "cut short" else 0)))
    handler.end_headers()
    if how == "drip":
        for byte in content:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)
    handler.wfile.write(content)
    if how == "cut short":
        handler.close_connection = True
