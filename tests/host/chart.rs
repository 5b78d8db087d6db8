//! `deploy/kubernetes`: the chart, what helm renders of it, and that what is rendered is right: by Kubernetes' own schemas, by the programs
//! that it starts, and by itself.
//!
//! Owns: the value sets, and reading a manifest. What a rendered container does when it is started: `chart/pods.rs`. Never: talks to a
//! cluster.

mod pods;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde::Deserialize as _;
use serde_json::Value;

use super::images::is_there;
use super::programs;

/// The options of `helm template`, and what they render: from the repository's root.
const RENDERED: [(&[&str], &str); 4] = [
    (&["--set", "namespace.create=true"], "deploy/kubernetes/volnode.yaml"),
    (&["--values", "tests/host/chart/inside.values.yaml"], "tests/host/chart/inside.yaml"),
    (&["--values", "tests/host/chart/smallest.values.yaml"], "tests/host/chart/smallest.yaml"),
    (&["--values", "tests/host/chart/pod.values.yaml"], "tests/host/chart/pod.yaml"),
];
const CHART: &str = "deploy/kubernetes/volnode";
const RBAC: &str = include_str!("chart/rbac.txt");
/// The oldest Kubernetes that the chart is for, and the newest whose schemas the lab has.
const KUBERNETES: [&str; 2] = ["1.34", "1.37"];
/// Of definitions that a cluster adds.
const FOREIGN: [(&str, &str); 2] = [
    ("VolumeSnapshotClass", "snapshot.storage.k8s.io/v1"),
    ("VolumeGroupSnapshotClass", "groupsnapshot.storage.k8s.io/v1"),
];
/// Of images that have our programs.
const OUR_IMAGES: &str = "volnode/";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Whether the programs are there that `cargo lab test` installs.
fn are_there(programs: &[&str]) -> bool {
    let missing: Vec<&&str> = programs.iter().filter(|program| !is_there(program)).collect();
    let is_promised = std::env::var_os("VOLNODE_LAB_TOOLS").is_some_and(|value| value == "1");
    assert!(!is_promised || missing.is_empty(), "cannot run: no {missing:?}");
    if !missing.is_empty() {
        println!("SKIP no {missing:?}, which `cargo lab test` installs");
    }
    missing.is_empty()
}

/// Helm, which neither reads nor leaves anything of the user's.
fn helm(arguments: &[&str]) -> Output {
    let home = tempfile::tempdir().unwrap();
    let mut helm = Command::new("helm");
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        helm.env(variable, home.path());
    }
    helm.env_remove("KUBECONFIG").env("HELM_NAMESPACE", "volnode");
    helm.current_dir(root()).args(arguments).output().unwrap()
}

fn template(options: &[&str]) -> Output {
    helm(&[&["template", "volnode", CHART, "--namespace", "volnode"][..], options].concat())
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The documents of a manifest.
fn documents(text: &str) -> Vec<Value> {
    let documents =
        yaml_serde::Deserializer::from_str(text).map(|document| Value::deserialize(document).unwrap());
    documents.filter(|document| !document.is_null()).collect()
}

/// What is committed, by the name of its file.
fn committed() -> Vec<(&'static str, Vec<Value>)> {
    let read = |file: &str| documents(&fs::read_to_string(root().join(file)).unwrap());
    RENDERED.map(|(_, file)| (file, read(file))).into()
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A container, and the pod that it is in.
#[derive(Debug, Clone, Copy)]
struct Container<'a> {
    pod: &'a Value,
    container: &'a Value,
}

impl<'a> Container<'a> {
    /// All containers of a manifest.
    fn all(documents: &'a [Value]) -> Vec<Self> {
        let pods = documents.iter().map(|document| &document["spec"]["template"]["spec"]);
        let of_pod =
            |pod: &'a Value| list(&pod["containers"]).iter().map(move |container| Self { pod, container });
        pods.flat_map(of_pod).collect()
    }

    /// Those with our programs.
    fn ours(documents: &'a [Value]) -> Vec<Self> {
        let mut found = Self::all(documents);
        found.retain(|container| text(&container.container["image"]).starts_with(OUR_IMAGES));
        found
    }

    /// The name of our program that it runs.
    fn program(&self) -> &'a str {
        let [command, ..] = list(&self.container["command"]) else { panic!("{}", self.container["command"]) };
        let name = text(command).strip_prefix("/usr/local/bin/").unwrap();
        assert!(text(&self.container["image"]).starts_with(&format!("{OUR_IMAGES}{name}:")), "{name}");
        name
    }

    /// The words between the program and its options.
    fn subcommand(&self) -> Vec<&'a str> {
        list(&self.container["command"]).iter().skip(1).map(text).collect()
    }

    fn arguments(&self) -> Vec<&'a str> {
        list(&self.container["args"]).iter().map(text).collect()
    }

    /// The value of `--name=value`.
    fn option(&self, name: &str) -> Option<&'a str> {
        self.arguments().into_iter().find_map(|argument| argument.strip_prefix(name)?.strip_prefix('='))
    }

    /// Its mounts by path, and the volume of each.
    fn mounts(&self) -> BTreeMap<&'a str, (&'a Value, &'a Value)> {
        let volume = |mount: &Value| {
            let mut volumes = list(&self.pod["volumes"]).iter();
            let found = volumes.find(|volume| volume["name"] == mount["name"]);
            // A StatefulSet's claims are beside the pod.
            found.unwrap_or(&Value::Null)
        };
        let mounts = list(&self.container["volumeMounts"]).iter();
        mounts.map(|mount| (text(&mount["mountPath"]), (mount, volume(mount)))).collect()
    }
}

