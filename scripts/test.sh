#!/usr/bin/env bash
# The checks that CI runs: ruff, the type checker, the tests.
#   bash scripts/test.sh               everything
#   bash scripts/test.sh -k losses     only pytest, with these arguments (also tests/test_x.py, -x)
# Makes .venv and installs dpo-jax with its test extra into it.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

environment "[test]"
python=.venv/bin/python
if [ $# -eq 0 ]; then
    say "ruff check"
    "$python" -m ruff check
    say "ruff format --check"
    "$python" -m ruff format --check
    say "pyright"
    # It would ask the network for a newer version of itself.
    PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$python" -m pyright
    # A file stays with one process, whose tests share their runs; more processes want more memory.
    set -- --numprocesses=auto --maxprocesses=4 --dist=loadfile
fi
say "pytest $*"
exec "$python" -m pytest "$@"
