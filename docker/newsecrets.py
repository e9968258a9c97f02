"""The secrets of compose.yaml, made up once: a file each in secrets/, which git never sees. What is there is kept."""

import json
import secrets
import sys
from pathlib import Path


def write(folder: Path) -> None:
    "Whatever secret is missing. Containers run as other users, so the files can be read and the folder is closed."
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key, word = secrets.token_hex(10), secrets.token_urlsafe(30)
    identity = {
        "name": "srsys",
        "credentials": [{"accessKey": key, "secretKey": word}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    made = {name: secrets.token_urlsafe(30) for name in ("postgres_password", "grafana_password", "jupyter_token")}
    made["srsys_tokens"] = ""  # everybody is served; else tokens of at least 16 characters, with spaces between
    pair = {
        "s3_credentials": f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {word}\n",
        "s3_identities": json.dumps({"identities": [identity]}, indent=2),
    }
    if not all((folder / name).exists() for name in pair):  # one key in two forms
        made |= pair
        for name in pair:
            (folder / name).unlink(missing_ok=True)
    for name, text in made.items():
        if not (folder / name).exists():
            (folder / name).write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "secrets")
