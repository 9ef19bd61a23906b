"""A stand-in of the Hub for uploads: what huggingface_hub asks of it, and all that it was sent.

with HubServer() as hub:
    ...                     huggingface_hub with `hub.address` as its endpoint
    hub.files["me/model"]   path -> content, after the commits
    hub.sent                every byte of every request, files decoded
"""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

USER, TOKEN = "me", "hf_test"


class HubServer:
    """One user, whose repositories are in memory."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.sent = bytearray()
        self.messages: list[str] = []
        """Of the commits."""
        self.objects: dict[str, bytes] = {}
        """Large files by sha256."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ---- what it does

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        owner = asked.get("organization") or USER
        repo = f"{owner}/{asked['name']}"
        if owner != USER:
            return 403, {"error": "you may not create it"}
        known = repo in self.files
        self.files.setdefault(repo, {})
        self.private.setdefault(repo, asked.get("visibility") == "private")
        return 409 if known else 200, {"url": f"{self.address}/{repo}"}

    def info(self, repo: str) -> tuple[int, dict[str, Any]]:
        if repo not in self.files:
            return 404, {"error": "no such repository"}
        siblings = [{"rfilename": name} for name in sorted(self.files[repo])]
        about = {"id": repo, "private": self.private[repo], "siblings": siblings, "sha": "0" * 40}
        return 200, about

    def preupload(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in asked["files"]
        ]
        return 200, {"files": files}

    def batch(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.address}/large/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def store(self, oid: str, content: bytes) -> tuple[int, dict[str, Any]]:
        assert hashlib.sha256(content).hexdigest() == oid
        self.objects[oid] = content
        return 200, {}

    def commit(self, repo: str, lines: bytes) -> tuple[int, dict[str, Any]]:
        for line in map(json.loads, lines.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                self.messages.append(value["summary"])
            elif key == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
                self.sent += self.files[repo][value["path"]]
            elif key == "lfsFile":
                self.files[repo][value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del self.files[repo][value["path"]]
        url = f"{self.address}/{repo}/commit/{'1' * 40}"
        return 200, {"success": True, "commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(body)

    do_PUT = do_POST

    def answer(self, body: bytes) -> None:
        self.hub.sent += self.requestline.encode() + bytes(self.headers) + body
        status, content = self.respond(body)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def respond(self, body: bytes) -> tuple[int, dict[str, Any]]:
        place = self.path.strip("/").split("/")
        if place[0] == "large":
            return self.hub.store(place[1], body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "who are you?"}
        if place[:2] == ["api", "repos"]:
            return self.hub.create(json.loads(body))
        if place[:2] == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if place[-1] == "batch":
            return self.hub.batch(json.loads(body))
        assert place[:2] == ["api", "models"], self.path
        repo = "/".join(place[2:4])
        if place[4:5] == ["preupload"]:
            return self.hub.preupload(json.loads(body))
        if place[4:5] == ["commit"]:
            return self.hub.commit(repo, body)
        return self.hub.info(repo)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
