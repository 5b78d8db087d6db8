# After a clean shutdown, behind rebooted.sh: another disk is mounted by hand, both have dirty pages and somebody who
# waits for a read, and the network goes.
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
