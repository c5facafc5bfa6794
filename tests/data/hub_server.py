"""The interface of the Hugging Face hub, on loopback, from folders: what its client asks for, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_API = r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"


class Hub:
    """Pages below a folder: ``models/ORG/NAME/REVISION/…`` and ``datasets/…``, where main is the newest revision."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gated: set[str] = set()
        """Names of pages that want a login."""
        self.cut: set[str] = set()
        """Names of files whose first answer breaks off in the middle."""
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and Range header of every request."""
        self.url = ""

    def page(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        """Up until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def _answer(self, body: Any = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
        ):
            kind, name, what, revision, below = match.groups()
            if folder := self._revision(kind, name, revision or "main"):
                self._send_json(
                    self._about(name, folder) if what in (None, "revision") else self._tree(folder, below or "", body)
                )
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            prefix, name, revision, file = match.groups()
            if folder := self._revision("datasets" if prefix else "models", name, revision):
                self._send_file(folder, file)
        else:
            self._refuse(404, "", f"no such interface: {path}")

    def _revision(self, kind: str, name: str, revision: str) -> Path | None:
        """The folder of a revision, by its name or commit; else the hub's answer is given."""
        page = self.hub.page(kind, name)
        if not page.is_dir():
            return self._refuse(401, "RepoNotFound", "Repository not found")  # as the hub says, which hides private pages
        if name in self.hub.gated:
            return self._refuse(401, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted")
        for folder in page.iterdir():
            if revision in (folder.name, commit_of(folder)):
                return folder
        return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _about(self, name: str, folder: Path) -> dict[str, Any]:
        files = [{"rfilename": path.relative_to(folder).as_posix()} for path in self.hub.files(folder)]
        return {
            "_id": "0",
            "id": name,
            "sha": commit_of(folder),
            "private": False,
            "gated": False,
            "tags": [],
            "siblings": files,
        }

    def _tree(self, folder: Path, below: str, body: Any) -> list[dict[str, Any]]:
        wanted = None if body is None else set(body.get("paths", []))
        entries: list[dict[str, Any]] = []
        for path in sorted((folder / below).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if wanted is None or name in wanted:
                kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory", "size": 0}
                entries.append({"path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), **kind})
        return entries

    def _send_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", f"Entry not found: {name}")
        data = path.read_bytes()
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(given[1]), int(given[2]) + 1 if given[2] else len(data)) if given else (0, len(data))
        part = data[start:stop]
        self.send_response(206 if given else 200)
        self.send_header("X-Repo-Commit", commit_of(folder))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if given:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if path.name in self.hub.cut:
            self.hub.cut.remove(path.name)
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(1)
        else:
            self.wfile.write(part)
        return None

    def _refuse(self, status: int, code: str, message: str) -> None:
        data = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
