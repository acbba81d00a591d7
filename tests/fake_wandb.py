"""A W&B server on loopback, as much of one as a run needs: it answers, and remembers what was sent."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class FakeWandb:
    """`url`, the rows of `history` and the GraphQL `operations` received; with `silent` set it never answers."""

    def __init__(self) -> None:
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
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += [json.loads(line) for line in lines]
        if path != "/graphql":
            return {}
        request = json.loads(body)
        self.operations.append(request)
        variables, query = request["variables"], request["query"]
        if "UpsertBucket" in query:
            project = {"name": "project", "entity": {"name": "entity"}}
            bucket = {"id": "id", "name": variables["name"], "displayName": "name", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
