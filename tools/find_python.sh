#!/usr/bin/env bash
# Prints the path of the Python that the environment is to be made from: $PYTHON if it is set, else
# the first one that works on PATH or under pyenv's versions. Fails with what to install if none does.
set -euo pipefail

# megatron-core 0.19.2 publishes wheels for these two and no later ones; the first is preferred.
supported=(3.12 3.13)
rejected=()

# Sets `reason` and fails unless $1 runs, has version $2 and can make an environment. The file being
# there proves nothing: pyenv puts a python3.12 on PATH that fails when 3.12 is not selected.
is_usable() {
    local found
    if ! found=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null); then
        reason="does not run"
        return 1
    fi
    if [[ $found != "$2" ]]; then
        reason="is Python $found"
        return 1
    fi
    if ! "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; then
        reason="is Python $found without venv and ensurepip (Debian: apt-get install python$found-venv)"
        return 1
    fi
}

candidates_for() {
    local version=$1 root
    type -ap "python$version" python3 python || true
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        [[ -n $root ]] && compgen -G "$root/versions/$version*/bin/python" || true
    done
}

explain_and_fail() {
    {
        echo "No usable Python found: Python ${supported[0]} or ${supported[1]} is needed."
        printf "%s\n" ${rejected[@]+"${rejected[@]}"} | sort -u | sed '/^$/d; s/^/  rejected: /'
        echo "Install Python ${supported[0]}, for example by one of"
        echo "  apt-get install python${supported[0]} python${supported[0]}-venv"
        echo "  pyenv install ${supported[0]}"
        echo "  brew install python@${supported[0]}"
        echo "or name an interpreter: make venv PYTHON=/path/to/python${supported[0]}"
    } >&2
    exit 1
}

main() {
    local version candidate candidates reason
    for version in "${supported[@]}"; do
        candidates=${PYTHON:-$(candidates_for "$version")}
        while IFS= read -r candidate; do
            [[ -n $candidate ]] || continue
            if is_usable "$candidate" "$version"; then
                echo "$candidate"
                return 0
            fi
            rejected+=("$candidate $reason")
        done <<<"$candidates"
    done
    explain_and_fail
}

main
