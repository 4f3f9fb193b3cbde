#!/usr/bin/env bash
# Everything that must hold before a commit: ruff, mypy, pytest. Arguments go to pytest.
# All four run, whatever fails; the exit code is that of the first that failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=deploy/environment.sh
source deploy/environment.sh
prepare_environment "imaging,export,simulation,dev"

status=0
check() {
    local code=0
    "$@" || code=$?
    if [ "$status" -eq 0 ]; then
        status=$code
    fi
}
check ruff check .
check ruff format --check .
check mypy
processes=$(($(nproc) + 1)) # one more than processors: federations often wait
export OMP_NUM_THREADS=1 # each process of the tests has one core
check pytest --numprocesses "$processes" --dist load --maxschedchunk 1 "$@"
exit "$status"
