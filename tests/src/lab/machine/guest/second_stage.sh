# Second stage of the guest, process 1: settles the machine, runs the one command it was booted for, says on the
# console with which exit code that ended, and powers off. Whoever does not read that line in the console log
# counts the run as failed. Written for bash; `/run/lab` is the share with the host.
umask 022
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
mount -t configfs config /sys/kernel/config 2> /dev/null
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
# shellcheck disable=SC1091
. /run/lab/environment
hostname volnode-lab
echo 127.0.0.1 localhost volnode-lab > /etc/hosts
ip link set lo up
echo /sbin/modprobe > /proc/sys/kernel/modprobe
# Processors that the kernel was told to leave asleep until it has done with changing its own code.
for online in /sys/devices/system/cpu/cpu[1-9]*/online; do
    [ ! -e "$online" ] || echo 1 > "$online" || {
        echo "<0>lab-guest: failed: $online" > /dev/kmsg
        echo o > /proc/sysrq-trigger
        sleep 60
    }
done
# A task that has not moved for a minute is worth a stack in the console log.
echo 60 > /proc/sys/kernel/hung_task_timeout_secs
echo "<0>lab-guest: up" > /dev/kmsg

power_off() { # LINE
    echo "<0>lab-guest: $1" > /dev/kmsg
    # No sync: nothing of the guest outlives it but the share, which is not cached, and a stuck block device
    # would make it hang.
    echo o > /proc/sysrq-trigger
    while :; do sleep 60; done
}

port() { # NAME: waits for the virtio port of that name and prints its device
    for _ in $(seq 100); do
        for directory in /sys/class/virtio-ports/*; do
            if [ "$(cat "$directory/name" 2> /dev/null)" = "$1" ]; then
                echo "/dev/${directory##*/}"
                return
            fi
        done
        sleep 0.1
    done
    power_off "failed: there is no port $1"
}

if [ -e /run/lab/prepare.sh ]; then
    # shellcheck disable=SC1091
    . /run/lab/prepare.sh
    exec /lib/systemd/systemd < /dev/console > /dev/console 2>&1
fi

if [ -e /run/lab/interactive ]; then
    setsid --ctty --wait bash /run/lab/command.sh < /dev/hvc0 > /dev/hvc0 2>&1
    power_off "exit $?"
fi

exec 3> "$(port lab.stdout)" 4> "$(port lab.stderr)"
mkfifo /run/stdout /run/stderr
cat < /run/stdout >&3 &
stdout_copier=$!
cat < /run/stderr >&4 &
stderr_copier=$!
exec 3>&- 4>&-
bash /run/lab/command.sh < /dev/null > /run/stdout 2> /run/stderr &
wait $!
code=$?
# The copiers end when the last writer has gone. A daemon the command left behind may hold a pipe open: what it
# has yet to say is not waited for.
for _ in $(seq 30); do
    kill -0 $stdout_copier 2> /dev/null || kill -0 $stderr_copier 2> /dev/null || break
    sleep 0.1
done
power_off "exit $code"
