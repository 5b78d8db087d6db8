# A new volume, formatted and mounted by its line in fstab.
set -eux
volctl create vol-1 --size 64M
systemctl start volnode-attach@vol-1
mkfs.ext4 -q /dev/volnode/vol-1
udevadm settle
systemctl start mnt-data.mount
yes volnode | head -c 3000000 > /mnt/data/file