#[test]
fn helm_takes_the_chart_without_a_warning() {
    if !are_there(&["helm"]) {
        return;
    }
    for (options, _) in RENDERED {
        let output = helm(&[&["lint", "--strict", "--quiet", CHART][..], options].concat());
        assert!(output.status.success(), "{options:?}: {}", said(&output));
    }
}

#[test]
fn what_is_committed_is_what_helm_renders() {
    if !are_there(&["helm"]) {
        return;
    }
    for (options, file) in RENDERED {
        let output = template(options);
        assert!(output.status.success(), "{}", said(&output));
        let rendered = String::from_utf8(output.stdout).unwrap();
        let is = fs::read_to_string(root().join(file)).unwrap();
        let options = options.join(" ");
        let differs = rendered.lines().zip(is.lines()).position(|(one, other)| one != other);
        assert!(
            rendered == is,
            "{file} differs from line {differs:?}: helm template volnode {CHART} --namespace volnode {options} > {file}"
        );
    }
}

#[test]
fn values_that_cannot_be_are_refused_by_name() {
    if !are_there(&["helm"]) {
        return;
    }
    for (set, why) in [
        ("server.uri=storage-1:10810", "/server/uri"),
        ("server.uri=unix:/run/x.sock", "/server/uri"),
        ("server.url=https://s", "'url' not allowed"),
        ("nodes.log=info", "'nodes' not allowed"),
        ("tls.enabled=false", "server.uri is https://, and tls.enabled is false"),
        ("server.uri=http://s", "server.uri is http://, and tls.enabled is true"),
        ("kubelet.directory=var/lib/kubelet", "/kubelet/directory"),
        ("kubelet.directory=/var/lib/../kubelet", "/kubelet/directory"),
        ("images.volcsi=volnode/volcsi", "/images/volcsi"),
        ("images.pullPolicy=Sometimes", "/images/pullPolicy"),
        ("controller.replicas=0", "/controller/replicas"),
        ("controller.timeoutSeconds=1", "/controller/timeoutSeconds"),
        ("node.maxVolumes=257", "/node/maxVolumes"),
        ("node.maxUnavailable=0", "/node/maxUnavailable"),
        ("healthz.port=80", "/healthz/port"),
        ("csiDriver.nodeAllocatableUpdatePeriodSeconds=9", "/csiDriver/nodeAllocatableUpdatePeriodSeconds"),
        ("storageClasses[0].fsType=btrfs", "/storageClasses/0"),
        (
            "storageClasses[0].name=a,storageClasses[0].parameters.encrypted=yes",
            "invalid propertyName 'encrypted'",
        ),
        (
            "storageClasses[0].name=a,storageClasses[0].passphraseSecret.namespace=b",
            "/storageClasses/0/passphraseSecret",
        ),
        (
            "volumeAttributesClasses[0].name=x,volumeAttributesClasses[0].parameters.readiops=1",
            "/volumeAttributesClasses/0",
        ),
        ("dataDaemon.model=vm", "/dataDaemon/model"),
        ("dataDaemon.model=pod,tls.nodeSecret=x", "dataDaemon.model pod needs tls.nodeDirectory"),
        ("snapshots.deletionPolicy=Keep", "/snapshots/deletionPolicy"),
        ("snapshots.enabled=false,snapshots.groups=true", "snapshots.groups needs snapshots.enabled"),
        ("volserver.enabled=true", "volserver.enabled needs volserver.clusterIP"),
        ("volserver.clusterIP=10.96.1", "/volserver/clusterIP"),
        (
            "volserver.enabled=true,volserver.clusterIP=10.96.1.1,tls.enabled=false,server.uri=http://s",
            "volserver.enabled needs tls.enabled",
        ),
        ("volserver.seccompProfile=/etc/x.json", "/volserver/seccompProfile"),
        (
            "storageClasses[0].name=a,storageClasses[0].default=true,storageClasses[1].name=b,storageClasses[1].default=true",
            "more than one of storageClasses",
        ),
    ] {
        let output = template(&["--set", set]);
        assert!(!output.status.success(), "{set} is taken");
        assert!(said(&output).contains(why), "{set}: {}", said(&output));
    }
}

