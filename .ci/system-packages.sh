#!/usr/bin/env bash
# Installs the Debian packages that the tests need, where this is root on Debian; elsewhere does nothing.
set -euo pipefail
# The libraries are MediaPipe's, which one test runs; chromium and npm: the browser page; openssh: benches
# over ssh; g++: compiles deploy/microcontroller; the rest: emulated arm64 (benchmarks/arm64).
packages=(
    make libegl1 libgles2 libgl1 libglib2.0-0 chromium
    openssh-client openssh-server qemu-user mmdebstrap gcc g++ libc6-dev binutils
)
command -v npm >/dev/null || packages+=(npm) # another Node.js than Debian's brings its own
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi
