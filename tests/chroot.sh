#!/bin/sh
# Proves the two commands on a fresh Debian: tests/chroot.sh bookworm|trixie [make target...]
#
# Run by hand, as root, with debootstrap installed. Bootstraps the smallest Debian of that name with
# make on top, unpacks HEAD there, and runs `make demo` and `make test` (or the targets named).
# It all happens in mount and PID namespaces of its own: however this ends, no mount and no process
# is left.
set -eu
suite=${1:?which Debian: bookworm or trixie}
if [ "${IN_NAMESPACE:-}" != yes ]; then
    [ "$(id -u)" = 0 ] || { echo "tests/chroot.sh needs root" >&2; exit 3; }
    IN_NAMESPACE=yes exec unshare --mount --propagation private --pid --fork --kill-child "$0" "$@"
fi
shift
[ $# -gt 0 ] || set -- demo test
cd "$(dirname "$0")/.."

. tests/debian.sh

step() {
    started=$(date +%s)
    echo "== $suite: $*"
    inside sh -c 'cd /src && exec "$@"' sh "$@"
    echo "== $suite: $* succeeded in $(($(date +%s) - started)) s"
}

make_root
bootstrap make
take_over_network
unpack_head
echo "== $suite: $(inside cat /etc/debian_version), kernel $(uname -r), $(git rev-parse --short HEAD)"
for target in "$@"; do
    step make "$target"
done
