"""Smoke test of a deployed server: `smoke.py ADDRESS [TOKEN]`.

Restores a small picture and prints which model did it; on failure prints one line and exits with status 1. The token
may also come from the environment variable TOKEN, where other users of the machine cannot see it.
"""

import json
import os
import struct
import sys
import time
import urllib.request
import zlib


def png(side: int) -> bytes:
    "A grey square as a PNG file."

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + b"\x80" * (3 * side) for _ in range(side))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def smoke(address: str, token: str = "", patience: float = 120) -> str:
    """Wait up to `patience` seconds until the server is ready, restore a picture, and return the model and version.

    Raises OSError if the server does not answer or refuses, ValueError if the answer is not a larger picture.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(address + "/readyz", timeout=10):
                break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="smoke.png"\r\n\r\n' + png(48) + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(address + "/v1/restore", body, headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        picture, model = response.read(), response.headers["X-Model-Version"]
    if not picture.startswith(b"\x89PNG") or struct.unpack(">II", picture[16:24])[0] <= 48:
        raise ValueError("the answer is not a larger picture")
    with urllib.request.urlopen(address + "/version", timeout=10) as response:
        return f"{model}, srsys {json.load(response)['srsys']}"


if __name__ == "__main__":
    address, *token = sys.argv[1:3] or sys.exit("usage: smoke.py ADDRESS [TOKEN]")
    try:
        print(smoke(address, token[0] if token else os.environ.get("TOKEN", "").strip()))
    except (OSError, ValueError) as error:
        sys.exit(f"smoke: {address}: {error}")
