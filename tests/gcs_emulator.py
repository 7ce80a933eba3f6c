"""A small Google Cloud Storage on loopback, in memory: the JSON API that gcsfs, TensorStore and Google's client use.

Objects have generations, and requests their preconditions (ifGenerationMatch and its likes); listings come in pages.
Tests may slow it down, make it refuse requests, or take it off the network for a while. Run as a script, it serves
until it is ended: `python tests/gcs_emulator.py PORT BUCKET...`.
"""

import base64
import bisect
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import itertools
import json
import re
import socket
import sys
import threading
import time
import urllib.parse
import uuid

PAGE = 1000  # objects of a listing


@dataclasses.dataclass(frozen=True)
class Stored:
    data: bytes
    generation: int
    time: str


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status, message=""):
        super().__init__(message)
        self.status = status


class Emulator:
    """The buckets, and the server of them.

    Attributes:
      latency: seconds that are added to every request.
      fault: (method, "bucket/name") -> a status to refuse the request with, or None.
      requests: (method, "bucket/name", kind) of every request so far; kind: data, meta, list, write, delete.
    """

    def __init__(self, *buckets, port=0):
        self._buckets = {bucket: {} for bucket in buckets}
        self._lock = threading.RLock()
        self._generations = itertools.count(int(time.time() * 1e6))
        self._uploads = {}  # of resumable sessions
        self._sorted, self._changed = {}, set()  # names of each bucket in order, and buckets where they are others now
        self.latency, self.fault, self.requests = 0.0, lambda method, name: None, []
        self._port, self._server = port, None
        self.come_back()

    # --- For tests -----------------------------------------------------------------------------------------------

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self):
        """What makes clients talk to it, without credentials."""
        return {"STORAGE_EMULATOR_HOST": self.url, "NO_GCE_CHECK": "true", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x"}

    def go_away(self):
        """Connections are refused, and open ones end."""
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        for connection in list(server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def come_back(self):
        server = _Server(("127.0.0.1", self._port), _Handler)
        server.emulator, self._port, self._server = self, server.server_address[1], server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        if self._server is not None:
            self.go_away()

    def names(self, bucket, prefix=""):
        with self._lock:
            return sorted(name for name in self._buckets[bucket] if name.startswith(prefix))

    def read(self, bucket, name):
        return self._buckets[bucket][name].data

    def write(self, bucket, name, data):
        self.put(bucket, name, data, {})

    def make_bucket(self, bucket):
        self._buckets[bucket] = {}

    def export(self, bucket, prefix, directory):
        """Writes the objects whose names begin with a prefix as files; returns the directory."""
        for name in self.names(bucket, prefix):
            file = directory / name.removeprefix(prefix).lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(bucket, name))
        return directory

    def age(self, bucket, name, seconds):
        """Makes an object so many seconds older."""
        stored = self._buckets[bucket][name]
        time_of = datetime.datetime.fromisoformat(stored.time) - datetime.timedelta(seconds=seconds)
        self._buckets[bucket][name] = dataclasses.replace(stored, time=_stamp(time_of))

    # --- Objects -------------------------------------------------------------------------------------------------

    def objects(self, bucket):
        if bucket not in self._buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self._buckets[bucket]

    def get(self, bucket, name, query):
        stored = self.objects(bucket).get(name)
        _check(stored, query, reading=True)
        if stored is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return stored

    def put(self, bucket, name, data, query):
        with self._lock:
            objects = self.objects(bucket)
            _check(objects.get(name), query)
            now = _stamp(datetime.datetime.now(datetime.UTC))
            if name not in objects:
                self._changed.add(bucket)
            objects[name] = Stored(bytes(data), next(self._generations), now)
            return self.describe(bucket, name)

    def delete(self, bucket, name, query):
        with self._lock:
            self.get(bucket, name, query)
            del self._buckets[bucket][name]
            self._changed.add(bucket)

    def describe(self, bucket, name, stored=None):
        stored = stored or self._buckets[bucket][name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(stored.data)),
            "generation": str(stored.generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
            "timeCreated": stored.time,
            "updated": stored.time,
            "storageClass": "STANDARD",
            "contentType": "application/octet-stream",
        }

    def listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        most, after = min(int(query.get("maxResults", PAGE)), PAGE), query.get("pageToken", "")
        with self._lock:
            objects = self.objects(bucket)
            if len(self._sorted.get(bucket, ())) != len(objects) or bucket in self._changed:
                self._sorted[bucket] = sorted(objects)
                self._changed.discard(bucket)
            names = self._sorted.get(bucket, [])
        items, prefixes, last, token = [], [], "", None
        first = max(prefix, start, after)
        for name in itertools.islice(names, bisect.bisect_left(names, first), None):
            if not name.startswith(prefix) or (end and name >= end):
                break
            if name not in objects:  # removed meanwhile
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            entry = prefix + head + delimiter if found else name
            if entry <= after or entry in prefixes[-1:]:
                continue
            if len(items) + len(prefixes) == most:
                token = last
                break
            prefixes.append(entry) if found else items.append(self.describe(bucket, name, objects[name]))
            last = entry
        page = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        return {key: value for key, value in page.items() if value} | ({"nextPageToken": token} if token else {})

    # --- Resumable uploads ---------------------------------------------------------------------------------------

    def begin_upload(self, bucket, name, query):
        self.objects(bucket)
        key = uuid.uuid4().hex
        self._uploads[key] = (bucket, name, query, bytearray())
        return f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}&name={name}"

    def continue_upload(self, key, content_range, data):
        """The object once it is whole; until then the number of bytes that are there."""
        if key not in self._uploads:
            raise Refused(404, "no such upload")
        bucket, name, query, received = self._uploads[key]
        spans, total = re.fullmatch(r"bytes (\*|\d+-\d+)/(\*|\d+)", content_range or f"bytes 0-{len(data)}/*").groups()
        if spans != "*":
            del received[int(spans.split("-")[0]) :]
            received += data
        if total != "*" and len(received) == int(total):
            del self._uploads[key]
            return self.put(bucket, name, received, query)
        return len(received)


