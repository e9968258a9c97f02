#!/bin/sh
# Move CUDA's libraries and PyTorch out of /opt/srsys to /apart, from where the Dockerfile copies them back as separate layers.
set -eu
cd /opt/srsys
mkdir -p /apart/cuda /apart/torch
for folder in lib/python3*/site-packages/nvidia lib/python3*/site-packages/triton lib/python3*/site-packages/torch; do
  case $folder in *torch) part=torch ;; *) part=cuda ;; esac
  [ ! -d "$folder" ] || { mkdir -p "/apart/$part/${folder%/*}"; mv "$folder" "/apart/$part/$folder"; }
done
