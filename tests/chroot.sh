#!/bin/sh
# Proves the two commands on a fresh Debian: tests/chroot.sh bookworm|trixie [make target...]
#
# Run by hand, as root, with debootstrap installed. Bootstraps the smallest Debian of that name with
# make on top, unpacks HEAD there, and runs `make demo` and `make test` (or the targets named).
# It all happens in mount and PID namespaces of its own: however this ends, no mount and no process
# is left. The way to package mirrors and to PyPI (proxies, certificates, pip's and apt's settings)
# is taken over from the host.
set -eu
suite=${1:?which Debian: bookworm or trixie}
if [ "${IN_NAMESPACE:-}" != yes ]; then
    [ "$(id -u)" = 0 ] || { echo "tests/chroot.sh needs root" >&2; exit 3; }
    IN_NAMESPACE=yes exec unshare --mount --propagation private --pid --fork --kill-child "$0" "$@"
fi
shift
[ $# -gt 0 ] || set -- demo test
cd "$(dirname "$0")/.."

root=$(mktemp -d "${TMPDIR:-/var/tmp}/userswap-$suite.XXXXXX")
clean_up() {
    umount -R "$root/proc" "$root/sys" "$root/dev" 2>/dev/null || true
    rm -rf --one-file-system "$root"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        grep -m1 '/debian/*$' || true # debootstrap knows a mirror too
}

bootstrap() {
    chmod 755 "$root" # an ordinary user has to see the root of the file system
    debootstrap --variant=minbase --include=make "$suite" "$root" $(mirror) >"$root.log" 2>&1 ||
        { cat "$root.log" >&2; rm "$root.log"; exit 3; }
    rm "$root.log"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
}

take_over_network() {
    cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
    apt-config dump | grep -E '^Acquire::(https?|Check|Retries)' >"$root/etc/apt/apt.conf.d/90host" || true
    # A bundle at a place of its own: installing ca-certificates rewrites the usual one.
    bundle=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
    [ ! -e "$bundle" ] || cp -L "$bundle" "$root/etc/host-certificates.crt"
}

# The host's network settings as words for env; pip's folders on the host's disk are left out.
network_settings() {
    env | grep -iE '^(https?|all|no)_proxy=' || true
    for key in index-url extra-index-url proxy trusted-host; do
        value=$(python3 -m pip config get "global.$key" 2>/dev/null | grep -v '^file:' || true)
        [ -z "$value" ] || echo "PIP_$(echo "$key" | tr a-z- A-Z_)=$value"
    done
    if [ -e "$root/etc/host-certificates.crt" ]; then
        echo PIP_CERT=/etc/host-certificates.crt SSL_CERT_FILE=/etc/host-certificates.crt
    fi
}

inside() {
    # shellcheck disable=SC2046  # one word per variable
    chroot "$root" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        $(network_settings) "$@"
}

step() {
    started=$(date +%s)
    echo "== $suite: $*"
    inside sh -c 'cd /src && exec "$@"' sh "$@"
    echo "== $suite: $* succeeded in $(($(date +%s) - started)) s"
}

bootstrap
take_over_network
mkdir "$root/src"
git archive HEAD | tar -x -C "$root/src"
echo "== $suite: $(inside cat /etc/debian_version), kernel $(uname -r), $(git rev-parse --short HEAD)"
for target in "$@"; do
    step make "$target"
done
