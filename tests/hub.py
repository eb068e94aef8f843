"""A Hub on this machine: the endpoints that `huggingface_hub` calls to push and to pull, with faults on demand.

Everything is in memory. Large files go through Git LFS to a second host name, as on the real Hub; Xet is not spoken
(set HF_HUB_DISABLE_XET=1). A pass here shows that the protocol's shape is right, not that the real Hub accepts it.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".tif")
REPO = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"


@dataclass
class Repo:
    """Files by path at every commit; the last commit is `main`."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def commit(self, files: dict[str, bytes]) -> str:
        facts = repr([len(self.commits), *((path, hashlib.sha1(files[path]).hexdigest()) for path in sorted(files))])
        self.commits.append((hashlib.sha1(facts.encode()).hexdigest(), files))
        return self.head

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        wanted = self.head if revision == "main" else self.tags.get(revision, revision)
        return dict(self.commits).get(wanted)

    def sha(self, revision: str) -> str:
        return self.head if revision == "main" else self.tags.get(revision, revision)


@dataclass
class Fault:
    """What to do to the next `times` requests that match.

    `what`: a status to answer with, "timeout" (never answered), "cut" (the connection closes half-way), "lost" (done,
    but the answer is cut off) or "corrupt" (one byte comes out wrong, and nobody says so).
    """

    method: str
    path: str
    what: int | str
    times: int = 1


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; tokens say who may write where."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.store: dict[str, bytes] = {}
        self.tokens = {"hf_alice": ("alice", ("alice", "lab")), "hf_reader": ("reader", ())}
        self.faults: list[Fault] = []
        self.met: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.port = self.server.server_address[1]
        self.url, self.storage = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, path: str, what: int | str, times: int = 1) -> None:
        self.faults.append(Fault(method, path, what, times))

    def files(self, repo_id: str, kind: str = "models") -> dict[str, bytes]:
        return self.repos[kind, repo_id].files()

    def environment(self, home, token: str | None = "hf_alice") -> dict[str, str]:
        """What a fresh process needs to talk to this Hub alone."""
        secret = {"HF_TOKEN": token} if token else {}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), **secret, **quiet}

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    self.met.append(fault)
                    return fault
        return None


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: else every answer waits 40 ms for the first
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/(?P<kind>datasets/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", r"/lfs/(?P<oid>\w+)", "lfs_get"),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"{API}/tag/(?P<revision>[^/]+)", "tag"),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"/(?P<kind>datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_) -> None:
        pass

    def do(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        fault = hub.next_fault(self.command, path)
        what = fault.what if fault else None
        self.corrupt, self.lost = what == "corrupt", what == "lost"
        if what == "timeout":
            hub.closing.wait(60)
        if what in ("timeout", "cut"):
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self.hang_up()
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if isinstance(what, int):
                raise RefusedError(what, "a fault that the test asked for")
            with hub.lock:
                self.route(hub, path)
        except RefusedError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self.answer({"error": str(error)}, error.status, {**headers, "X-Error-Message": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do  # noqa: N815

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def route(self, hub: Hub, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                found = {key: value or "main" for key, value in match.groupdict().items() if key != "kind"}
                if "kind" in match.groupdict():
                    found["kind"] = (match["kind"] or "models").rstrip("/")
                return getattr(self, name)(hub, **found)
        raise RefusedError(404, f"no such endpoint: {self.command} {path}")

    def answer(self, body: dict | list | bytes, status: int = 200, headers: dict | None = None) -> None:
        if self.lost:
            return self.hang_up()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(_spoiled(data) if self.corrupt else data)

    # --- who may do what -----------------------------------------------------------------------------------------

    def user(self, hub: Hub) -> tuple[str, tuple[str, ...]]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return hub.tokens[token]

    def may_write(self, hub: Hub, namespace: str) -> None:
        if namespace not in self.user(hub)[1]:
            raise RefusedError(403, f"You don't have the rights to write under the namespace {namespace!r}.")

    def repo(self, hub: Hub, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        repo = hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(hub, repo_id.split("/")[0])
        return repo

    def whoami(self, hub: Hub) -> None:
        name, places = self.user(hub)
        self.answer({"type": "user", "name": name, "orgs": [{"name": place} for place in places if place != name]})

    def create(self, hub: Hub) -> None:
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.user(hub)[0]
        self.may_write(hub, namespace)
        key = (asked.get("type") or "model") + "s", f"{namespace}/{asked['name']}"
        url = f"{hub.url}/{'' if key[0] == 'models' else key[0] + '/'}{key[1]}"
        if key in hub.repos:
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        repo = hub.repos[key] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer({"url": url, "name": key[1]})

    def delete(self, hub: Hub) -> None:
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.user(hub)[0]
        key = (asked.get("type") or "model") + "s", f"{namespace}/{asked['name']}"
        self.repo(hub, *key, write=True)
        del hub.repos[key]
        self.answer({})

    def validate(self, hub: Hub) -> None:
        content = json.loads(self.body)["content"]
        wrong = [] if content.startswith("---\n") else [{"message": "the card has no metadata"}]
        self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    # --- push ----------------------------------------------------------------------------------------------------

    def preupload(self, hub: Hub, kind: str, id: str, revision: str) -> None:
        present = self.repo(hub, kind, id, write=True).files(revision)
        self.answer({"files": [_upload_mode(file["path"], present) for file in json.loads(self.body)["files"]]})

    def lfs_batch(self, hub: Hub, kind: str, id: str) -> None:
        self.repo(hub, kind, id, write=True)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for wanted in objects:
            if wanted["oid"] not in hub.store:
                upload, verify = f"{hub.storage}/lfs/{wanted['oid']}", f"{hub.url}/lfs/verify"
                wanted["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, hub: Hub, oid: str) -> None:
        hub.store[oid] = _spoiled(self.body) if self.corrupt else self.body
        self.answer(b"")

    def lfs_verify(self, hub: Hub) -> None:
        wanted = json.loads(self.body)
        if hashlib.sha256(hub.store.get(wanted["oid"], b"")).hexdigest() != wanted["oid"]:
            hub.store.pop(wanted["oid"], None)
            raise RefusedError(400, "wrong checksum")
        self.answer({})

    def commit(self, hub: Hub, kind: str, id: str, revision: str) -> None:
        repo = self.repo(hub, kind, id, write=True)
        files = dict(repo.files())
        for line in self.body.splitlines():
            value = json.loads(line)["value"]
            match json.loads(line)["key"]:
                case "header" if value.get("parentCommit", repo.head) != repo.head:
                    raise RefusedError(412, "A commit has happened since.")
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile" if value["oid"] not in hub.store:
                    raise RefusedError(400, f"LFS object {value['oid']} was never uploaded")
                case "lfsFile":
                    files[value["path"]] = hub.store[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = repo.commit(files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{id}/commit/{oid}"})

    def tag(self, hub: Hub, kind: str, id: str, revision: str) -> None:
        repo = self.repo(hub, kind, id, write=True)
        repo.tags[json.loads(self.body)["tag"]] = repo.sha(revision)
        self.answer({})

    # --- pull ----------------------------------------------------------------------------------------------------

    def at(self, hub: Hub, kind: str, id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(hub, kind, id)
        files = repo.files(revision)
        if files is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.sha(revision), files

    def info(self, hub: Hub, kind: str, id: str, revision: str) -> None:
        sha, files = self.at(hub, kind, id, revision)
        private = self.repo(hub, kind, id).private
        self.answer({"id": id, "sha": sha, "private": private, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, hub: Hub, kind: str, id: str, revision: str) -> None:
        _, files = self.at(hub, kind, id, revision)
        self.answer([_entry(path, data) for path, data in files.items()])

    def resolve(self, hub: Hub, kind: str, id: str, revision: str, path: str) -> None:
        sha, files = self.at(hub, kind, id, revision)
        if path not in files:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data, headers = files[path], {"X-Repo-Commit": sha}
        if not path.endswith(LFS_SUFFIXES):
            return self.answer(data, headers={**headers, "ETag": f'"{_blob(data)}"'})
        oid = next((oid for oid, stored in hub.store.items() if stored is data), hashlib.sha256(data).hexdigest())
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return self.answer(b"", 302, {**headers, **linked, "Location": f"{hub.storage}/lfs/{oid}"})

    def lfs_get(self, hub: Hub, oid: str) -> None:
        data = hub.store[oid]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(match[1]) if match else 0
        stop = min(int(match[2]) + 1 if match and match[2] else len(data), len(data))
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"} if match else {}
        self.answer(data[start:stop], 206 if match else 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", **span})


def _blob(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _upload_mode(path: str, present: dict[str, bytes]) -> dict:
    large = path.endswith(LFS_SUFFIXES)
    data = present.get(path)
    oid = None if data is None else hashlib.sha256(data).hexdigest() if large else _blob(data)
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _spoiled(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


@contextmanager
def talking_to(hub: Hub, monkeypatch, tmp_path, token: str | None = "hf_alice"):
    """This process' `huggingface_hub`, already imported, pointed at `hub`."""
    from huggingface_hub import constants

    for name, value in hub.environment(tmp_path / "hf", token).items():
        monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
