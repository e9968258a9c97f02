#!/bin/sh
# pin.sh [FILE…]: pin images by digest. In compose.yaml and the Dockerfile, or in the given files, every
# docker.io/NAME:TAG or quay.io/NAME:TAG becomes NAME:TAG@sha256:…; a digest that is there already is renewed.
# Needs Docker with buildx, and access to the registries. Nothing is changed unless every image could be resolved.
set -eu
[ $# -gt 0 ] || { cd "$(dirname "$0")"; set -- compose.yaml Dockerfile; }
edits=$(mktemp)
trap 'rm -f "$edits"' EXIT
images=$(grep -ohE '(docker|quay)\.io/[a-z0-9._/-]+:[A-Za-z0-9._-]+' "$@" | sort -u)
for image in $images; do
  digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image")
  case $digest in
    sha256:*) ;;
    *) echo "pin.sh: no digest for $image: $digest" >&2; exit 1 ;;
  esac
  echo "$image@$digest"
  pattern=$(printf '%s' "$image" | sed 's/[.]/\\./g')
  printf '%s\n' "s#$pattern(@sha256:[0-9a-f]+)?([^A-Za-z0-9._@-]|\$)#$image@$digest\\2#g" >>"$edits"
done
for file in "$@"; do
  sed -E -f "$edits" "$file" >"$file.pinned"
  cat "$file.pinned" >"$file"
  rm "$file.pinned"
done
