#!/usr/bin/env bash
# Prints the path of a Chromium or Chrome that a test can drive without a window; where there is none,
# says on standard error what to install.
set -euo pipefail

for name in chromium chromium-browser google-chrome chromium-headless-shell; do
    if type -P "$name"; then
        exit 0
    fi
done
echo "Chromium is missing: apt-get install --no-install-recommends chromium" >&2
exit 1
