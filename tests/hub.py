"A stand-in of the Hugging Face hub: repositories in memory, at the addresses of the real one."
import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_of_the_tests"

class Hub:
    "What the stand-in holds, and what it was asked."
    def __init__(self):
        self.repos = {}       # USER/NAME -> {file: bytes}
        self.private = set()  # names of those that were made private
        self.asked = []       # "METHOD path", in order
        self.refusal = None   # a status that answers everything
        self.address = None   # http://127.0.0.1:PORT

    def commit(self, repo):
        "A number of the commit, made from what the repository holds."
        digest = hashlib.sha1()
        for name, data in sorted(self.repos[repo].items()): digest.update(name.encode() + data)
        return digest.hexdigest()

    def create(self, asked):
        repo = f"{asked['organization']}/{asked['name']}"
        known = {"url": f"{self.address}/{repo}", "name": repo}
        if repo in self.repos: return 409, {"error": "You already created this model repo", **known}
        self.repos[repo] = {}
        if asked.get("private") or asked.get("visibility") == "private": self.private.add(repo)
        return 200, known

    def upload(self, repo, lines):
        for line in map(json.loads, lines.splitlines()):
            if line["key"] != "file": continue
            assert line["value"]["encoding"] == "base64"
            self.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self.commit(repo)
        url = f"{self.address}/{repo}/commit/{commit}"
        return 200, {"success": True, "commitOid": commit, "commitUrl": url}

    def answer(self, path, body):
        "(status, JSON) for what is sent to the interface."
        if path == "/api/repos/create": return self.create(json.loads(body))
        if path == "/api/validate-yaml": return 200, {"errors": [], "warnings": []}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not found or found[1] not in self.repos: return 404, {"error": "Repository not found"}
        if found[2] == "commit": return self.upload(found[1], body)
        paths = [file["path"] for file in json.loads(body)["files"]]
        regular = {"uploadMode": "regular", "shouldIgnore": False}
        return 200, {"files": [{"path": path, **regular} for path in paths]}

    def file(self, path):
        "(its bytes, the commit) of a file that is asked for; nothing where there is none."
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found: return None
        repo, revision, name = found.groups()
        data = self.repos.get(repo, {}).get(name)
        known = data is not None and revision in ("main", self.commit(repo))
        return (data, self.commit(repo)) if known else None

def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *said): pass

        def send(self, status, data, kind="application/json", **headers):
            self.send_response(status)
            every = {"Content-Type": kind, "Content-Length": len(data), **headers}
            for name, value in every.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD": self.wfile.write(data)

        def refused(self):
            hub.asked.append(f"{self.command} {self.path}")
            if hub.refusal is None: return False
            self.send(hub.refusal, b'{"error": "refused"}')
            return True

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.refused(): return
            known = self.headers["Authorization"] == f"Bearer {TOKEN}"
            if not known: return self.send(401, b'{"error": "who?"}')
            status, said = hub.answer(self.path, body)
            self.send(status, json.dumps(said).encode())

        def do_GET(self):
            if self.refused(): return
            found = hub.file(self.path)
            if not found: return self.send(404, b"", X_Error_Code="EntryNotFound")
            data, commit = found
            etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self.send(200, data, "application/octet-stream", ETag=f'"{etag}"', X_Repo_Commit=commit)

        do_HEAD = do_GET
    return Handler

@contextmanager
def serve():
    "A `Hub` that answers while it is entered; tests set HF_ENDPOINT to its `address`."
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
