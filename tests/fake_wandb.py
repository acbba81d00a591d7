"""A W&B server on loopback, as much of one as a run needs: it answers, and remembers what was sent."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import yaml


class FakeWandb:
    """`url`, the rows of `history` and the GraphQL `operations` received; with `silent` set it never answers. All
    rows are taken for those of one run.

    Its one sweep, `sweep1`, has the config that `wandb sweep` sent last; the agent gets one of `trials` (id of the run
    and parameters) after the other, and is then sent away.
    """

    def __init__(self, trials: Sequence[tuple[str, dict[str, Any]]] = ()) -> None:
        self._trials = list(trials)
        self.sweep_config = ""
        self.history: list[dict[str, Any]] = []
        self.operations: list[dict[str, Any]] = []
        self.silent = threading.Event()
        self._over = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if owner.silent.is_set():
                    owner._over.wait()
                    return
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = json.dumps(owner._answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            sent = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if sent:
                self.history[sent["offset"] :] = [json.loads(line) for line in sent["content"]]
        if path != "/graphql":
            return {}
        request = json.loads(body)
        self.operations.append(request)
        variables, query = request.setdefault("variables", {}), request["query"]
        if "RunResumeStatus" in query and self.history:
            counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
            tails = {"historyTail": json.dumps([json.dumps(self.history[-1])]), "eventsTail": "[]"}
            run = {"id": "id", "name": variables["name"], "displayName": "name", "summaryMetrics": "{}", "tags": []}
            run |= {"config": "{}", "wandbConfig": '{"t": 1}'}
            entity = {"name": "entity", "id": "id"}
            return {
                "data": {"model": {"id": "id", "name": "project", "entity": entity, "bucket": run | counts | tails}}
            }
        if "UpsertBucket" in query:
            project = {"name": "project", "entity": {"name": "entity"}}
            bucket = {"id": "id", "name": variables["name"], "displayName": "name", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}}
        if "viewer" in query:
            person = {"id": "id", "entity": "entity", "username": "me", "email": "", "admin": False, "flags": "{}"}
            return {"data": {"viewer": person | {"teams": {"edges": []}}}}
        if "UpsertSweep" in query:
            self.sweep_config = variables["config"]
            project = {"id": "id", "name": "project", "entity": {"id": "id", "name": "entity"}}
            sweep = {"name": "sweep1", "project": project}
            return {"data": {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}}
        if "SweepWithRuns" in query:
            return {"data": {"project": {"sweep": {"config": self.sweep_config, "runs": {"edges": []}}}}}
        if "CreateAgent" in query:
            return {"data": {"createAgent": {"agent": {"id": "agent1"}}}}
        if "Heartbeat" in query:
            commands: list[dict[str, Any]] = []
            if not json.loads(variables["runState"]):
                commands.append(self._next_trial())
            return {"data": {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def _next_trial(self) -> dict[str, Any]:
        if not self._trials:
            return {"type": "exit"}
        run_id, parameters = self._trials.pop(0)
        program = yaml.safe_load(self.sweep_config)["program"]
        args = {name: {"value": value} for name, value in parameters.items()}
        return {"type": "run", "run_id": run_id, "args": args, "program": program}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
