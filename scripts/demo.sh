#!/usr/bin/env bash
# From raw preferences to an aligned model and its reward-KL frontier, offline once installed:
#   bash scripts/demo.sh [dotted.path=value ...]
# Makes .venv, installs dpo-jax into it and runs `dpo-jax frontier experiments/sentiment_dpo.py`
# with the arguments given. Paths are relative to the repository; results go to runs/.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

environment ""
say "dpo-jax frontier experiments/sentiment_dpo.py $*"
exec .venv/bin/dpo-jax frontier experiments/sentiment_dpo.py "$@"
