#!/bin/sh
# Lay PyTorch and CUDA's libraries apart from the rest of /opt/srsys, each in a folder that is copied back over it.
set -eu
cd /opt/srsys
for part in nvidia torch; do
  mkdir -p "/apart/$part"
  for folder in lib/python3*/site-packages/"$part"; do
    [ ! -d "$folder" ] || { mkdir -p "/apart/$part/${folder%/*}"; mv "$folder" "/apart/$part/$folder"; }
  done
done
