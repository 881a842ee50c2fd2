# Sourced by the other scripts: `environment EXTRAS` makes or refreshes .venv at the root of the
# repository and leaves the working directory there. EXTRAS is "" or a list such as "[test]".
# Uses uv where it is there, python -m venv and pip otherwise. Installs again only when
# pyproject.toml (or the place of the repository) has changed, so it works without network after
# the first time.

say() { printf '== %s\n' "$*"; }

find_python() {
    # A name on PATH may be a pyenv shim without a Python behind it: run each before trusting it.
    local name
    for name in python3.13 python3.12 python3.11 python3 python; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    rm -rf .venv # missing, or its Python does not run
    if command -v uv >/dev/null 2>&1; then
        say "making .venv with uv"
        uv venv --quiet --python '>=3.11' .venv
    elif python=$(find_python); then
        say "making .venv with $("$python" --version) ($python)"
        "$python" -m venv .venv
    else
        echo "error: no Python >= 3.11 with venv and pip runs here (tried python3.13, python3.12," \
            "python3.11, python3, python); install one, or uv" >&2
        return 1
    fi
}

install() {
    if command -v uv >/dev/null 2>&1; then
        say "installing dpo-jax$1 into .venv with uv"
        uv pip install --quiet --python .venv/bin/python --editable ".$1"
    else
        say "installing dpo-jax$1 into .venv with pip (a minute or two)"
        .venv/bin/python -c 'import pip' 2>/dev/null || .venv/bin/python -m ensurepip >/dev/null
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$1"
    fi
}

fingerprint() {
    pwd -P
    cat pyproject.toml
}

environment() {
    CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
    .venv/bin/python -c '' >/dev/null 2>&1 || make_venv
    if ! fingerprint | cmp -s - ".venv/installed$1"; then
        install "$1"
        fingerprint >".venv/installed$1"
        fingerprint >".venv/installed"
    fi
}
