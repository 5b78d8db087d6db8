# A node of `cargo lab kubernetes`, in an emulated machine: containerd, the node daemon and kubelet, and then whatever the lab
# asks for by files in the exchange. Variables: NODE, ADDRESS, POD_NETWORK, KUBELET_PORT, API_PORT, SERVER, CLUSTER (a directory of
# this machine's with bin/, images/ and kubeconfigs), TOOLS (the programs of Kubernetes). Written for bash.
set -u
E=/run/exchange
mkdir -p $E && mount -t 9p -o trans=virtio,version=9p2000.L,cache=none exchange $E || exit 1
mkdir -p $E/todo $E/done $E/logs
step() { echo "$(cut -d ' ' -f 1 /proc/uptime) $*" >> $E/steps; }
step "the machine is up"

mount --make-rshared /
# What containers and kubelet keep is on a disk: memory is for programs.
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=1,lazy_journal_init=1 /dev/vda && mount /dev/vda /var/lib || exit 1
mkdir -p /var/lib/kubelet/seccomp /var/lib/containerd /var/lib/cni /etc/cni/net.d /var/log/pods
hostname "$NODE"
ip link set eth0 up
ip address add "$ADDRESS/24" dev eth0
ip route add default via 10.0.2.2
# loop is kubelet's: it holds raw block volumes by a loop device.
for module in overlay br_netfilter veth bridge nf_tables nft_chain_nat nft_masq nft_nat loop ublk_drv; do
    modprobe $module || echo "no module $module"
done
echo 1 > /proc/sys/net/ipv4/ip_forward
# Pods reach what the node reaches, and the API server at its service's address: no kube-proxy is needed for one service.
nft -f - << N
table ip lab {
    chain out { type nat hook postrouting priority srcnat; ip saddr $POD_NETWORK oifname eth0 masquerade; }
    chain in { type nat hook prerouting priority dstnat; ip daddr 10.96.0.1 tcp dport 443 dnat to 10.0.2.2:$API_PORT; }
}
N
cat > /etc/cni/net.d/10.conflist << N
{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
 "ipam": {"type": "host-local", "ranges": [[{"subnet": "$POD_NETWORK"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
N
cat > /run/containerd.toml << N
version = 3
root = '/var/lib/containerd'
state = '/run/containerd'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'docker.io/volnode-lab/box:1'
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/usr/lib/cni']
  conf_dir = '/etc/cni/net.d'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = false
N
cat > /run/kubelet.yaml << N
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
failSwapOn: false
port: $KUBELET_PORT
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
evictionHard: {memory.available: "50Mi", nodefs.available: "0%", imagefs.available: "0%"}
enforceNodeAllocatable: []
featureGates: {CSIVolumeHealth: true}
resolvConf: ""
N

# Each ends when it is told to, and not with the shell that started it.
start_containerd() {
    PATH=$TOOLS:$PATH setsid "$TOOLS/containerd" -c /run/containerd.toml >> $E/logs/containerd.log 2>&1 < /dev/null &
    echo $! > /run/containerd.pid
}
start_kubelet() {
    setsid "$TOOLS/kubelet" --kubeconfig="$CLUSTER/$NODE.kubeconfig" --config=/run/kubelet.yaml --hostname-override="$NODE" \
        --node-ip="$ADDRESS" >> $E/logs/kubelet.log 2>&1 < /dev/null &
    echo $! > /run/kubelet.pid
}
start_daemon() {
    # shellcheck disable=SC2086
    setsid "$CLUSTER/bin/volclient" serve --server "$SERVER" --node-id "$NODE" --run-dir /run/volnode ${DAEMON_OPTIONS-} \
        >> $E/logs/volclient.log 2>&1 < /dev/null &
    echo $! > /run/daemon.pid
}
mkdir -p -m 700 /run/volnode
start_containerd
start_daemon
for _ in $(seq 600); do
    "$TOOLS/ctr" version > /dev/null 2>&1 && break
    sleep 0.5
done
step "containerd answers"
import() { "$TOOLS/ctr" -n k8s.io images import --local "$1" || exit 1; }
import "$CLUSTER/images/box.tar"
start_kubelet
step "kubelet is started"
# The plugin's first: sidecars give up where it is not there.
import "$CLUSTER/images/volcsi.tar"
step "the plugin's image is there"
for image in "$CLUSTER"/images/csi-*.tar; do
    import "$image"
done
step "the images are there"

# What the lab asks for: N.sh in todo, answered by N.out and N.rc in done.
mkfifo /run/never
exec 9<> /run/never
while :; do
    for file in $E/todo/*.sh; do
        [ -e "$file" ] || continue
        number=${file##*/}
        number=${number%.sh}
        # shellcheck disable=SC1090
        ( . "$file" ) > "$E/done/$number.out" 2>&1 < /dev/null
        echo $? > "$E/done/$number.rc.new"
        rm -f "$file"
        mv "$E/done/$number.rc.new" "$E/done/$number.rc"
    done
    read -r -t 0.2 -u 9 _
done
