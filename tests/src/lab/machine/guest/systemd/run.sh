# The command under systemd: its exit code goes to the console, and the machine goes down as it does for everybody.
set -a
. /run/lab/environment
. /etc/volnode/volclient.env
set +a
bash /run/lab/command.sh
echo "<0>lab-guest: exit $?" > /dev/kmsg
systemctl --no-block poweroff
