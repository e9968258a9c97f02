#!/bin/sh
# PASSWORD_FILE=/run/secrets/… becomes PASSWORD: secrets come as files, and these programs only read the environment.
set -eu
for name in PGPASSWORD JUPYTER_TOKEN SRSYS_TOKENS; do
  eval "file=\${${name}_FILE:-}"
  [ -z "$file" ] || { value=$(cat "$file"); export "$name=$value"; }
done
exec "$@"
