#!/bin/sh
# build.sh TARGET…: build images with buildah, without Docker and without privileges.
# BASE names the base image, which buildah must have or be able to pull; TORCH is explained in install.sh.
set -eu
cd "$(dirname "$0")/.."
for target in "$@"; do
  buildah ${STORE:+--storage-driver vfs --root "$STORE" --runroot "$STORE.run"} bud --isolation chroot --layers=false --format docker \
    ${BASE:+--build-arg "BASE=$BASE"} ${TORCH:+--build-arg "TORCH=$TORCH"} \
    --ignorefile docker/Dockerfile.dockerignore -f docker/Dockerfile --target "$target" -t "${IMAGE:-srsys}-$target:${TAG:-latest}" .
done
