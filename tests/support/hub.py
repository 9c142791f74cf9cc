"""An imitation of the hub on this machine: it makes repositories and takes commits, and keeps what it was sent."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + "a" * 34


@dataclass
class Hub:
    """What was made and committed, and the address that stands for huggingface.co."""

    address: str
    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@contextmanager
def imitated() -> Iterator[Hub]:
    """The hub, for as long as the block runs. It knows one token, and one user, `someone`."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid username or password."})
            elif self.path == "/api/repos/create":
                self._make(json.loads(sent))
            elif "/preupload/" in self.path:
                asked = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(sent)["files"]]
                self._answer(200, {"files": [{**one, "shouldIgnore": False} for one in asked]})
            elif "/commit/" in self.path:
                self._commit([json.loads(line) for line in sent.splitlines()])
            else:
                self._answer(200, {"errors": [], "warnings": []})  # of the card's front matter

        def do_GET(self) -> None:
            if hub.made:
                self._answer(200, {"id": "someone/small", "sha": "0" * 40, "siblings": []})
            else:
                self._answer(404, {"error": "Repository not found"})

        def _make(self, wanted: dict[str, Any]) -> None:
            if wanted.get("organization", "someone") != "someone":
                self._answer(403, {"error": f"You don't have the rights to create a model under {wanted}"})
                return
            hub.made.append(wanted)
            self._answer(200, {"url": f"{hub.address}/someone/{wanted['name']}", "id": f"someone/{wanted['name']}"})

        def _commit(self, lines: list[dict[str, Any]]) -> None:
            for line in lines:
                if line["key"] == "header":
                    hub.commits.append(
                        f"{line['value']['summary']} on {self.path.rpartition('/')[2].partition('?')[0]}"
                    )
                else:
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"{hub.address}/someone/small/commit/0", "commitOid": "0" * 40})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
