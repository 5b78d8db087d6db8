# The playbook of docs/orchestration.md, on a machine that has nothing of ours: once, a second time, and with new programs.
set -eEu
trap 'systemctl status --no-pager volserver volclient || true; journalctl --no-pager | tail -n 60' ERR
begin() { # CASE
    echo "case: $1"
}
systemctl stop volclient
rm -rf /etc/systemd/system/volclient.service /etc/systemd/system/volnode-* /etc/udev/rules.d/59-volnode.rules /etc/volnode
rm -f /usr/local/bin/volclient /usr/local/bin/volctl
systemctl daemon-reload
mkdir -p /var/lib/volnode /run/programs
mount -t tmpfs programs /run/programs
cp "$PROGRAMS"/volserver "$PROGRAMS"/volclient "$PROGRAMS"/volctl /run/programs
truncate -s 512M /tmp/volumes.img
mkfs.ext4 -q /tmp/volumes.img
mount -o loop /tmp/volumes.img /var/lib/volnode

cat > /run/inventory.yml << END
all:
  vars:
    ansible_connection: local
    ansible_python_interpreter: /usr/bin/python3
    volnode_programs: /run/programs
storage_servers:
  hosts: {localhost: }
  vars:
    volnode_volumes: [{name: db, size: 64M, labels: {app: shop}}]
clients:
  hosts: {localhost: }
  vars:
    volclient_environment:
      VOLCLIENT_SERVER: unix:/run/volserver/management.sock
      VOLNODE_SERVER: unix:/run/volserver/management.sock
      VOLCLIENT_NODE_ID: lab
    volnode_mounts: [{volume: db, path: /mnt/db, fstype: ext4}]
END
export ANSIBLE_LOCALHOST_WARNING=false ANSIBLE_RETRY_FILES_ENABLED=false ANSIBLE_NOCOLOR=true
playbook() { # OUTPUT
    /usr/bin/ansible-playbook -i /run/inventory.yml "$UNITS/ansible/volnode.yml" > "$1" 2>&1 || { cat "$1"; return 1; }
}

begin "a machine with nothing of ours"
playbook /run/first
findmnt --noheadings --output SOURCE,FSTYPE /mnt/db | grep -E "/dev/ublkb[0-9]+ +ext4"
systemctl is-enabled volserver volclient
yes volnode 2> /dev/null | head -c 3000000 > /mnt/db/file

begin "a second time nothing is changed"
playbook /run/second
tail -n 3 /run/second | grep -E "localhost.* changed=0 .* failed=0" || { cat /run/second; false; }

begin "new programs and a larger volume, under writes that do not fail"
before=$(systemctl show -P MainPID volserver volclient)
for program in volserver volclient volctl; do
    # What comes behind an ELF file's sections is not loaded.
    echo new >> "/run/programs/$program"
done
sed -i 's/64M/96M/' /run/inventory.yml
touch /run/writing
(while [ -e /run/writing ]; do dd if=/dev/zero of=/mnt/db/other bs=64k count=4 oflag=direct conv=notrunc status=none || exit 1; done) &
writer=$!
playbook /run/third
rm /run/writing
wait $writer
[ "$(systemctl show -P MainPID volserver volclient)" != "$before" ]
cmp /usr/local/bin/volserver /run/programs/volserver
volctl --server unix:/run/volserver/management.sock list | grep -E "^db +96M"
cmp <(yes volnode 2> /dev/null | head -c 3000000) /mnt/db/file

begin "a volume with data is not formatted"
umount /mnt/db
sed -i 's/ext4/xfs/' /run/inventory.yml
! playbook /run/fourth > /dev/null
mount -t ext4 /dev/volnode/db /mnt/db
cmp <(yes volnode 2> /dev/null | head -c 3000000) /mnt/db/file
umount /mnt/db
systemctl stop volnode-attach@db
trap - ERR
