#!/usr/bin/env bash
# Fetch real release archives for test_real_artifacts.py, through the ordinary
# clients of their registries.
#
# Usage: tests/fetch_artifacts.sh [DIRECTORY]
#
# DIRECTORY is $DEPLOY_TEST_ARTIFACTS or .cache/artifacts unless given. What is
# there already is not fetched again. Afterwards it holds
#   typescript-*.tgz      an npm pack: a large package below `package/`
#   flit_core-*.tar.gz    a source distribution whose members have pax headers
#   pygments-*.whl        a wheel, which is a zip
#   nano_*.orig.tar.xz    upstream's archive of a Debian source package
# A client that is missing, or a fetch that fails, is named at the end: exit 1.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
target=${1:-${DEPLOY_TEST_ARTIFACTS:-$here/.cache/artifacts}}
python=${PYTHON:-python3}
mkdir -p "$target"
target=$(cd "$target" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

fetch_npm() {
    npm pack typescript@5.4.5 --silent --cache "$work/npm" > /dev/null
}

fetch_sdist() {
    # flit_core builds itself: pip can read its metadata without any other package.
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: flit_core==3.9.0
    "$python" - flit_core-*.tar.gz << 'END'
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    if not any(member.pax_headers for member in archive):
        sys.exit(sys.argv[1] + " has no pax headers: choose another")
END
}

fetch_wheel() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: pygments==2.17.2
}

fetch_debian() {
    # The host's own sources, asked for source packages; its lists stay as they are.
    mkdir -p parts lists/partial
    for file in /etc/apt/sources.list.d/*.sources; do
        [ ! -e "$file" ] || sed 's/^Types:.*/Types: deb-src/' "$file" > "parts/$(basename "$file")"
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ ! -e "$file" ] || sed -n 's/^deb /deb-src /p' "$file" > "parts/$(basename "$file" .list)-src.list"
    done
    local options=(-qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$work/parts"
                   -o Dir::State::Lists="$work/lists" -o APT::Sandbox::User=)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" source --download-only nano
}

failed=
fetch() {  # fetch NAME PATTERN: unless it is there already, into $target
    if compgen -G "$target/$2" > /dev/null; then
        return
    fi
    # A subshell of its own, for set -e does not count inside a condition.
    set +e
    (set -e; "fetch_$1" >&2)
    local status=$?
    set -e
    if [ $status -eq 0 ] && compgen -G "$work/$2" > /dev/null; then
        # shellcheck disable=SC2086  # the pattern is meant to expand
        mv $2 "$target/"
    else
        failed="$failed $1"
    fi
}

fetch npm 'typescript-*.tgz'
fetch sdist 'flit_core-*.tar.gz'
fetch wheel 'pygments-*.whl'
fetch debian 'nano_*.orig.tar.xz'

if [ -n "$failed" ]; then
    echo "fetch_artifacts.sh: could not fetch:$failed" >&2
    exit 1
fi
ls -l "$target"