/// What `kubernetes-validate` says of a manifest.
fn validate(version: &str, file: &Path) -> Output {
    Command::new("kubernetes-validate").args(["--strict", "-k", version]).arg(file).output().unwrap()
}

#[test]
fn manifests_are_of_kubernetes() {
    if !are_there(&["kubernetes-validate"]) {
        return;
    }
    for (file, documents) in committed() {
        // The schemas know nothing of what is a cluster's own: that is looked at below.
        let foreign: Vec<&Value> = FOREIGN.iter().flat_map(|(kind, _)| of_kind(&documents, kind)).collect();
        for version in KUBERNETES {
            let output = validate(version, &root().join(file));
            let said = said(&output);
            assert!(output.status.success(), "{file}, {version}: {said}");
            let passed = said.matches(" passed for ").count();
            assert_eq!(passed, documents.len() - foreign.len(), "{file}, {version}: {said}");
        }
        for class in foreign {
            let keys: BTreeSet<&str> = class.as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(keys, ["apiVersion", "deletionPolicy", "driver", "kind", "metadata"].into());
            assert!(FOREIGN.iter().any(|(kind, api)| class["kind"] == *kind && class["apiVersion"] == *api));
        }
    }
    // One that is wrong is found.
    let wrong = tempfile::NamedTempFile::new().unwrap();
    let plain = fs::read_to_string(root().join(RENDERED[0].1)).unwrap();
    fs::write(wrong.path(), plain.replace("seLinuxMount: true", "selinuxMount: true")).unwrap();
    let output = validate(KUBERNETES[1], wrong.path());
    assert!(!output.status.success() && said(&output).contains("selinuxMount"), "{}", said(&output));
}

#[test]
fn every_option_is_one_of_the_program_that_it_is_for() {
    let built = programs::directory();
    let parse = |program: &str, subcommand: &[&str], arguments: &[&str]| {
        let mut command = Command::new(built.join(program));
        // What comes before it is parsed, and its values. A subcommand has no version of its own.
        let last = if subcommand.is_empty() { "--version" } else { "--help" };
        command.env_clear().args(subcommand).args(arguments).arg(last).output().unwrap()
    };
    let mut count = 0;
    for (file, documents) in committed() {
        for container in Container::ours(&documents) {
            let (program, arguments) = (container.program(), container.arguments());
            let subcommand = container.subcommand();
            let output = parse(program, &subcommand, &arguments);
            assert!(output.status.success(), "{file}: {program} {arguments:?}: {}", said(&output));
            let expected = match subcommand.is_empty() {
                true => format!("{program} {}", env!("CARGO_PKG_VERSION")),
                false => format!("Usage: {program} {} ", subcommand.join(" ")),
            };
            assert!(said(&output).contains(&expected), "{}", said(&output));
            for (at, argument) in arguments.iter().enumerate() {
                // The option alone, and not another that stands for it.
                let mut misspelt = arguments.clone();
                let other = argument.replacen("--", "--x-", 1);
                misspelt[at] = &other;
                assert!(!parse(program, &subcommand, &misspelt).status.success(), "{program} takes {other}");
                count += 1;
            }
        }
    }
    assert!(count > 40, "{count}");
}

