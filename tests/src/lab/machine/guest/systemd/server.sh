# The storage server in the unit that ships: everything it does, under its sandbox. The cases are printed as they begin.
set -eEu
export VOLNODE_SERVER=unix:/run/volserver/management.sock
suite=/run/nbd_suite.py
drop_in=/etc/systemd/system/volserver.service.d
image=/tmp/volumes.img
tcp=nbd://127.0.0.1:10809
trap 'echo "failed: $case"; systemctl status --no-pager volserver; journalctl --no-pager -u volserver | tail -n 60' ERR
cases=0
case=installing

begin() { # CASE
    case=$1
    cases=$((cases + 1))
    echo "case: $case"
}
refused() { # COMMAND: it has to fail
    if "$@"; then
        echo "it was not refused: $*"
        return 1
    fi
}
start() { # anew; more often in a minute than the unit allows by itself
    systemctl reset-failed volserver 2> /dev/null || true
    systemctl restart volserver
}
client() { /usr/bin/python3 -I "$suite" "$@"; }
options() { # VARIABLE=VALUE…: starts the server with these
    printf '%s\n' VOLSERVER_EXPORT_BY_NAME=true "$@" > /etc/volnode/volserver.env
    start
}
incarnation() { # VOLUME: its number
    volctl show "$1" --output json | sed -n 's/.*"storage_incarnation": *"[^".]*\.\([0-9]*\).*/\1/p'
}
log_has() { # WORDS
    for _ in $(seq 30); do
        ! journalctl --no-pager -u volserver | grep -q -e "$1" || return 0
        sleep 1
    done
    echo "the log has no line with: $1"
    return 1
}
limit() { # NAME: of the server's process
    awk -v name="$1" 'index($0, name) == 1 { sub(name, ""); print $1 }' "/proc/$(systemctl show -P MainPID volserver)/limits"
}

# As docs/systemd.md says.
install -m 755 "$PROGRAMS/volserver" /usr/local/bin/
cp "$UNITS/volserver.service" /etc/systemd/system/
install -D -m 644 "$UNITS/volnode.sysusers.conf" /etc/sysusers.d/volnode.conf
systemd-sysusers
mkdir -p /var/lib/volnode "$drop_in" /srv/volumes
truncate -s 512M "$image"
mkfs.ext4 -q "$image"
mount -o loop "$image" /var/lib/volnode
systemctl daemon-reload

begin "it starts, as a user of its own, with the limits of the unit"
options
pid=$(systemctl show -P MainPID volserver)
[ "$(stat -c %U "/proc/$pid")" = volnode ]
[ "$(stat -c %U:%G:%a /run/volserver/management.sock)" = volnode:volnode:660 ]
[ "$(limit "Max open files")" = 1048576 ]
[ "$(cat "/sys/fs/cgroup$(systemctl show -P ControlGroup volserver)/pids.max")" = max ]

begin "past the page cache: every command"
volctl create direct --size 64M
client suite "$tcp/direct"
log_has "past the page cache"

begin "without a write cache"
volctl create durable --size 64M --write-cache off
client suite "$tcp/durable"

begin "a memory volume"
volctl create memory --size 64M --backend memory
client suite "$tcp/memory"

begin "a volume that grows"
volctl resize direct --size 96M
[ "$(client size "$tcp/direct")" = $((96 << 20)) ]
client suite "$tcp/direct"

begin "through the page cache: every command, and large reads of what is cached"
options VOLSERVER_CACHE=writeback
volctl create cached --size 64M
client suite "$tcp/cached"
log_has "through the page cache"

begin "a Unix socket"
options VOLSERVER_CACHE=writeback VOLSERVER_LISTEN=127.0.0.1:10809,unix:/run/volserver/nbd.sock
client suite "nbd+unix:///cached?socket=/run/volserver/nbd.sock"

begin "a restart with unflushed writes loses nothing, and says so"
before=$(incarnation cached)
client write "$tcp/cached"
start
client read "$tcp/cached"
[ "$(incarnation cached)" = "$before" ]

begin "so does a server that is killed, and started by the unit"
restarts=$(systemctl show -P NRestarts volserver)
client suite "$tcp/cached"
client write "$tcp/cached"
pid=$(systemctl show -P MainPID volserver)
kill -9 "$pid"
for _ in $(seq 60); do
    if [ "$(systemctl show -P NRestarts volserver)" != "$restarts" ] && volctl list > /dev/null 2>&1; then
        break
    fi
    sleep 1
