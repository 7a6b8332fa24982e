"""A stand-in for the hub: the part of its API that uploads and downloads take, on this machine."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory.

    Attributes:
        files: Content by repository and path.
        commits: Messages by repository, the latest last.
    """

    def __init__(self):
        self.files, self.commits = {}, {}

    def sha(self, repo):
        return hashlib.sha1(f"{repo} {len(self.commits[repo])}".encode()).hexdigest()

    def create(self, repo):
        self.files.setdefault(repo, {})
        self.commits.setdefault(repo, [])

    def commit(self, repo, lines):
        """Apply the lines of a commit; return whether its parent is the latest one."""
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, self.sha(repo)):
            return False
        for line in lines:
            if line["key"] == "file":
                value = line["value"]
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
        self.commits[repo].append(header["summary"])
        return True


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, content=None, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def parts(self):
            return unquote(urlsplit(self.path).path).strip("/").split("/")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            endpoint = f"http://{self.headers['Host']}"
            match self.parts():
                case ["api", "repos", "create"]:
                    given = json.loads(body)
                    repo = f"{given.get('organization', 'me')}/{given['name']}"
                    hub.create(repo)
                    self.answer(200, {"url": f"{endpoint}/{repo}"})
                case ["api", "validate-yaml"]:
                    self.answer(200, {"errors": [], "warnings": []})
                case ["api", "models", user, name, "preupload", _]:
                    plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    files = [{**plain, "path": f["path"]} for f in json.loads(body)["files"]]
                    self.answer(200, {"files": files})
                case ["api", "models", user, name, "commit", _]:
                    repo = f"{user}/{name}"
                    if not hub.commit(repo, list(map(json.loads, body.splitlines()))):
                        return self.answer(412, {"error": "a commit has happened since"})
                    sha = hub.sha(repo)
                    url = f"{endpoint}/{repo}/commit/{sha}"
                    self.answer(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})
                case _:
                    self.answer(404, {"error": self.path})

        def do_GET(self):
            match self.parts():
                case ["api", "models", _, _, "tree", *_]:  # there are no folders
                    self.answer(404, {"error": self.path}, X_Error_Code="EntryNotFound")
                case ["api", "models", user, name, *_]:
                    repo = f"{user}/{name}"
                    self.answer(200, {"id": repo, "sha": hub.sha(repo)})
                case [user, name, "resolve", _, *path]:
                    repo, file = f"{user}/{name}", "/".join(path)
                    if repo not in hub.files:
                        self.answer(404, {"error": repo}, X_Error_Code="RepoNotFound")
                    elif file not in hub.files[repo]:
                        self.answer(404, {"error": file}, X_Error_Code="EntryNotFound")
                    else:
                        content = hub.files[repo][file]
                        tag = f'"{hashlib.sha1(content).hexdigest()}"'
                        self.answer(200, content, ETag=tag, X_Repo_Commit=hub.sha(repo))
                case _:
                    self.answer(404, {"error": self.path})

        do_HEAD = do_GET

    return Handler


@contextmanager
def serving(monkeypatch, cache):
    """Let huggingface_hub talk to a stand-in while this lasts.

    Args:
        monkeypatch: pytest's.
        cache: Folder for downloads.
    """
    from huggingface_hub import constants, hf_api

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    values = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)  # of functions outside classes
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
