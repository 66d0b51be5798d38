#!/usr/bin/env bash
# Runs tests on an emulated aarch64: user-mode QEMU, Debian's arm64 Python and PyPI's aarch64 wheels.
#
#     tests/on_aarch64.sh [ARGUMENTS OF PYTEST ...]     # by default the elementwise, row and vector tests
#
# It needs Debian or Ubuntu on x86-64 with pip and unzip, but no root: all that it downloads (300 MB) is kept in
# AARCH64_HOME. QEMU translates each instruction, so a compile takes 20 times as long as on the host. Tests that start
# processes cannot run: the host cannot execute the Python that they would start.
set -euo pipefail
home=${AARCH64_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/numbaloss-aarch64}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$home/root
mkdir -p "$home"/{lists/partial,archives/partial,wheels,site,root}

if [ ! -e "$root/usr/bin/python3.11" ]; then
  : > "$home/status"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main" \
    > "$home/sources.list"
  apt=(apt-get -q -o Dir::State="$home" -o Dir::State::status="$home/status" -o Dir::Cache="$home"
    -o Dir::Etc::sourcelist="$home/sources.list" -o Dir::Etc::sourceparts=- -o APT::Sandbox::User=root)
  foreign=(-o APT::Architecture=arm64 -o APT::Architectures=arm64)
  "${apt[@]}" "${foreign[@]}" update
  "${apt[@]}" "${foreign[@]}" install -y --no-install-recommends --download-only python3 libgomp1 libstdc++6
  for package in "$home"/archives/*_arm64.deb "$home"/archives/*_all.deb; do dpkg -x "$package" "$root"; done
  "${apt[@]}" update
  (cd "$home" && "${apt[@]}" download qemu-user-static && dpkg -x qemu-user-static*.deb "$home")
  platforms=(--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64
    --platform manylinux2014_aarch64 --platform any)
  pip download -q --dest "$home/wheels" --only-binary=:all: "${platforms[@]}" --python-version 3.11 \
    --implementation cp --abi cp311 --abi abi3 --abi none \
    numpy numba scipy ml_dtypes pytest hypothesis click rich threadpoolctl
  for wheel in "$home"/wheels/*.whl; do unzip -q -o "$wheel" -d "$home/site"; done
fi

[ $# -gt 0 ] || set -- -q tests/test_losses.py tests/test_multiclass.py tests/test_multilabel.py \
  tests/test_embedding.py tests/test_sequence.py tests/test_math.py tests/test_bits.py
cd "$checkout"
exec env QEMU_CPU=neoverse-n1 PYTHONPATH="$checkout:$home/site" NUMBA_CACHE_DIR="$home/cache" \
  "$home/usr/bin/qemu-aarch64-static" -L "$root" "$root/usr/bin/python3.11" -m pytest -p no:cacheprovider "$@"
