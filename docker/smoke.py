"""Does a server that was just deployed do its work? `smoke.py ADDRESS` sends a picture; exit status 1 and a line if not."""

import json
import struct
import sys
import time
import urllib.request
import zlib


def png(side: int) -> bytes:
    "A grey square."

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
    "Who restored the picture. Raises OSError or ValueError if nobody did."
    end, headers = time.monotonic() + patience, {"Authorization": f"Bearer {token}"} if token else {}
    while True:
        try:
            with urllib.request.urlopen(address + "/readyz", timeout=10):
                break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(1)
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="smoke.png"\r\n\r\n' + png(48) + b"\r\n--x--\r\n"
    )
    asked = urllib.request.Request(
        address + "/v1/restore", body, {"Content-Type": "multipart/form-data; boundary=x", **headers}
    )
    with urllib.request.urlopen(asked, timeout=120) as answer:
        picture, maker = answer.read(), answer.headers["X-Model-Version"]
    if not picture.startswith(b"\x89PNG") or struct.unpack(">II", picture[16:24])[0] <= 48:
        raise ValueError(f"{address} answered, but not with a larger picture")
    with urllib.request.urlopen(address + "/version", timeout=10) as answer:
        return f"{maker}, srsys {json.load(answer)['srsys']}"


if __name__ == "__main__":
    try:
        print(smoke(*sys.argv[1:3]))
    except (OSError, ValueError) as error:
        sys.exit(f"smoke: {sys.argv[1]}: {error}")
