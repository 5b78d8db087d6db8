# Process 1 of a fresh machine's namespaces: gives the tree in $1 what a kernel and its devices give to a machine, the Rust
# toolchain in $2, and becomes `sh -c "$3" steps REST…` in it, with what is in $4 (lines NAME=VALUE) as its environment.
# The mounts are in a namespace of their own and go with it. What is bound from the outer machine is either a device that keeps
# nothing or cannot be written to; its settings can be changed only where they are a network namespace's own or a loop device's.
set -eu
exec 2>&1
umask 022
# The root must be a mount to become one.
mount --bind "$1" "$1"
cd "$1"
toolchain=$2
steps=$3
environment=$4
shift 4

mount -t proc -o nosuid,nodev,noexec proc proc
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,ro proc/sys
# Nobody else's network is set up here: the tests get a namespace and `remount,bind,rw` it.
mount -o remount,bind,ro proc/sys/net
if [ -e proc/sysrq-trigger ]; then
    mount --bind proc/sysrq-trigger proc/sysrq-trigger
    mount -o remount,bind,ro proc/sysrq-trigger
fi
mount -t sysfs -o nosuid,nodev,noexec sysfs sys
# Tests that make a loop device say how its queue is.
mount --bind sys/devices/virtual/block sys/devices/virtual/block
mount -o remount,bind,ro sys

mount -t tmpfs -o mode=755,nosuid,noexec dev dev
# Loop devices because tests make file systems on them; they let go of their files when the last mount is gone.
for device in null zero full random urandom tty loop-control /dev/loop[0-9]*; do
    device=${device#/dev/}
    if [ -e "/dev/$device" ]; then
        : > "dev/$device"
        mount --bind "/dev/$device" "dev/$device"
    fi
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,mode=620,ptmxmode=666,nosuid,noexec devpts dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr

mkdir -p opt/rust
mount --bind "$toolchain" opt/rust
mount -o remount,bind,ro opt/rust

# Not chroot: of the outer machine nothing stays, and what is mounted inside is seen as on a machine of its own.
mkdir -p mnt/outer
pivot_root . mnt/outer
cd /
umount -l /mnt/outer
rmdir /mnt/outer

IFS='
'
set -f
# shellcheck disable=SC2086 # One word for each line is what is wanted.
exec env -i $environment /bin/sh -c "$steps" steps "$@"