done
[ "$(systemctl show -P NRestarts volserver)" = $((restarts + 1)) ]
client read "$tcp/cached"
[ "$(incarnation cached)" = "$before" ]

begin "a file system that was mounted anew raises the incarnation"
client write "$tcp/cached"
systemctl stop volserver
cp -a /var/lib/volnode /tmp/older
umount /var/lib/volnode
mount -o loop "$image" /var/lib/volnode
start
client size "$tcp/cached" > /dev/null
[ "$(incarnation cached)" -gt "$before" ]
log_has "the file system was mounted anew"

begin "so does a data directory that was rolled back"
before=$(incarnation cached)
client write "$tcp/cached"
systemctl stop volserver
rm -rf /var/lib/volnode/*
cp -a /tmp/older/. /var/lib/volnode/
start
# Who is the first to open it may be refused.
client size "$tcp/cached" > /dev/null 2>&1 || true
[ "$(incarnation cached)" -gt "$before" ]
client read "$tcp/cached"

begin "what MemoryMax= allows is what it plans with"
systemctl set-property --runtime volserver.service MemoryMax=600M
options VOLSERVER_CONNECTIONS_MAX=64
log_has "allowed_mib=600"
refused volctl create too-large --size 700M --backend memory 2> /tmp/said
grep -q "MemoryMax=" /tmp/said
client suite "$tcp/direct"
systemctl set-property --runtime volserver.service MemoryMax=infinity

begin "TLS, with a certificate of the client"
mkdir -p /etc/volnode/tls /tmp/client
(
    cd /etc/volnode/tls
    authority=(-keyout ca-key.pem -out ca-cert.pem)
    curve=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
    openssl req -x509 "${curve[@]}" -days 3650 -subj "/CN=volnode authority" "${authority[@]}"
    for name in server client; do
        openssl req "${curve[@]}" -subj "/CN=$name" -keyout $name-key.pem -out $name.csr
        [ $name = server ] && names=DNS:localhost,IP:127.0.0.1 || names=URI:volnode:volume/direct
        printf 'basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=%s\n' "$names" > ext
        openssl x509 -req -in $name.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 365 -extfile ext -out $name-cert.pem
    done
) 2> /dev/null
chown -R volnode /etc/volnode/tls
cp /etc/volnode/tls/{ca-cert,client-cert,client-key}.pem /tmp/client
tls=(VOLSERVER_TLS=required VOLSERVER_TLS_CERT=/etc/volnode/tls/server-cert.pem)
tls+=(VOLSERVER_TLS_KEY=/etc/volnode/tls/server-key.pem VOLSERVER_TLS_CLIENT_CA=/etc/volnode/tls/ca-cert.pem)
options "${tls[@]}"
client suite "$tcp/direct" /tmp/client
refused client suite "$tcp/direct" 2> /dev/null
systemctl reload volserver
log_has "certificates reloaded"
client suite "$tcp/direct" /tmp/client

begin "TLS in user space"
options "${tls[@]}" VOLSERVER_TLS_RECORDS=user-space
client suite "$tcp/direct" /tmp/client

begin "another data directory"
truncate -s 256M /tmp/other.img
mkfs.ext4 -q /tmp/other.img
mount -o loop /tmp/other.img /srv/volumes
chown volnode:volnode /srv/volumes
cat > "$drop_in/data.conf" << END
[Unit]
RequiresMountsFor=/srv/volumes
[Service]
Environment=VOLSERVER_DATA_DIR=/srv/volumes
ReadWritePaths=/srv/volumes
END
systemctl daemon-reload
options
[ "$(volctl list | wc -l)" = 1 ]
volctl create elsewhere --size 32M
[ -n "$(ls /srv/volumes/volumes)" ]
client suite "$tcp/elsewhere"

begin "no system call was refused that it cannot do without"
systemctl stop volserver
[ "$(systemctl show -P Result volserver)" = success ]
journalctl --no-pager > /tmp/journal
refused grep -i -e "Bad system call" -e SIGSYS -e status=31/SYS /tmp/journal
# The one that was killed, and no other.
[ "$(journalctl --no-pager -u volserver | grep -c "Main process exited, code=killed")" = 1 ]
trap - ERR
echo "cases: $cases"
