"""A server with those paths of the Hugging Face Hub that huggingface_hub requests to download and to upload."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
INFO = re.compile(r"/api/models/(.+)/revision/main")
UPLOAD = re.compile(r"/api/models/(.+)/(preupload|commit)/main")
LARGE = (".safetensors", ".bin")  # named by their SHA-256, and served by another host, like the Hub's large files


class Hub(ThreadingHTTPServer):
    """revisions: of each repository, oldest first: (commit, tags, files). requests: the paths requested so far."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.revisions, self.requests = {}, []
        self.sent = lambda content: content  # what arrives when `content` is sent

    def push(self, repository, files, *tags):
        """Add a revision, the new main. Return its commit."""
        revisions = self.revisions.setdefault(repository, [])
        commit = hashlib.sha1(repr((len(revisions), files)).encode()).hexdigest()
        revisions.append((commit, tags, files))
        return commit

    def find(self, repository, name):
        """Return (commit, files) of a revision, or None."""
        for commit, tags, files in reversed(self.revisions[repository]):
            if name in ("main", commit, *tags):
                return commit, files
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status=200, content=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.server.sent(content))

    def reply_json(self, **answer):
        self.reply(content=json.dumps(answer).encode(), Content_Type="application/json")

    def do_GET(self):
        hub = self.server
        hub.requests.append(self.path)
        if self.path.startswith("/large/"):
            _, _, repository, commit, path = self.path.split("/", 4)
            return self.reply(content=hub.find(repository.replace("--", "/"), commit)[1][path])
        if match := INFO.match(self.path):
            return self.reply_json(id=match[1], xetEnabled=False)
        match = RESOLVE.fullmatch(self.path)
        if not match or match[1] not in hub.revisions:
            return self.reply(404, X_Error_Code="RepoNotFound")
        repository, name, path = match.groups()
        if not (found := hub.find(repository, name)):
            return self.reply(404, X_Error_Code="RevisionNotFound")
        commit, files = found
        if path not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[path]
        if path.endswith(LARGE):
            elsewhere = f"http://localhost:{hub.server_port}/large/{repository.replace('/', '--')}/{commit}/{path}"
            digest = f'"{hashlib.sha256(content).hexdigest()}"'
            linked = {"X_Linked_Etag": digest, "X_Linked_Size": len(content), "Location": elsewhere}
            return self.reply(302, X_Repo_Commit=commit, **linked)
        digest = hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()
        self.reply(content=content, ETag=f'"{digest}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def do_POST(self):
        hub = self.server
        hub.requests.append(self.path)
        lines = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        answer = {"errors": [], "warnings": []}  # of /api/validate-yaml
        if self.path == "/api/repos/create":
            answer = {"url": f"{hub.endpoint}/{lines[0]['organization']}/{lines[0]['name']}"}
        elif match := UPLOAD.fullmatch(self.path):
            if match[2] == "preupload":
                kinds = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": file["path"]} | kinds for file in lines[0]["files"]]}
            else:
                files = [line["value"] for line in lines if line["key"] == "file"]
                files = {file["path"]: base64.b64decode(file["content"]) for file in files}
                answer = {
                    "commitOid": hub.push(match[1], files),
                    "commitUrl": f"{hub.endpoint}/{match[1]}/commit/main",
                    "success": True,
                }
        self.reply_json(**answer)


@contextmanager
def serving():
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
