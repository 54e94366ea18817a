#!/bin/sh
# First process of the guest, run by busybox from the initramfs: it makes the host's root file system the
# guest's and hands over to guest.sh. If it exits the kernel panics, and the host reports that with this console.

die() {
    echo "lab: $*" >&2
    exit 1
}

mount -t proc proc /proc || die "cannot mount /proc"
while read -r module; do
    insmod "/modules/$module" || die "cannot load the kernel module $module"
done </modules.list

# The host is mounted read-only; what the guest writes lands in memory and is gone with it.
options=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o "ro,cache=loose,$options" host /host || die "cannot mount the host's root file system"
mount -t tmpfs -o size=75% tmpfs /memory || die "cannot mount a tmpfs"
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /new ||
    die "cannot lay the overlay over the host's root file system"

mount -t tmpfs -o mode=755 tmpfs /new/run || die "cannot mount a tmpfs at /run"
mkdir /new/run/lab /new/run/lab/shared
cp /job/* /new/run/lab/
# The one directory that the guest shares with the host for writing, and without a cache: what a program has
# written the host has, whatever happens to the guest afterwards.
mount -t 9p -o "rw,cache=none,$options" shared /new/run/lab/shared || die "cannot mount the shared directory"

umount /proc
exec switch_root /new /bin/bash /run/lab/guest.sh
