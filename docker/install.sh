#!/bin/sh
# install.sh -r FILE …: install packages in /opt/srsys, each in the version of requirements.lock and verified by its hash.
# TORCH=lock installs PyTorch as locked, with CUDA: most of 7 GB. TORCH=cpu, rocm6.4 … installs the same version from
# PyTorch's own index; its builds have other hashes, so for torch and torchvision alone the hashes are not verified.
set -eu
uv=${UV:-/opt/tools/bin/uv}
if [ "${TORCH:-lock}" = lock ]; then
  cp requirements.lock constraints.lock
else
  awk '/^[a-z]/ {torch = /^(torch|torchvision)==/; skip = torch || /^(triton|nvidia-|cuda-)/; if (torch) print $1} !skip' \
    requirements.lock >constraints.lock
  export UV_TORCH_BACKEND="$TORCH"
fi
exec "$uv" pip install --python "${PREFIX:-/opt/srsys}/bin/python" --compile-bytecode --verify-hashes \
  --constraints constraints.lock --build-constraints constraints.lock "$@"
