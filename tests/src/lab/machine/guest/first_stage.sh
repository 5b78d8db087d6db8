#!/bin/busybox sh
# First stage of the guest, process 1 of the initramfs: makes a root out of the host's root (9p, read-only) and a
# tmpfs above it (overlay), mounts what a root needs, and hands over to the second stage. It runs nothing of the
# user's. Every failure is said on the console and powers the machine off.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

fail() {
    echo "<0>lab-guest: failed: $*" > /dev/kmsg
    echo o > /proc/sysrq-trigger
    sleep 60
}
share() { # TAG DIRECTORY OPTIONS
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" || fail "mounting the share $1"
}

while read -r module; do
    insmod "/modules/$module" || fail "loading $module"
done < /modules/order

share host /lower cache=loose,ro
mount -t tmpfs -o size=75% upper /upper || fail "mounting a tmpfs"
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /newroot || fail "mounting the overlay"

cd /newroot || fail "entering the new root"
mkdir -p proc sys dev tmp run mnt lib/modules
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mount -t tmpfs -o mode=1777,size=50% tmp tmp
mount -t tmpfs -o mode=755 run run
mount -t tmpfs mnt mnt
mkdir run/lab
share lab run/lab cache=none
share modules lib/modules cache=loose,ro
# /tmp, /run and /mnt are the guest's own; what the user works on there stays visible.
while read -r path; do
    mkdir -p "/newroot$path" && mount --bind "/lower$path" "/newroot$path" || fail "showing $path"
done < run/lab/visible
umount /proc /sys
exec switch_root /newroot /bin/bash /run/lab/second_stage.sh
fail "no /bin/bash on the host"
