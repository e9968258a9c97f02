#!/bin/sh
# Entry point of the images. Secrets are mounted as files, but these programs read them from the environment:
# PGPASSWORD_FILE=/run/secrets/… sets PGPASSWORD to the content of that file.
# The signing key is not among them: srsys reads its file itself, so that no child process inherits it.
set -eu
for name in PGPASSWORD JUPYTER_TOKEN SRSYS_TOKENS SRSYS_ALERT_TOKEN; do
  eval "file=\${${name}_FILE:-}"
  [ -z "$file" ] || { value=$(cat "$file"); export "$name=$value"; }
done
exec "$@"
