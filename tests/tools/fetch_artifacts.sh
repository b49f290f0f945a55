#!/usr/bin/env bash
# Fetch real release archives for test_real_artifacts.py, through the ordinary
# clients of their registries.
#
# Usage: tests/tools/fetch_artifacts.sh [DIRECTORY]
#
# DIRECTORY is $DEPLOY_TEST_ARTIFACTS or .cache/artifacts unless given. What is
# there already is not fetched again. Afterwards it holds some forty archives:
# npm packs, source distributions and wheels of Python packages, and upstream's
# archives of Debian source packages, chosen for what made them: tar with ustar,
# pax, GNU and pre-POSIX headers, symlinks within, gz, bz2 and xz; 20 MB.
# A client that is missing, or a fetch that fails, is named at the end: exit 1.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
target=${1:-${DEPLOY_TEST_ARTIFACTS:-$here/.cache/artifacts}}
python=${PYTHON:-python3}
mkdir -p "$target"
target=$(cd "$target" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# wanted_KIND: what is not there yet, as the client names it; expected: the files that must come of it.
wanted_npm=() wanted_sdist=() wanted_wheel=() wanted_debian=() expected=()

want() {  # want KIND PATTERN WHAT: unless it is there already
    if ! compgen -G "$target/$2" > /dev/null; then
        local -n list="wanted_$1"
        list+=("$3")
        expected+=("$2")
    fi
}

fetch_npm() {
    npm pack "${wanted_npm[@]}" --silent --cache "$work/npm" > /dev/null
}

fetch_sdist() {
    # pip builds what it must to read their metadata, with build tools that come as wheels.
    local names
    names=$(printf '%s\n' "${wanted_sdist[@]%%=*}" | paste -sd, -)
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary "$names" "${wanted_sdist[@]}"
}

fetch_wheel() {
    # For one platform and version, whatever runs this: the same bytes everywhere.
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --implementation cp --python-version 3.11 --platform manylinux2014_x86_64 "${wanted_wheel[@]}"
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
    apt-get "${options[@]}" source --download-only "${wanted_debian[@]}"
}

for package in typescript@5.4.5 is-odd@3.0.1 left-pad@1.3.0 lodash@4.17.21 express@4.18.2 react@18.2.0 chalk@5.3.0 semver@7.5.4 \
    jquery@3.7.1 yargs@17.7.2; do
    want npm "${package/@/-}.tgz" "$package"
done
want npm types-node-18.0.0.tgz @types/node@18.0.0
want npm babel-runtime-7.23.0.tgz @babel/runtime@7.23.0
for package in flit_core==3.9.0 six==1.16.0 docopt==0.6.2 toml==0.10.2 cookiecutter==1.7.2 idna==3.4 requests==2.27.1 colorama==0.4.4; do
    want sdist "${package/==/-}.tar.gz" "$package"
done
for package in pygments==2.17.2 six==1.16.0 requests==2.31.0 certifi==2023.11.17 Jinja2==3.1.2 click==8.1.7 setuptools==68.2.2 \
    wheel==0.42.0 PyYAML==6.0.1 MarkupSafe==2.1.3; do
    want wheel "${package/==/-}-*.whl" "$package"
done
for package in nano hello zlib sed dash bc; do
    want debian "${package}_*.orig.tar.*" "$package"
done

failed=
for kind in npm sdist wheel debian; do
    declare -n list="wanted_$kind"
    if [ ${#list[@]} -ne 0 ]; then
        # A subshell of its own, for set -e does not count inside a condition.
        set +e
        (set -e; "fetch_$kind" >&2)
        [ $? -eq 0 ] || failed="$failed $kind"
        set -e
    fi
    declare +n list
done
rm -f -- *.asc *.sig
for pattern in ${expected[@]+"${expected[@]}"}; do
    if compgen -G "$work/$pattern" > /dev/null; then
        # shellcheck disable=SC2086  # the pattern is meant to expand
        mv $pattern "$target/"
    else
        failed="$failed $pattern"
    fi
done

if [ -n "$failed" ]; then
    echo "fetch_artifacts.sh: could not fetch:$failed" >&2
    exit 1
fi
ls -l "$target"
