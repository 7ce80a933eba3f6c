#!/usr/bin/env bash
# gcsfs 2026.10.1: what a bucket refuses (403) is an OSError without `errno` and without `strerror`, and a write into a
# bucket that does not exist (404) is a FileNotFoundError without them.
#
# Both are subclasses of OSError, so one would expect what every OSError of a file has: code that reports
# `error.strerror` prints None, and code that decides by `error.errno` takes a missing permission for something else.
#
# Seen:
#   403: OSError errno None strerror None; 404 on writing: FileNotFoundError errno None strerror None
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check gcsfs==2026.10.1
"$directory/venv/bin/python" - <<'END'
import http.server
import os
import threading

STATUS = [403]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A store on loopback that answers everything with one status."""

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"error": {"code": %d, "message": "no"}}' % STATUS[0]
        self.send_response(STATUS[0])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *arguments):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{server.server_port}"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks no other service for the kind of bucket
import gcsfs

store = gcsfs.GCSFileSystem(token="anon", use_listings_cache=False)


def error_of(action, status):
    STATUS[0] = status
    try:
        action()
    except OSError as error:
        return f"{type(error).__name__} errno {error.errno} strerror {error.strerror}"


reading = error_of(lambda: store.cat_file("bucket/name"), 403)
writing = error_of(lambda: store.pipe_file("bucket/name", b"text"), 404)
print(f"403: {reading}; 404 on writing: {writing}")
assert reading == "OSError errno None strerror None", reading
assert writing == "FileNotFoundError errno None strerror None", writing
END