#[test]
fn roles_have_each_verb_that_has_a_reason_and_no_other() {
    let mut reasons = BTreeSet::new();
    for line in RBAC.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let entry = [(); 3].map(|()| words.next().unwrap().to_owned());
        assert!(words.next().is_some(), "without a reason: {line}");
        assert!(reasons.insert(entry), "twice: {line}");
    }
    let rules = |documents: &[Value]| {
        let mut found = BTreeSet::new();
        let roles = [of_kind(documents, "ClusterRole"), of_kind(documents, "Role")].concat();
        for role in roles {
            for rule in list(&role["rules"]) {
                let keys: Vec<&String> = rule.as_object().unwrap().keys().collect();
                assert_eq!(keys, ["apiGroups", "resources", "verbs"]);
                for (group, resource, verb) in list(&rule["apiGroups"]).iter().flat_map(|group| {
                    let resources = list(&rule["resources"]).iter();
                    resources.flat_map(move |resource| {
                        list(&rule["verbs"]).iter().map(move |verb| (group, resource, verb))
                    })
                }) {
                    let resource = format!("{}/{}", text(group), text(resource));
                    let entry =
                        [text(&role["metadata"]["name"]), resource.trim_start_matches('/'), text(verb)];
                    assert!(found.insert(entry.map(str::to_owned)), "twice: {entry:?}");
                }
            }
        }
        found
    };
    for (file, documents) in committed() {
        // What is not asked for needs no rights.
        let mut wanted = reasons.clone();
        let has = |kind: &str| !of_kind(&documents, kind).is_empty();
        let (snapshots, groups) = (has("VolumeSnapshotClass"), has("VolumeGroupSnapshotClass"));
        wanted.retain(|[role, resource, _]| {
            let is_of_snapshots =
                role == "volnode-snapshotter" || resource.starts_with("snapshot.storage.k8s.io/");
            let is_of_groups = resource.starts_with("groupsnapshot.storage.k8s.io/");
            (snapshots || !is_of_snapshots) && (groups || !is_of_groups)
        });
        let found = rules(&documents);
        let (more, fewer) = (found.difference(&wanted), wanted.difference(&found));
        assert!(
            found == wanted,
            "{file}: more {:?}, fewer {:?}",
            more.collect::<Vec<_>>(),
            fewer.collect::<Vec<_>>()
        );
        // Each role is the controller's, and nobody else has any.
        let bindings =
            [of_kind(&documents, "ClusterRoleBinding"), of_kind(&documents, "RoleBinding")].concat();
        let bound: BTreeSet<&str> =
            bindings.iter().map(|binding| text(&binding["roleRef"]["name"])).collect();
        let roles: BTreeSet<&str> = found.iter().map(|[role, ..]| role.as_str()).collect();
        assert_eq!(bound, roles, "{file}");
        for binding in bindings {
            let [subject] = list(&binding["subjects"]) else { panic!("{binding}") };
            assert_eq!(subject["kind"], "ServiceAccount");
            assert_eq!(subject["name"], "volnode-controller");
        }
    }
}

#[test]
fn the_nodes_pod_sees_kubelets_paths_as_kubelet_does() {
    for (file, documents) in committed() {
        let set = daemon_set(&documents, "volnode-node").unwrap_or_else(|| panic!("{file}"));
        let pod = &set["spec"]["template"]["spec"];
        // Longer than volcsi waits for an fsck, `client/src/csi/serve.rs`.
        assert_eq!(pod["terminationGracePeriodSeconds"], 300);
        assert_eq!(pod["automountServiceAccountToken"], false);
        for alone in ["hostPID", "hostIPC", "hostNetwork"] {
            assert!(pod[alone].is_null(), "{file}: {alone}");
        }
        let [container] = Container::ours(std::slice::from_ref(set))[..] else { panic!("{file}") };
        let (kubelet, mounts) = (container.option("--kubelet-dir").unwrap(), container.mounts());
        let host = |path: &str| text(&mounts[path].1["hostPath"]["path"]);
        for below in ["plugins/kubernetes.io/csi", "pods"] {
            let path = format!("{kubelet}/{below}");
            assert_eq!(host(&path), path);
            assert_eq!(mounts[path.as_str()].0["mountPropagation"], "Bidirectional");
        }
        assert_eq!(container.container["securityContext"]["privileged"], true);
        let register = container.option("--register").unwrap();
        assert_eq!(host(register), format!("{kubelet}/plugins_registry"));
        let socket = container.option("--endpoint").unwrap().strip_prefix("unix://").unwrap();
        let (directory, name) = socket.rsplit_once('/').unwrap();
        assert_eq!(container.option("--kubelet-endpoint").unwrap(), format!("{}/{name}", host(directory)));
        let daemon = container.option("--socket").unwrap().rsplit_once('/').unwrap().0;
        assert_eq!(host(daemon), daemon);
        assert_eq!(host("/dev"), "/dev");
    }
}

