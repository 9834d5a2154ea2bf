"""A hub of data sets on this machine's loopback: as much of its HTTP interface as reading a data set takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Repositories = dict[tuple[str, str], dict[str, bytes]]
"""The files of each (data set, revision); a data set without files is gated."""


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def loopback_hub(repositories: Repositories) -> Iterator[str]:
    """The address of a hub that serves these, for `HF_ENDPOINT`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            wanted = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            self.answer(lambda files, rest: self.json([_entry(path, files[path]) for path in wanted]))

        def do_GET(self) -> None:
            self.answer(self.get)

        def answer(self, respond: Any) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").removeprefix("api/").split("/")
            name, kind, rest = "/".join(parts[1:3]), (parts[3:4] or ["info"])[0], "/".join(parts[4:])
            for (here, revision), files in repositories.items():
                ids = (revision, commit_of(revision))
                found = next((one for one in ids if (rest or "main") == one or rest.startswith(f"{one}/")), None)
                if here == name and found:
                    if not files and kind != "info":
                        return self.error(403, "GatedRepo")
                    self.kind, self.commit = kind, ids[1]
                    return respond(files, rest[len(found) + 1 :])
            self.error(404, "RepoNotFound")

        def get(self, files: dict[str, bytes], path: str) -> None:
            if self.kind in ("info", "revision"):
                self.json({"id": "x/y", "sha": self.commit, "siblings": [{"rfilename": file} for file in files]})
            elif self.kind == "tree":
                inside = {file: data for file, data in files.items() if file.startswith(path)}
                folders = {file[:at] for file in inside for at in range(len(file)) if file[at] == "/"}
                listed = [{"type": "directory", "path": folder, "oid": "0"} for folder in sorted(folders)]
                self.json(listed + [_entry(file, data) for file, data in inside.items()])
            elif path in files:
                self.file(files[path])
            else:
                self.error(404, "EntryNotFound")

        def file(self, data: bytes) -> None:
            size, span = len(data), self.headers.get("Range")
            if span:
                first, last = span.removeprefix("bytes=").split("-")
                begin, end = int(first), min(int(last or size), size - 1) + 1
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
                data = data[begin:end]
            else:
                self.send_response(200)
            self.send_header("ETag", '"etag"')
            self.send_header("X-Repo-Commit", self.commit)
            self.body(data)

        def json(self, value: Any) -> None:
            self.send_response(200)
            self.body(json.dumps(value).encode())

        def error(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.body(b"{}")

        def body(self, data: bytes) -> None:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    lfs = {"oid": sha256, "size": len(data), "pointerSize": 1}
    return {"type": "file", "path": path, "size": len(data), "oid": sha256[:40], "lfs": lfs}
