# Sourced by quickstart.sh and run_tests.sh: makes .venv beside them where it is missing, installs what is named in
# $1 (an extra such as [test], or nothing) at the pinned versions, and activates it.
# shellcheck shell=bash
set -euo pipefail

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or 3.12 is needed and was not found; install one of them and run this again." >&2
    return 1
}

make_environment() {
    local extra="$1" python wanted
    # Whatever changes the dependencies makes the environment stale.
    wanted="$(cat pyproject.toml constraints.txt | cksum) $extra"
    # Without pip it was left half made: killed, or by a Python whose venv module lacks ensurepip.
    if [ ! -x .venv/bin/pip ]; then
        python="$(find_python)"
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    if [ "$(cat ".venv/installed$extra" 2>/dev/null)" != "$wanted" ]; then
        echo "installing the pinned dependencies into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra"
        echo "$wanted" > ".venv/installed$extra"
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
}
