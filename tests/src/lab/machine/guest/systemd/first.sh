# A new volume, formatted and mounted by its line in fstab.
set -eux
volctl create vol-1 --size 64M
systemctl start volnode-attach@vol-1
mkfs.ext4 -q /dev/volnode/vol-1
udevadm settle
systemctl start mnt-data.mount
yes volnode | head -c 3000000 > /mnt/data/file

# A disk of somebody else's server, by a unit that is named by its URI; its name has a character that udev would replace.
systemd-run --quiet --unit=foreign-server nbdkit -f -i 127.0.0.1 -p 10900 memory 64M
uri=nbd://127.0.0.1:10900/a/b link=/dev/volnode/nbd@127.0.0.1@10900@a%2Fb
systemctl start "volnode-attach@$(systemd-escape "$uri")"
disk=$(readlink -f "$link")
# A partition table with one partition: 67584 sectors from 2048 on.
{ head -c 446 /dev/zero; printf '\0\0\0\0\203\0\0\0\0\010\0\0\0\010\001\0'; head -c 48 /dev/zero; printf '\125\252'; } > "$disk"
blockdev --rereadpt "$disk"
udevadm settle
mkfs.ext4 -q "$disk"p1
udevadm settle
udevadm info --query=symlink "$disk" | tr ' ' '\n' | grep -Fx "${link#/dev/}"
[ "$(readlink -f "$link-part1")" = "$disk"p1 ]
systemctl is-active "$(systemd-escape --path --suffix=device "$link")"
systemctl stop "volnode-attach@$(systemd-escape "$uri")"
[ ! -e "$link" ]

# The same by a unit that a file tells its target. When the server is gone, udev leaves the disk alone and knows what it knew.
mkdir -p /etc/volnode/attach
echo "VOLNODE_ATTACH_TARGET=$uri" > /etc/volnode/attach/foreign.env
systemctl start volnode-attach@foreign
disk=$(readlink -f "$link")
systemctl stop foreign-server
for _ in $(seq 60); do
    ! volctl attachments | grep -F "$uri" | grep -q stalled || break
    sleep 1
done
udevadm trigger --action=change "$disk"
udevadm settle --timeout=30
udevadm info --query=property "$disk" | grep -Fx VOLNODE_STALLED=1
[ "$(readlink -f "$link")" = "$disk" ]
volctl detach --force "$uri"
systemctl stop volnode-attach@foreign
[ ! -e "$link" ]