fn daemon_set<'a>(documents: &'a [Value], name: &str) -> Option<&'a Value> {
    of_kind(documents, "DaemonSet").into_iter().find(|set| set["metadata"]["name"] == name)
}

/// Disks go on when the pod has ended: with nothing of it, and with the host's directories at the same paths.
#[test]
fn the_node_daemons_pod_has_what_its_disks_keep() {
    let mut count = 0;
    for (file, documents) in committed() {
        let Some(set) = daemon_set(&documents, "volnode-data") else { continue };
        count += 1;
        assert_eq!(set["spec"]["updateStrategy"]["type"], "OnDelete");
        let pod = &set["spec"]["template"]["spec"];
        assert_eq!((&pod["hostPID"], &pod["hostNetwork"]), (&Value::Bool(true), &Value::Bool(true)));
        let [container] = Container::ours(std::slice::from_ref(set))[..] else { panic!("{file}") };
        assert_eq!(container.container["securityContext"]["privileged"], true);
        let mounts = container.mounts();
        let host = |path: &str| text(&mounts[path].1["hostPath"]["path"]);
        let directory = |option: &str| container.option(option).unwrap().rsplit_once('/').unwrap().0;
        let kept = [container.option("--run-dir").unwrap(), container.option("--outlive-pod").unwrap()];
        for path in ["/dev", "/sys", directory("--tls-ca"), directory("--tls-cert"), directory("--tls-key")]
            .into_iter()
            .chain(kept)
        {
            assert_eq!(host(path), path, "{file}");
        }
        assert_eq!(host(directory("--device-cgroup")), "/sys/fs/cgroup");
        // The plugin asks this daemon.
        let node = daemon_set(&documents, "volnode-node").unwrap();
        let [plugin] = Container::ours(std::slice::from_ref(node))[..] else { panic!("{file}") };
        assert_eq!(plugin.option("--socket").unwrap(), format!("{}/volclient.sock", kept[0]));
    }
    assert_eq!(count, 1);
}

/// What is in a file that is renewed has to be renewed in the container, and nothing secret is in an environment or an argument.
#[test]
fn files_of_tls_are_whole_directories() {
    let mut count = 0;
    for (file, documents) in committed() {
        for container in Container::all(&documents) {
            // What a pod is told of itself.
            let is_of_pod = |variable: &Value| variable["valueFrom"]["fieldRef"].is_object();
            assert!(list(&container.container["env"]).iter().all(is_of_pod));
            assert!(container.container["envFrom"].is_null());
            let mounts = container.mounts();
            for (mount, _) in mounts.values() {
                assert!(mount["subPath"].is_null(), "{file}: {mount}");
            }
            for option in ["--tls-ca", "--tls-cert", "--tls-key", "--tls-client-ca"] {
                let Some(path) = container.option(option) else { continue };
                let (directory, name) = path.rsplit_once('/').unwrap();
                assert!(["ca.crt", "tls.crt", "tls.key"].contains(&name), "{file}: {path}");
                let (mount, volume) = mounts[directory];
                assert_eq!(mount["readOnly"], true);
                assert!(volume["secret"].is_object() || volume["hostPath"].is_object(), "{file}: {volume}");
                count += 1;
            }
        }
    }
    assert_eq!(count, 2 * 3 + 3 * 3 + 3 * 3);
}

/// Which of a container's probes ask for what, at which port.
fn probes<'a>(container: &Container<'a>) -> BTreeMap<&'a str, &'a str> {
    let ports = list(&container.container["ports"]);
    let probe = |name: &'a str| {
        let get = &container.container[name]["httpGet"];
        assert!(ports.iter().any(|port| port["name"] == get["port"]), "{name}");
        (name, text(&get["path"]))
    };
    ["livenessProbe", "readinessProbe"].map(probe).into()
}
