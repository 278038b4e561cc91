"""The calls of the Hugging Face hub that uploading a folder, listing it and downloading a commit need, on a local port.

Files go through the commit itself or through LFS' basic transfer, as with the hub; Xet storage is not offered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote


class HubServer(ThreadingHTTPServer):
    """repositories: name -> whether it is private. files: name -> path -> content. lose: paths that are not kept.

    commits: name -> commit -> path -> content, the newest last, for downloads; that of a data set begins with datasets/."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str, str]] = []
        self.lose: set[str] = set()
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}

    @property
    def url(self) -> str:
        """Of the server."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server without repositories."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._body()
        if self._download():
            return
        if not (match := re.match(r"/api/models/([^/?]+/[^/?]+)(/revision/main)?(\?|$)", self.path)):
            return self._answer(404, {"error": self.path}, {"X-Error-Code": "RepoNotFound"})
        name = match.group(1)
        if name not in self.server.repositories:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path, "size": len(content)} for path, content in self.server.files[name].items()]
        about = {"id": name, "modelId": name, "private": self.server.repositories[name], "sha": "0" * 40}
        self._answer(200, about | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _download(self) -> bool:
        """Answer calls about `commits`."""
        found = re.match(
            r"/(api/models/|api/datasets/|datasets/|)([^/]+/[^/]+)/?(.*)", unquote(self.path.partition("?")[0])
        )
        name = f"{'datasets/' if 'datasets' in found[1] else ''}{found[2]}" if found else ""
        if found is None or name not in self.server.commits:
            return False
        commits = self.server.commits[name]
        what, commit, inside = [*found[3].split("/", 2), "", ""][:3]
        commit = next(reversed(commits)) if commit in ("", "main") else commit
        if commit not in commits:
            self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            self._list(commits[commit], inside)
        elif what == "resolve" and inside not in commits[commit]:
            self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif what == "resolve":
            content = commits[commit][inside]
            self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})
        else:
            about = {"id": found[2], "sha": commit, "siblings": [], "tags": [], "downloads": 0, "likes": 0}
            self._answer(200, about | {"private": False, "gated": False, "disabled": False})
        return True

    def _list(self, files: dict[str, bytes], inside: str) -> None:
        """The files below a folder and, as the hub does, the folders they are in."""
        below = {path: content for path, content in files.items() if not inside or path.startswith(f"{inside}/")}
        if not below:
            return self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        listed = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in below.items()
        ]
        folders = {str(one) for path in below for one in PurePosixPath(path).parents} - {".", inside}
        listed += [{"type": "directory", "path": one, "size": 0, "oid": "0" * 40} for one in sorted(folders)]
        if "recursive=true" not in self.path.lower():
            listed = [one for one in listed if str(PurePosixPath(str(one["path"])).parent) == (inside or ".")]
        self._answer(200, listed)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else f"user/{given['name']}"
            if name in self.server.repositories:
                return self._answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            self.server.repositories[name], self.server.files[name] = given.get("visibility") == "private", {}
            return self._answer(200, {"url": f"{self.server.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._answer(200, self._lfs(json.loads(body)), {"Content-Type": "application/vnd.git-lfs+json"})
        if match := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            return self._commit(match.group(1), body)
        return self._answer(404, {"error": self.path})

    def _lfs(self, given: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {"oid": one["oid"], "size": one["size"]}
            | {"actions": {"upload": {"href": f"{self.server.url}/objects/{one['oid']}"}}}
            for one in given["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                content = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
            else:
                continue
            if value["path"] not in self.server.lose:
                self.server.files[name][value["path"]] = content
        commit = {"commitUrl": f"{self.server.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        self._answer(200, commit | {"hookOutput": "", "success": True})

    def _body(self) -> bytes:
        self.server.calls.append((self.command, self.path, self.headers.get("Authorization", "")))
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, code: int, document: Any, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(document).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
