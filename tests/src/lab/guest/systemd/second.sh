# After a clean shutdown: the file system is mounted when the machine is up, with what was written. Then another disk
# is mounted by hand, both have dirty pages and somebody who waits for a read, and the network goes.
set -eux
# With `nofail` nothing waits for it.
for _ in $(seq 120); do
    ! findmnt /mnt/data || break
    sleep 1
done
cmp <(yes volnode | head -c 3000000) /mnt/data/file
[ -z "$(systemctl --failed --no-legend)" ]
volctl create vol-2 --size 64M
disk=$(volctl attach vol-2)
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/by-hand
for directory in /mnt/data /mnt/by-hand; do
    dd if=/dev/zero of=$directory/dirty bs=64k count=100 status=none
done
ip link set "$(ip -o -4 address show to 10.0.2.15 | cut -d " " -f 2)" down
for device in /dev/volnode/vol-1 "$disk"; do
    dd if="$device" of=/dev/null bs=4k count=1 skip=9000 iflag=direct status=none &
done
sleep 2
