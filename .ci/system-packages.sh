#!/usr/bin/env bash
# Installs the Debian packages that the tests need, where this is root on Debian; elsewhere does nothing.
set -euo pipefail
# openssh: benches over ssh; the rest: emulated arm64 (benchmarks/arm64).
packages=(make openssh-client openssh-server qemu-user mmdebstrap gcc libc6-dev binutils)
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi
