#!/bin/sh
# install.sh -r FILE …: into /opt/srsys, each package in the version and with a hash of requirements.lock.
# TORCH=lock is PyTorch as the lock has it, which brings CUDA: most of 7 GB. TORCH=cpu, rocm6.4 … takes the same
# version from PyTorch's own index, whose builds have hashes of their own: for it alone the lock's are not asked for.
set -eu
uv=${UV:-/opt/tools/bin/uv}
if [ "${TORCH:-lock}" = lock ]; then
  cp requirements.lock constraints.lock
else
  awk '/^[a-z]/ {own = /^(torch|torchvision)==/; cut = own || /^(triton|nvidia-|cuda-)/; if (own) print $1} !cut' \
    requirements.lock >constraints.lock
  export UV_TORCH_BACKEND="$TORCH"
fi
exec "$uv" pip install --python "${PREFIX:-/opt/srsys}/bin/python" --compile-bytecode --verify-hashes \
  --constraints constraints.lock --build-constraints constraints.lock "$@"
