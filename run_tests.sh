#!/usr/bin/env bash
# Runs the linters and every test: bash run_tests.sh [pytest's options]. Makes .venv and installs what it needs.
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/make_environment.sh
make_environment "[test]"

ruff check .
ruff format --check .
# Two workers with one thread each use two cores better than one worker with two.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest --numprocesses "${PYTEST_WORKERS:-2}" "$@"
