# Makes the guest a machine that systemd runs, with the units of `deploy/` installed as docs/systemd.md says. Sourced by
# the second stage before it becomes systemd. PROGRAMS, UNITS and SERVER are set.
for program in volclient volctl; do
    ln -sf "$PROGRAMS/$program" /usr/local/bin/
done
cp "$UNITS"/volclient.service "$UNITS"/volnode-*.service /etc/systemd/system/
mkdir -p /etc/udev/rules.d /etc/volnode /mnt/data /mnt/by-hand
cp "$UNITS"/59-volnode.rules /etc/udev/rules.d/
cat > /etc/volnode/volclient.env << END
VOLCLIENT_SERVER=$SERVER
VOLNODE_SERVER=$SERVER
VOLCLIENT_NODE_ID=lab
END
fstab=_netdev,nofail,x-systemd.requires=volnode-attach@vol-1.service,x-systemd.before=volnode-stall-limit.service
case $SERVER in
# On the storage server itself there are no disks.
unix:*) : > /etc/fstab ;;
*) echo "/dev/volnode/vol-1 /mnt/data ext4 $fstab 0 2" > /etc/fstab ;;
esac
echo 0123456789abcdef0123456789abcdef > /etc/machine-id
cat > /etc/systemd/system/lab.service << END
[Unit]
After=basic.target remote-fs.target network-online.target
[Service]
ExecStart=/bin/bash /run/lab/run.sh
StandardOutput=file:$(port lab.stdout)
StandardError=inherit
END
# Only what the machine needs: what else the host has installed is not asked for.
cat > /etc/systemd/system/lab.target << END
[Unit]
Requires=basic.target
After=basic.target
Wants=systemd-udevd.service systemd-udev-trigger.service volclient.service remote-fs.target lab.service
END
ln -sf lab.target /etc/systemd/system/default.target
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
