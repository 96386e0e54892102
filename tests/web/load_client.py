"""Annotators who label without a pause over HTTP, all in one process: cheap, so that the server is measured.

Plain HTTP/1.1 over asyncio streams, one connection an annotator, kept alive. A request that gets no reply is sent
again, a submission with the same token, until the server is back. `main` prints what was acknowledged and how long it
took.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

RETRY_SECONDS = 0.05
GIVE_UP_SECONDS = 300.0
ASK_AGAIN_SECONDS = 0.1


@dataclass
class Outcome:
    """`labels` are the acknowledged ones: token -> [label, assignment, annotator, kind]. `seconds` by path."""

    labels: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    num_retries: int = 0


class Connection:
    """One annotator's connection and cookie."""

    def __init__(self, port: int, outcome: Outcome) -> None:
        self._port = port
        self._outcome = outcome
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._cookie = ""

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and body of the reply; sent until there is one."""
        end = time.monotonic() + GIVE_UP_SECONDS
        while True:
            try:
                start = time.monotonic()
                reply = await self._once(method, path, body)
                self._outcome.seconds.setdefault(path.partition("?")[0], []).append(time.monotonic() - start)
                return reply
            except (OSError, EOFError):
                self.close()
                self._outcome.num_retries += 1
                assert time.monotonic() < end, f"{path}: no reply for {GIVE_UP_SECONDS} s"
                await asyncio.sleep(RETRY_SECONDS)

    def close(self) -> None:
        """Closes the connection; the next request opens another one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _once(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nX-RLHF: 1\r\nCookie: {self._cookie}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        for line in lines:
            if line.lower().startswith("set-cookie: "):
                self._cookie = line.partition(": ")[2].partition(";")[0]
        text = await reader.readexactly(int(headers["content-length"]))
        return int(lines[0].split()[1]), json.loads(text) if text and "json" in headers["content-type"] else text


async def annotate(port: int, token: str, number: int, outcome: Outcome, holds: Collection[int]) -> None:
    """One annotator, until there is nothing left for them.

    When as many labels are there as a number in `holds`, all annotators wait for a line on standard input.
    """
    chance = random.Random(number)
    connection = Connection(port, outcome)
    name = f"annotator {number}"
    status, _ = await connection.request("GET", f"/?token={token}")
    assert status == 303, status
    status, _ = await connection.request("POST", "/api/annotator", {"name": name})
    assert status == 200, status
    while True:
        status, given = await connection.request("POST", "/api/next", {})
        assert status == 200, (status, given)
        if given["state"] == "finished":
            break
        if given["state"] == "others":
            await asyncio.sleep(ASK_AGAIN_SECONDS)
            continue
        assignment = given["task"]["assignment"]
        submission = {
            "assignment": assignment,
            "token": f"{number}-{assignment}-{chance.getrandbits(64):x}",
            "answer": _answer(chance),
            "seconds": 0.1,
        }
        status, made = await connection.request("POST", "/api/submit", submission)
        assert status == 200, (status, made)
        row = [made["label"], assignment, name, submission["answer"]["kind"]]
        outcome.labels[submission["token"]] = row
        # The line is the acknowledgement that whoever kills the server relies on.
        print(json.dumps(row), flush=True)
        if len(outcome.labels) in holds:
            sys.stdin.readline()
    connection.close()


def _answer(chance: random.Random) -> dict[str, Any]:
    draw = chance.random()
    if draw < 0.02:
        return {"kind": "skip"}
    if draw < 0.1:
        return {"kind": "tie"}
    return {"kind": "choice", "position": chance.randrange(2), "strength": chance.randint(1, 3)}


async def main(port: int, token: str, num_annotators: int, *holds: int) -> None:
    """All annotators at once; the last line printed is the outcome."""
    outcome = Outcome()
    start = time.monotonic()
    await asyncio.gather(*(annotate(port, token, number, outcome, holds) for number in range(num_annotators)))
    print(json.dumps({**vars(outcome), "elapsed": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
