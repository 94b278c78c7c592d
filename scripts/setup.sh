#!/bin/sh
# Builds the environment in .venv with the pinned versions for this Python. Usage: scripts/setup.sh [EXTRA]
# PYTHON names the interpreter; by default the first of python3, python3.13, python3.12, python3.11 that is new enough.
set -eu
cd "$(dirname "$0")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if new_enough "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "jepax needs Python 3.11 or newer; found none. Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    exit 2
fi

# Debian and Ubuntu package venv separately from Python; without it, creating .venv fails halfway.
if [ ! -x .venv/bin/pip ]; then
    rm -rf .venv
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        rm -rf .venv
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            echo "installing Debian's python$version-venv"
            apt-get update -qq && apt-get install -y -qq "python$version-venv" >/dev/null
            "$python" -m venv .venv
        else
            echo "$python cannot make virtual environments; run: sudo apt-get install python$version-venv" >&2
            exit 2
        fi
    fi
fi

pins=constraints/py312.txt
if .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then pins=constraints/py311.txt; fi

# Install again only when one of these files has changed.
extra=${1:-}
stamp=.venv/.installed-${extra:-base}-$(cat pyproject.toml "$pins" scripts/setup.sh | cksum | tr ' ' '-')
[ -e "$stamp" ] && exit 0
what=.${extra:+[$extra]}
echo "installing jepax ($what) into .venv with $pins"
.venv/bin/pip install --quiet --disable-pip-version-check --constraint "$pins" --editable "$what"
touch "$stamp"
