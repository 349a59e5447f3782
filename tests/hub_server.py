"""A Hugging Face Hub for tests: as much of its HTTP interface as down- and uploading takes, on this machine only."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """Serves repositories from memory at `endpoint`; use as a context manager.

    Attributes:
        requests: The requests for files, as "METHOD path"; the client also asks about itself, which is not counted.
        served: What is really sent for a file name, where that is not what the repository holds; its announced size
            and hash stay those of the repository's file.
        token: If set, a request without it is answered as if the repository did not exist.
        messages: Of the commits that were uploaded.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Mapping[str, bytes]]] = {}
        self.requests: list[str] = []
        self.served: dict[str, bytes] = {}
        self.token: str | None = None
        self.messages: list[str] = []
        self._large: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self, with_body=False)

            def do_GET(self) -> None:
                hub._answer(self, with_body=True)

            def do_POST(self) -> None:
                hub._take(self)

            def do_PUT(self) -> None:
                hub._take(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo_id: str, files: Mapping[str, bytes]) -> str:
        """Adds a commit with these files to a repository's main branch and returns its hash."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.repos.setdefault(repo_id, {}).update({commit: files, "main": files})
        return commit

    def _answer(self, handler: BaseHTTPRequestHandler, with_body: bool) -> None:
        match = re.fullmatch(r"/(.+)/resolve/([^/]+)/([^?]+)(\?.*)?", handler.path)
        if match:
            self.requests.append(f"{handler.command} {handler.path}")
        repo = self.repos.get(match[1]) if match else None
        allowed = self.token is None or handler.headers.get("Authorization") == f"Bearer {self.token}"
        if match is None or repo is None or not allowed:
            return self._refuse(handler, "RepoNotFound")
        if match[2] not in repo:
            return self._refuse(handler, "RevisionNotFound")
        files = repo[match[2]]
        commit = next(commit for commit, held in repo.items() if held is files and re.fullmatch("[0-9a-f]{40}", commit))
        if match[3] not in files:
            return self._refuse(handler, "EntryNotFound", {"X-Repo-Commit": commit})
        held = files[match[3]]
        sent = self.served.get(match[3], held)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(held).hexdigest()}"'}
        if match[3].endswith((".safetensors", ".pt")):  # the Hub keeps large files apart, under their sha256
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(held).hexdigest()}"', "X-Linked-Size": str(len(held))}
        self._send(handler, 200, headers, sent, with_body)

    def _take(self, handler: BaseHTTPRequestHandler) -> None:
        """What an upload consists of: make the repository, ask how to send each file, send the large ones, commit."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if handler.path == "/api/validate-yaml":
            return self._reply(handler, {"errors": [], "warnings": []})
        self.requests.append(f"{handler.command} {handler.path}")
        if handler.path.startswith("/large/"):
            self._large[handler.path.removeprefix("/large/")] = body
            return self._reply(handler, {})
        if self.token is not None and handler.headers.get("Authorization") != f"Bearer {self.token}":
            return self._reply(handler, {"error": "Invalid username or password."}, 401)
        if handler.path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if repo_id in self.repos:
                return self._reply(handler, {"error": "exists", "url": f"{self.endpoint}/{repo_id}"}, 409)
            self.repos[repo_id] = {"main": {}}
            return self._reply(handler, {"url": f"{self.endpoint}/{repo_id}"})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", handler.path):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.endpoint}/large/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self._reply(handler, {"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main(\?.*)?", handler.path)
        if match is None or match[1] not in self.repos:
            return self._refuse(handler, "RepoNotFound")
        if match[2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file in json.loads(body)["files"]
                for mode in ("lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",)
            ]
            return self._reply(handler, {"files": files})
        held = dict(self.repos[match[1]]["main"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self._large[value["oid"]]
        commit = self.commit(match[1], held)
        url = f"{self.endpoint}/{match[1]}/commit/{commit}"
        self._reply(handler, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _reply(self, handler: BaseHTTPRequestHandler, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self._send(handler, status, {"Content-Type": "application/json"}, body, True)

    def _refuse(self, handler: BaseHTTPRequestHandler, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(handler, 404, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": code}, b"", False)

    @staticmethod
    def _send(
        handler: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], body: bytes, with_body: bool
    ) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if with_body:
            handler.wfile.write(body)
