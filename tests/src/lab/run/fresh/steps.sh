# What a newcomer does on a fresh machine: sets up what both commands of the README need, then runs tests.
# Arguments: the umask, the command that runs the tests, and the congestion controls of which the first that is to be had becomes
# the default. Lines that begin with `fresh-` are for the lab that started this; everything else is for the reader.
set -u
umask "$1"
export tests="$2"
shift 2
# What Debian gives a login (systemd's DefaultLimitNOFILE), whatever the outer machine gave us.
# shellcheck disable=SC3045 # Debian's sh has it.
ulimit -S -n 1024
cd "$HOME/volnode" || exit
# What is built once is built faster without.
export CARGO_INCREMENTAL=0

echo "fresh-step: cargo lab setup"
cargo lab setup || exit

echo "fresh-step: $tests"
# The tests have the network namespace's loopback and nothing else; what is not here by now is not needed.
export CARGO_NET_OFFLINE=true
# Not exec: this shell is process 1 of its namespace and has to wait for processes whose parents are gone.
# shellcheck disable=SC2016 # For the inner shell.
unshare --net /bin/sh -c '
    ip link set lo up || exit
    mount -o remount,bind,rw /proc/sys/net || exit
    for control; do
        # Not every kernel has each of them, and a network namespace may set only those that the machine allows everybody.
        if echo "$control" 2> /dev/null > /proc/sys/net/ipv4/tcp_congestion_control; then break; fi
    done
    read -r default < /proc/sys/net/ipv4/tcp_congestion_control
    read -r allowed < /proc/sys/net/ipv4/tcp_allowed_congestion_control
    echo "fresh-sysctls: $default is the default congestion control, allowed are: $allowed"
    # shellcheck disable=SC2086 # One word for each that the user wrote is what is wanted.
    exec $tests' sh "$@"
status=$?
exit "$status"
