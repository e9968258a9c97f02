"""Create the secrets of the deployment: `newsecrets.py [--open] [FOLDER]`.

Each secret is one file in secrets/, which git ignores. Existing files are never changed, so this can be run again after
an update that needs a new secret. compose.yaml mounts the files; in Kubernetes they become one Secret, as
k8s/base/kustomization.yaml says.
"""

import argparse
import configparser
import json
import secrets
from pathlib import Path


def s3_key(folder: Path) -> tuple[str, str]:
    "The access key of the object store and its secret: those of the file that exists, else new ones."
    if (folder / "s3_credentials").exists():
        ini = configparser.ConfigParser(interpolation=None)
        ini.read_string((folder / "s3_credentials").read_text())
        return ini["default"]["aws_access_key_id"], ini["default"]["aws_secret_access_key"]
    if (folder / "s3_identities").exists():
        credentials = json.loads((folder / "s3_identities").read_text())["identities"][0]["credentials"][0]
        return credentials["accessKey"], credentials["secretKey"]
    return secrets.token_hex(10), secrets.token_urlsafe(30)


def create_secrets(folder: Path, without_token: bool = False) -> list[str]:
    """Write the secrets that are missing and return their names.

    The folder is closed to other users of this machine. The files in it are readable, because containers run as other
    users.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    access_key, secret_key = s3_key(folder)
    identity = {
        "name": "srsys",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    contents = {
        "postgres_password": secrets.token_urlsafe(30),
        "grafana_password": secrets.token_urlsafe(30),
        "jupyter_token": secrets.token_urlsafe(30),
        # One token of 40 characters. There may be several, separated by spaces; an empty file admits everyone.
        "srsys_tokens": "" if without_token else secrets.token_urlsafe(30),
        "signing_key": secrets.token_hex(32),
        "alert_token": secrets.token_urlsafe(30),  # Alertmanager's, for the alerts that it posts to the app
        # The same key for the client (MLflow) and for the server (SeaweedFS).
        "s3_credentials": f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n",
        "s3_identities": json.dumps({"identities": [identity]}, indent=2),
    }
    created = [name for name in contents if not (folder / name).exists()]
    for name in created:
        with open(folder / name, "x") as file:
            file.write(contents[name])
        (folder / name).chmod(0o644)
    return created


def main() -> None:
    parser = argparse.ArgumentParser(description="Create the secrets of the deployment. Existing files are kept.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "secrets", metavar="FOLDER")
    parser.add_argument(
        "--open", action="store_true", help="require no token: the app serves everyone who can reach it"
    )
    options = parser.parse_args()
    created = create_secrets(options.folder, without_token=options.open)
    print(f"Created in {options.folder}: {', '.join(created) or 'nothing, all secrets exist'}.")
    tokens = options.folder / "srsys_tokens"
    if tokens.read_text().strip():
        print(f"The access token is in {tokens}. Page: any user name, and the token as the password.")
        print("API: Authorization: Bearer TOKEN.")
    else:
        print(f"WARNING: {tokens} is empty, so the app serves everyone who can reach it.")
        print("To require a token, delete that file and run this script again without --open.")


if __name__ == "__main__":
    main()
