#!/usr/bin/env bash
# Fetch a Python that is newer than this host's: Debian's own packages, of its
# unstable distribution, in a directory that nothing else on the host sees.
#
# Usage: tests/tools/fetch_python.sh 3.14 DIRECTORY
#
# DIRECTORY/bin/python3 is it, with the C library and the others that it was
# built for.  Exit 1 where they cannot be had.
set -eu

version=$1
mkdir -p "$2"
target=$(cd "$2" && pwd)
[ ! -x "$target/bin/python3" ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 0755 "$work"

# The host's own mirror, one distribution further on.
mkdir -p "$work/lists/partial" "$work/packages"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2> /dev/null | grep -v '^#' | grep -oE 'https?://[^ ]+/debian/?' | head -n 1)
[ -n "$mirror" ] || { echo "fetch_python.sh: no mirror of Debian's is configured" >&2; exit 1; }
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" > "$work/sources.list"
options=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root)
apt-get "${options[@]}" -qq update
(cd "$work/packages" && apt-get "${options[@]}" -qq download "python$version" "python$version-minimal" "python$version-venv" \
    "libpython$version-minimal" "libpython$version-stdlib" python3-pip-whl libc6 libgcc-s1 libssl3t64 zlib1g libexpat1 libffi8 liblzma5 \
    libbz2-1.0 libsqlite3-0 libzstd1 libuuid1 libncursesw6 libtinfo6 libreadline8t64)

rm -rf "$target"
mkdir -p "$target/bin" "$target/lib"
for package in "$work"/packages/*.deb; do
    dpkg-deb -x "$package" "$target"
done
mv "$target/usr/lib/python$version" "$target/lib/"
# It starts by its own loader, and finds its own libraries.
patchelf --set-interpreter "$target/usr/lib64/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$target/usr/lib/x86_64-linux-gnu" \
    --output "$target/bin/python$version" "$target/usr/bin/python$version"
# Where venv finds pip.
sed -i "s,/usr/share/python-wheels,$target&,g" "$target/lib/python$version/"_sysconfig*
ln -s "python$version" "$target/bin/python3"
"$target/bin/python3" -c 'import ssl, sqlite3, ctypes, bz2, lzma, zlib'
