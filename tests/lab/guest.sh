#!/bin/bash
# Second stage of the guest, process 1 once the root file system is in place: mounts what programs expect, runs
# the job and tells the host how it ended. The host then ends the machine: powering off in here would make the
# kernel flush every disk, and a disk that nobody serves any more does not answer.

die() {
    echo "lab: $*" >&2
    exit 1
}

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc || die "cannot mount /proc"
mount -t sysfs sysfs /sys || die "cannot mount /sys"
mount -t devtmpfs devtmpfs /dev || die "cannot mount /dev"
mkdir -p /dev/pts /dev/shm /run/lock /run/tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /run/tmp
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr

# shellcheck source=/dev/null
source /run/lab/settings

mkdir -p /lib/modules
ln -sfn "$LAB_MODULES" "/lib/modules/$(uname -r)"
# LIO keeps persistent reservations and ALUA states here, and complains about each change if it cannot.
mkdir -p /etc/target/pr /etc/target/alua /var/target/pr /var/target/alua
modprobe -a configfs target_core_mod target_core_user tcm_loop sd_mod sg || die "cannot load the kernel modules"
mount -t configfs configfs /sys/kernel/config || die "cannot mount configfs"
ip link set lo up
echo lab >/proc/sys/kernel/hostname

# The way to the host. Writing into it waits until the host is there, reading does not.
exec {port}<>/dev/vport0p1
record() {
    printf '\036%s %s\036' "$LAB_NONCE" "$*"
}
echo "lab: the job starts" >/dev/kmsg
record started >&"$port"

# The job writes into a pipe and not into the port, which only one process can have open at a time. A record in
# the same pipe behind the job's last byte tells the host that it has seen everything.
mkfifo /run/lab/output
cat /run/lab/output >&"$port" &
exec {output}>/run/lab/output

# The host asks what hangs before it gives up. When it is gone, nobody is left to end this machine.
(
    while read -r _ <&"$port"; do
        ps -ww --deselect --ppid 2 -o pid,ppid,stat,wchan:24,args >/dev/console
        echo w >/proc/sysrq-trigger
        record described >&"$output"
    done
    echo b >/proc/sysrq-trigger
) &

(
    exec {port}<&- </dev/null >&"$output" 2>&1 {output}>&-
    set -a
    # shellcheck source=/dev/null
    source /run/lab/environment
    cd "$LAB_DIRECTORY" && exec setsid --wait /bin/bash /run/lab/job
)
record "exited $?" >&"$output"
while :; do sleep 1000; done
