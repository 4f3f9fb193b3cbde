# shellcheck shell=bash
# Sourced by demo.sh and test.sh. `prepare_environment EXTRAS` leaves .venv with Consilium and EXTRAS installed,
# installs nothing if that was done before with the same pyproject.toml, and puts .venv/bin on PATH.
# PYTHON=/path/to/python3 chooses the interpreter of a new .venv. What is installed is compiled when it is first used:
# all of it at once would take a minute, of which most is never needed.

unset PYTHONDONTWRITEBYTECODE # many programs would each compile what they import
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0 PYTHONSAFEPATH=1

is_usable_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if is_usable_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "Consilium needs Python 3.11 or newer with the venv module; tried: ${PYTHON:-python3 python3.13 python3.12 python3.11}." >&2
    echo "Install it (on Debian also python3-venv), or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

has_gpu() {
    nvidia-smi -L >/dev/null 2>&1
}

install_torch() {
    if has_gpu; then
        return # pip takes torch's default build with everything else
    fi
    python -m pip install --quiet --no-compile --constraint deploy/constraints-cpu.txt torch ||
        echo "The package index has no CPU-only build of torch: taking its default build, which may be large." >&2
}

prepare_environment() {
    local extras=$1 python digest
    if ! is_usable_python .venv/bin/python; then
        python=$(find_python)
        rm -rf .venv
        "$python" -m venv .venv
    fi
    export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
    digest=$(cat pyproject.toml deploy/constraints-cpu.txt <(has_gpu && echo gpu) | python -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')
    if compgen -G ".venv/installed-$digest-*$extras" >/dev/null; then
        return
    fi
    echo "Installing Consilium${extras:+ with $extras} into .venv (once; a few minutes)"
    install_torch
    python -m pip install --quiet --no-compile --editable ".${extras:+[$extras]}"
    rm -f .venv/installed-*
    touch ".venv/installed-$digest-$extras"
}
