#!/bin/sh
# Runs the loss tests and the demonstration on Debian's kernels: tests/vm.sh 6.1|6.12...
#
# By hand, as root on Debian 12, with debootstrap and qemu-system-x86 installed. HEAD is built in a
# fresh Debian, whose root becomes a disk; each kernel boots it in a virtual machine of its own, with
# control groups version 2 and without a network. Linux 6.1 has no UFFDIO_MOVE: there the mover is
# `protect`. Kernels are downloaded once, into ~/.cache/userswap-vm.
#
#   USERSWAP_VM_SLOW=N      how many times as long as on this machine tests may take
#                           (12 where the machine is emulated, 2 with KVM)
#   USERSWAP_VM_TESTS=...   arguments of pytest in place of the usual choice of tests
#   USERSWAP_VM_SECONDS=N   the most that one machine may run (7200)
set -eu
[ $# -gt 0 ] || set -- 6.1 6.12
[ "$(id -u)" = 0 ] || { echo "tests/vm.sh needs root" >&2; exit 3; }
for program in debootstrap qemu-system-x86_64 mkfs.ext4 xz; do
    command -v $program >/dev/null && continue
    echo "tests/vm.sh needs $program: apt-get install debootstrap qemu-system-x86 e2fsprogs xz-utils" >&2
    exit 3
done
if [ "${IN_NAMESPACE:-}" != yes ]; then
    IN_NAMESPACE=yes exec unshare --mount --propagation private --pid --fork --kill-child "$0" "$@"
fi
cd "$(dirname "$0")/.."
suite=bookworm
cache=${XDG_CACHE_HOME:-$HOME/.cache}/userswap-vm
mkdir -p "$cache"
. tests/debian.sh

# An hypervisor's guest may have the device and not what it needs.
if [ -w /dev/kvm ] && grep -qE '^flags.* (vmx|svm) ' /proc/cpuinfo; then
    accelerator="-accel kvm -cpu host" slow=2
else
    accelerator="-accel tcg,thread=multi,tb-size=512 -cpu max,la57=off" slow=12
fi
slow=${USERSWAP_VM_SLOW:-$slow}

# fetch_kernel SERIES: $version, with the package's files in $files
fetch_kernel() {
    case $1 in 6.1) package=linux-image-amd64 ;; *) package=linux-image-$1-amd64 ;; esac
    package=$(apt-cache depends "$package" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p')
    version=${package#linux-image-}
    [ -n "$version" ] || { echo "no kernel $1 in the package lists: apt-get update" >&2; exit 3; }
    files=$cache/$version
    [ ! -e "$files/complete" ] || return 0
    echo "== downloading $package"
    (cd "$cache" && apt-get download -q "$package" >/dev/null 2>&1) || { echo "no $package" >&2; exit 3; }
    rm -rf "$files"
    dpkg-deb -x "$cache/$package"_*.deb "$files"
    rm "$cache/$package"_*.deb
    touch "$files/complete"
}

# What the kernel needs before it can mount its disk: $1/initrd
make_initrd() {
    early=$1/early
    mkdir -p "$early/bin" "$early/modules" "$early/disk"
    cp "$root/bin/busybox" "$early/bin/"
    mkdir -p "$root/lib/modules"
    mount --bind "$files/lib/modules" "$root/lib/modules"
    inside depmod "$version"
    number=10
    inside modprobe -a -S "$version" --show-depends virtio_pci virtio_blk ext4 |
        sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' >"$1/order"
    while read -r module; do
        case $module in
        *.xz) xz -dc "$root$module" ;;
        *) cat "$root$module" ;;
        esac >"$early/modules/$number.ko"
        number=$((number + 1))
    done <"$1/order"
    umount "$root/lib/modules"
    cat >"$early/init" <<'EOI'
#!/bin/busybox sh
for module in /modules/*; do /bin/busybox insmod $module; done
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t ext4 /dev/vda /disk
exec /bin/busybox switch_root /disk /vm/init
EOI
    chmod +x "$early/init"
    (cd "$early" && find . | "$root/bin/busybox" cpio -o -H newc 2>/dev/null) >"$1/initrd"
}

# What runs in the machine, as its first process
make_steps() {
    mkdir -p "$root/vm"
    cat >"$root/vm/init" <<'EOI'
#!/bin/sh
export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TERM=dumb COLUMNS=100
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
exec </dev/null >/dev/ttyS0 2>&1
cd /src
sh /vm/steps
echo "machine: status $?"
sync
echo o >/proc/sysrq-trigger
sleep 60
EOI
    cat >"$root/vm/steps" <<EOI
mover=move
[ "$1" != 6.1 ] || mover=protect
export USERSWAP_TEST_MOVER=\$mover USERSWAP_TEST_SLOW=$slow
echo "== Linux \$(uname -r), mover \$mover, control groups: \$(cat /sys/fs/cgroup/cgroup.controllers)"
.venv/bin/userswap doctor --problems
failed=0
.venv/bin/pytest -q -p no:cacheprovider --timeout=\$((120 * $slow)) --durations=5 \\
    ${USERSWAP_VM_TESTS:-$(usual_tests "$1")} || failed=1
make demo ARGS='--size 64MiB' >/tmp/demo 2>&1 || failed=1 # not a terminal: without progress
cat /tmp/demo
exit \$failed
EOI
    chmod +x "$root/vm/init"
}

# No protection sees direct I/O that takes long.
usual_tests() {
    but=
    [ "$1" != 6.1 ] || but="--deselect tests/test_loss.py::test_direct_reads_race_with_eviction"
    echo tests/test_loss.py tests/test_canary.py tests/test_full_store.py tests/test_deaths.py $but
}

run_machine() {
    fetch_kernel "$1"
    work=$root.machine
    rm -rf "$work"
    mkdir "$work"
    make_initrd "$work"
    make_steps "$1"
    unmount_root
    truncate -s 4G "$work/disk"
    mkfs.ext4 -q -d "$root" "$work/disk"
    started=$(date +%s)
    # shellcheck disable=SC2086  # one word per option
    timeout "${USERSWAP_VM_SECONDS:-7200}" qemu-system-x86_64 -M pc $accelerator -smp 2 -m 3072 \
        -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$files/boot/vmlinuz-$version" -initrd "$work/initrd" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr" \
        -drive "file=$work/disk,format=raw,if=virtio,cache=unsafe" -device virtio-rng-pci \
        -serial stdio </dev/null | tee "$work/console" || true
    echo "== $1: $(($(date +%s) - started)) s"
    grep -q '^machine: status 0' "$work/console" || failed=1
    rm -rf "$work"
}

failed=0
make_root
trap 'remove_root; rm -rf "$root.machine"' EXIT
bootstrap make,busybox-static,kmod
take_over_network
unpack_head
inside make -C /src build
for series in "$@"; do
    mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
    run_machine "$series"
done
exit $failed
