#!/usr/bin/env bash
# Runs the linters and every test: bash run_tests.sh [pytest's options]. Makes .venv and installs what it needs.
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ " $* " == *" --help "* ]]; then
    sed -n '2s/^# //p' run_tests.sh
    exit
fi
source scripts/make_environment.sh
make_environment "[test]"

# Only what git tracks: a file of your own beside it, a reward say, has your style. Without git, everything.
tracked() { git ls-files -z "*.py" || printf ".\0"; }
tracked | xargs -0 ruff check
tracked | xargs -0 ruff format --check
# Two workers with one thread each use two cores better than one worker with two.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest --numprocesses "${PYTEST_WORKERS:-2}" "$@"
