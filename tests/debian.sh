# A fresh Debian in $root, for tests/chroot.sh and tests/vm.sh, which source this; not run by itself.
#
# The caller runs in a mount namespace of its own, so that no mount outlives it. The way to package
# mirrors and to PyPI (proxies, certificates, pip's and apt's settings) is taken over from the host.

make_root() {
    root=$(mktemp -d "${TMPDIR:-/var/tmp}/userswap-$suite.XXXXXX")
    trap remove_root EXIT
    trap 'exit 130' INT TERM HUP
}

unmount_root() { umount -R "$root/proc" "$root/sys" "$root/dev" 2>/dev/null || true; }

remove_root() {
    unmount_root
    rm -rf --one-file-system "$root"
}

mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        grep -m1 '/debian/*$' || true # debootstrap knows a mirror too
}

# bootstrap PACKAGES: the smallest Debian, and these on top, comma-separated
bootstrap() {
    chmod 755 "$root" # an ordinary user has to see the root of the file system
    debootstrap --variant=minbase --include="$1" "$suite" "$root" $(mirror) >"$root.log" 2>&1 ||
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

# HEAD in /src
unpack_head() {
    mkdir "$root/src"
    git archive HEAD | tar -x -C "$root/src"
}