def _check(stored, query, reading=False):
    generation = stored.generation if stored else 0
    if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
        raise Refused(412, "conditionNotMet")
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
        raise Refused(304 if reading else 412, "conditionNotMet")
    if "generation" in query and int(query["generation"]) != generation:
        raise Refused(404, "no such generation")


def _stamp(moment):
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *arguments):
        self.connections = set()
        super().__init__(*arguments)

    def handle_error(self, request, client_address):
        pass  # the client is gone

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def answer(self):
        emulator, url = self.server.emulator, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self.body()
        time.sleep(emulator.latency)
        try:
            self.respond(*self.route(emulator, url.path, query, body))
        except Refused as refused:
            error = {"error": {"code": refused.status, "message": str(refused)}}
            self.respond(refused.status, b"" if refused.status == 304 else error)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def route(self, emulator, path, query, body):
        found = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", path)
        if not found:
            raise Refused(400, f"not of this emulator: {path}")
        kind, bucket = found[1] or "", urllib.parse.unquote(found[2])
        name = urllib.parse.unquote(found[3]) if found[3] else query.get("name")
        self.note(emulator, bucket, name or "", kind, query, "/o" in path)
        if kind == "upload/":
            return self.upload(emulator, bucket, name, query, body)
        if "/o" not in path:
            emulator.objects(bucket)
            return 200, {"kind": "storage#bucket", "name": bucket, "id": bucket}
        if name is None:
            return 200, emulator.listing(bucket, query)
        if self.command == "DELETE":
            emulator.delete(bucket, name, query)
            return 204, b""
        if copied := re.fullmatch(r"(.*)/rewriteTo/b/([^/]+)/o/(.*)", found[3] or ""):
            source, other, target = map(urllib.parse.unquote, copied.groups())
            resource = emulator.put(other, target, emulator.get(bucket, source, {}).data, query)
            return 200, {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
        stored = emulator.get(bucket, name, query)
        if query.get("alt") != "media":
            return 200, emulator.describe(bucket, name, stored)
        return self.part(stored)

    def note(self, emulator, bucket, name, kind, query, is_object):
        what = {"POST": "write", "PUT": "write", "DELETE": "delete"}.get(self.command)
        what = what or ("data" if query.get("alt") == "media" else "meta" if name or not is_object else "list")
        where = f"{bucket}/{name or query.get('prefix', '')}"
        emulator.requests.append((self.command, where, what))
        status = emulator.fault(self.command, where)
        if status is not None:
            raise Refused(status, "refused by the test")

    def upload(self, emulator, bucket, name, query, body):
        way = query["uploadType"]
        if way == "resumable" and "upload_id" not in query:
            name = name or json.loads(body)["name"]
            return 200, b"", {"Location": emulator.begin_upload(bucket, name, query)}
        if way == "resumable":
            done = emulator.continue_upload(query["upload_id"], self.headers.get("Content-Range"), body)
            if isinstance(done, int):
                return 308, b"", {"Range": f"bytes=0-{done - 1}"} if done else {}
            return 200, done
        if way == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()
            _, head, rest = body.split(b"--" + boundary, 2)
            name = name or json.loads(re.split(rb"\r?\n\r?\n", head, maxsplit=1)[1])["name"]
            data = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1]
            body = re.sub(rb"\r?\n\Z", b"", data[: data.rindex(b"--" + boundary + b"--")])
        return 200, emulator.put(bucket, name, body, query)

    def part(self, stored):
        headers, data = {"x-goog-generation": str(stored.generation)}, stored.data
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not span:
            return 200, data, headers
        first, last = span.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            raise Refused(416, "outside of the object")
        return 206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def respond(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
        lines += [f"{key}: {value}" for key, value in dict(headers).items()]
        if status not in (204, 304):
            lines += [f"Content-Type: {kind}", f"Content-Length: {len(data)}"]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + data)


if __name__ == "__main__":
    served = Emulator(*sys.argv[2:], port=int(sys.argv[1]))
    print(served.url, flush=True)
    threading.Event().wait()
