"""A stand-in for W&B's server on this machine: it keeps the rows, the summary and the artifacts that a client sends."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    """What has come in for each run, by its id; `artifacts` are (name, "made" or "used")."""

    address: str = ""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    offsets: dict[str, list[int]] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    exits: dict[str, list[int]] = field(default_factory=dict)
    preempting: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    received: Received

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        answer = json.dumps(self._answer(body)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _serve  # noqa: N815 - the names that the base class calls

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed."""

    def _answer(self, body: bytes) -> dict[str, Any]:
        if self.path.endswith("/file_stream"):
            return self._stream(self.path.split("/")[-2], json.loads(body))
        if not self.path.endswith("/graphql"):
            self.received.uploads.append(self.path)
            return {}
        asked = json.loads(body)
        return {"data": self._query(asked["query"], asked.get("variables") or {})}

    def _stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        received = self.received
        for name, part in (body.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"]] if name.endswith(("history.jsonl", ".json")) else []
            if name == "wandb-history.jsonl":
                received.rows.setdefault(run, []).extend(lines)
                received.offsets.setdefault(run, []).append(part["offset"])
            if name == "wandb-summary.json":
                received.summaries.setdefault(run, {}).update(lines[-1])
        if body.get("preempting"):
            received.preempting.append(run)
        if body.get("complete"):
            received.exits.setdefault(run, []).append(int(body["exitcode"]))
        return {"exitcode": None, "limits": {}}

    def _query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        received, name = self.received, str(variables.get("name"))
        operation = query.split("{")[0].split("(")[0].split()[-1]
        project = {"id": "cA==", "name": "rlhf", "entity": {"id": "ZQ==", "name": "me"}}
        if operation == "RunResumeStatus":
            return {"model": {**project, "bucket": self._bucket(name) if name in received.rows else None}}
        if operation == "UpsertBucket":
            received.rows.setdefault(name, [])
            bucket = {**self._bucket(name), "project": project, "sweepName": None, "description": None}
            return {"upsertBucket": {"bucket": bucket, "inserted": len(received.rows[name]) == 0}}
        if operation == "CreateArtifact":
            sent = variables["input"]
            number = str(len(received.names))
            received.names[number] = sent["artifactCollectionName"]
            if sent["runName"] is not None:  # else it is nobody's output: it is made known to be used
                received.artifacts.setdefault(sent["runName"], []).append((received.names[number], "made"))
            sequence = {"id": "s", "latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": number, "state": "PENDING", "artifactSequence": sequence}}}
        if operation == "CreateArtifactManifest":
            file = {"id": "F", "name": "f", "displayName": "f", "uploadUrl": f"{received.address}/manifest"}
            return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": {**file, "uploadHeaders": []}}}}
        if operation == "CreateArtifactFiles":
            return {
                "createArtifactFiles": {
                    "files": {"edges": [self._file(one) for one in variables["input"]["artifactFiles"]]}
                }
            }
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}
        if operation == "UseArtifact":
            sent = variables["input"]
            received.artifacts.setdefault(sent["runName"], []).append((received.names[sent["artifactID"]], "used"))
            return {"useArtifact": {"artifact": {"id": sent["artifactID"]}}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{received.address}/run_file"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "ArtifactType":
            return {"project": None}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _file(self, sent: dict[str, Any]) -> dict[str, Any]:
        """Where one file of an artifact goes."""
        place = {"uploadUrl": f"{self.received.address}/artifact_file", "uploadHeaders": []}
        known = {"id": "f", "name": sent["name"], "displayName": sent["name"], "storagePath": sent["name"]}
        return {"node": {**known, **place, "uploadMultipartUrls": None, "artifact": {"id": sent["artifactID"]}}}

    def _bucket(self, name: str) -> dict[str, Any]:
        rows = self.received.rows.get(name, [])
        return {
            "id": "aWQ=",
            "name": name,
            "displayName": name,
            "summaryMetrics": json.dumps(self.received.summaries.get(name, {})),
            "historyLineCount": len(rows),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": {"value": 1}}',
        }


@contextmanager
def wandb_server() -> Iterator[Received]:
    """The server while the block runs; its address is in what it yields."""
    received = Received()
    handler = type("Handler", (_Handler,), {"received": received})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        received.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()
