"""One HTTP server on loopback that speaks as a Hugging Face hub, as ModelScope, as an S3 store and
as a plain web server, so that the real clients run; with the faults that networks have.

    with serve_hubs() as hubs:
        commit = hubs.add_repository("me/data", {"train.jsonl": b"…"})
        hubs.files["a.zip"] = b"…"                 # http://…/files/a.zip
        hubs.buckets["bucket"] = {"a/b": b"…"}
        hubs.breaks["a.zip"] = [5]                 # its next answer stops after 5 bytes
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

LFS_BYTES = 1000  # files from this size on are in LFS, as large ones are on a hub
PAGE = 3  # files in a page of a listing: paging is met with few files


@dataclass
class Repository:
    """Commits by their hash, branches by name; `token` is asked for where it is set."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    is_gated: bool = False


@dataclass
class Hubs:
    """What is served, what goes wrong, and what was asked for."""

    url: str = ""
    cdn_url: str = ""  # another host, to which a client must not send its token
    repositories: dict[str, Repository] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    buckets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    statuses: list[int] = field(default_factory=list)  # of the next answers, in place of content
    breaks: dict[str, list[int]] = field(default_factory=dict)  # name → where its answers stop
    damaged: set[str] = field(default_factory=set)  # names whose bytes come out wrong
    bytes_per_s: float | None = None
    delay_s: float = 0.0
    speaks_range: bool = True

    def add_repository(
        self, name: str, files: dict[str, bytes], *, kind: str = "datasets", branch: str = "main"
    ) -> str:
        """Commit these files to a branch; the commit's hash."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository())
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = repository.branches["master"] = commit
        return commit

    def bodies(self, name: str) -> list[tuple[str, str, str]]:
        """The GET requests for the content of a file."""
        return [one for one in self.requests if one[0] == "GET" and one[1].endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    hubs: Hubs
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET()

    def do_GET(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: one[0] for key, one in parse_qs(url.query).items()}
        file_path = query.get("FilePath", "")
        wanted = self.headers.get("Range", "")
        self.hubs.requests.append((self.command, f"{path}{file_path and '/' + file_path}", wanted))
        time.sleep(self.hubs.delay_s)
        if self.hubs.statuses:
            self._send(self.hubs.statuses.pop(0), b"try again", {"Retry-After": "0"})
            return
        routes = [
            (r"/api/(datasets|models)/(.+?)/tree/([^/]+)", self._hf_tree),
            (r"/api/(datasets|models)/(?!.*/tree/)(.+?)(?:/revision/(.+))?", self._hf_info),
            (r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._hf_resolve),
            (r"/api/v1/(datasets|models)/(.+)/repo/(?:tree|files)", self._modelscope_tree),
            (r"/api/v1/(datasets|models)/(.+)/repo", self._modelscope_file),
            (r"/files/(.+)", self._plain),
            (r"/cdn/([0-9a-f]+)/(.+)", self._cdn),
            (r"/([^/]+)/?(.*)", self._s3),
        ]
        for pattern, answer in routes:
            if path.startswith("/api/v1/") and "v1" not in pattern:
                continue
            if found := re.fullmatch(pattern, path):
                answer(*found.groups(), query=query)
                return
        self._send(404, b"")

    # -- Hugging Face ----------------------------------------------------------------------------

    def _hf_repository(self, kind: str | None, name: str, revision: str | None):
        repository = self.hubs.repositories.get(f"{kind or 'models'}/{name}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token and token != repository.token):
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if repository.is_gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        commit = repository.branches.get(revision or "main", revision or "main")
        if commit not in repository.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repository.commits[commit]

    def _hf_info(self, kind: str, name: str, revision: str | None, *, query: dict) -> None:
        if found := self._hf_repository(kind, name, revision):
            commit, files = found
            info = {"id": name, "sha": commit, "siblings": [{"rfilename": one} for one in files]}
            self._json(info)

    def _hf_tree(self, kind: str, name: str, revision: str, *, query: dict) -> None:
        if not (found := self._hf_repository(kind, name, revision)):
            return
        entries = []
        for path, data in sorted(found[1].items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": _git_blob(data)}
            if len(data) >= LFS_BYTES:
                entry["oid"] = _git_blob(b"a pointer to " + _sha256(data).encode())
                entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        folders = {path.rpartition("/")[0] for path in found[1]} - {""}
        entries += [{"type": "directory", "path": one, "oid": "0" * 40} for one in sorted(folders)]
        start = int(query.get("cursor", 0))
        more = f"<{self.hubs.url}{urlsplit(self.path).path}?recursive=True&cursor={start + PAGE}>"
        links = {"Link": f'{more}; rel="next"'} if start + PAGE < len(entries) else {}
        self._json(entries[start : start + PAGE], links)

    def _hf_resolve(
        self, kind: str | None, name: str, revision: str, path: str, *, query: dict
    ) -> None:
        if not (found := self._hf_repository(kind, name, revision)):
            return
        commit, files = found
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif len(files[path]) >= LFS_BYTES:  # large files lie with a CDN that knows no tokens
            where = f"{self.hubs.cdn_url}/cdn/{commit}/{quote(name)}/{quote(path)}"
            digest = _sha256(files[path])
            headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "Location": where}
            self._send(302, b"", headers)
        else:
            self._content(path, files[path], {"X-Repo-Commit": commit})

    def _cdn(self, commit: str, path: str, *, query: dict) -> None:
        if "Authorization" in self.headers:
            self._send(400, b"a signed address takes no token")
            return
        for repository in self.hubs.repositories.values():
            for name, data in repository.commits.get(commit, {}).items():
                if path.endswith(f"/{name}"):
                    self._content(name, data)
                    return
        self._send(404, b"")

    # -- ModelScope ------------------------------------------------------------------------------

    def _modelscope_files(self, kind: str, name: str, revision: str) -> dict[str, bytes] | None:
        repository = self.hubs.repositories.get(f"{kind}/{name}")
        token = "m_session_id=" + (repository.token or "" if repository else "")
        commit = repository.branches.get(revision, revision) if repository else ""
        if repository is None or commit not in repository.commits:
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, status=404)
        elif repository.token and token not in self.headers.get("Cookie", ""):
            self._json({"Code": 10010205002, "Message": "denied", "Success": False}, status=403)
        else:
            return repository.commits[commit]
        return None

    def _modelscope_tree(self, kind: str, name: str, *, query: dict) -> None:
        files = self._modelscope_files(kind, name, query["Revision"])
        if files is None:
            return
        entries = [
            {"Path": path, "Name": path, "Type": "blob", "Size": len(data), "Sha256": _sha256(data)}
            for path, data in sorted(files.items())
        ]
        page, size = int(query.get("PageNumber", 1)), int(query.get("PageSize", 1000))
        self._json({"Code": 200, "Data": {"Files": entries[(page - 1) * size : page * size]}})

    def _modelscope_file(self, kind: str, name: str, *, query: dict) -> None:
        files = self._modelscope_files(kind, name, query["Revision"])
        if files is not None:
            self._content(query["FilePath"], files[query["FilePath"]])

    # -- plain files and S3 ----------------------------------------------------------------------

    def _plain(self, name: str, *, query: dict) -> None:
        if name.startswith("moved/"):
            self._send(302, b"", {"Location": f"/files/{name.removeprefix('moved/')}"})
        elif name in self.hubs.files:
            self._content(name, self.hubs.files[name])
        else:
            self._send(404, b"")

    def _s3(self, bucket: str, key: str, *, query: dict) -> None:
        objects = self.hubs.buckets.get(bucket)
        if objects is None or (key and key not in objects):
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif key:
            self._content(key, objects[key], {"Last-Modified": "Sat, 01 Nov 2025 00:00:00 GMT"})
        else:
            prefix = query.get("prefix", "")
            items = "".join(
                f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size>"
                f"<ETag>&quot;{hashlib.md5(data).hexdigest()}&quot;</ETag>"
                "<LastModified>2025-11-01T00:00:00.000Z</LastModified></Contents>"
                for name, data in sorted(objects.items())
                if name.startswith(prefix)
            )
            count = items.count("<Key>")
            text = (
                f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
                f"<KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys>"
                f"<IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
            )
            self._send(200, text.encode(), {"Content-Type": "application/xml"})

    # -- answers ---------------------------------------------------------------------------------

    def _content(self, name: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        """A file, or the part of it that `Range` asks for (unless `If-Range` names another)."""
        headers = {"ETag": f'"{_sha256(data)}"', "Accept-Ranges": "bytes", **(headers or {})}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        changed = self.headers.get("If-Range", headers["ETag"]) != headers["ETag"]
        status, total = 200, len(data)
        if name in self.hubs.damaged:
            data = bytes(byte ^ 1 for byte in data)
        if asked and self.hubs.speaks_range and not changed:
            start, end = int(asked[1]), min(int(asked[2] or total), total - 1)
            if start >= total:
                self._send(416, b"", {"Content-Range": f"bytes */{total}"})
                return
            status, data = 206, data[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
        breaks = self.hubs.breaks.get(name) if self.command == "GET" else None
        self._send(status, data, headers, stop=breaks.pop(0) if breaks else None)

    def _json(self, value: object, headers: dict | None = None, *, status: int = 200) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._send(status, json.dumps(value).encode(), headers)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        stop: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if stop is not None:
            body, self.close_connection = body[:stop], True
        step = int(self.hubs.bytes_per_s / 20) if self.hubs.bytes_per_s else len(body) or 1
        for start in range(0, len(body), step):
            try:
                self.wfile.write(body[start : start + step])
            except OSError:  # the client was killed
                return
            if self.hubs.bytes_per_s:
                time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve_hubs() -> Iterator[Hubs]:
    """Serve on a free port of loopback until the block ends."""
    hubs = Hubs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hubs": hubs}))
    server.daemon_threads = True
    hubs.url = f"http://127.0.0.1:{server.server_address[1]}"
    hubs.cdn_url = hubs.url.replace("127.0.0.1", "localhost")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hubs
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
