//! The whole cluster: control plane and storage server on this machine, two nodes in emulated ones, and our chart in it.
//!
//! Owns their order: what is dropped first is what the others do not need to end. Everything is in a directory that goes with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::control_plane::{ControlPlane, free_ports};
use super::images::{self, SIDECARS};
use super::kubectl::Kubectl;
use super::names::{NAMESPACE, NODES};
use super::node::{Given, Node};
use super::storage::StorageServer;
use super::tools::Tools;
use crate::lab::machine::kernels::Kernel;
use crate::lab::owned_directory::OwnedDirectory;
use crate::lab::progress;
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// From QEMU's start to a node that is ready; a minute and a half is usual where nobody else works.
const NODE_DEADLINE: Duration = Duration::from_secs(600);

/// Until the pods of the chart are ready, their images' import included.
const CHART_DEADLINE: Duration = Duration::from_secs(900);

/// Helm renders, and asks the API server.
const HELM_DEADLINE: Duration = Duration::from_secs(180);

/// A running cluster.
pub(super) struct Cluster {
    pub(super) nodes: Vec<Node>,
    pub(super) plane: ControlPlane,
    pub(super) storage: StorageServer,
    pub(super) kubectl: Kubectl,
    pub(super) steps: Steps,
    tools: PathBuf,
    chart: PathBuf,
    directory: OwnedDirectory,
}

/// Says what has been done, and when.
pub(super) struct Steps {
    began: Instant,
    said: Vec<(Duration, String)>,
}

impl Steps {
    pub(super) fn begin() -> Self {
        Self { began: Instant::now(), said: Vec::new() }
    }

    /// Says a step that is done.
    pub(super) fn done(&mut self, what: &str) {
        let at = self.began.elapsed();
        progress::say(&format!("lab: [{:>4} s] {what}", at.as_secs()));
        self.said.push((at, what.to_owned()));
    }

    /// All of them, a line each.
    pub(super) fn table(&self) -> String {
        self.said.iter().map(|(at, what)| format!("| {} s | {what} |\n", at.as_secs())).collect()
    }
}

/// What a cluster is made of.
pub(super) struct Parts<'a> {
    pub(super) workspace: &'a Workspace,
    pub(super) tools: &'a Tools,
    pub(super) kernel: &'a Kernel,
    /// The product's programs.
    pub(super) programs: &'a Path,
}

impl Cluster {
    /// Starts everything, and waits until the chart's pods are ready.
    ///
    /// # Errors
    /// Something does not get ready: with what is known of it.
    pub(super) fn start(parts: &Parts<'_>) -> Result<Self> {
        let mut steps = Steps::begin();
        let owned = OwnedDirectory::create(&parts.workspace.cache.join("clusters"))?;
        let directory = owned.path().to_owned();
        for name in ["logs", "images", "bin"] {
            fs::create_dir(directory.join(name))?;
        }
        // Where the guest sees it, wherever it was built.
        let daemon = directory.join("bin/volclient");
        fs::copy(parts.programs.join("volclient"), &daemon).context("volclient")?;
        fs::copy(parts.programs.join("volctl"), directory.join("bin/volctl")).context("volctl")?;
        images::write(parts.tools, parts.programs, &directory.join("images"))?;
        steps.done("images are made");
        let storage = StorageServer::start(parts.programs, &directory)?;
        let plane = ControlPlane::start(parts.tools, &directory)?;
        steps.done("etcd, API server, controllers, scheduler and storage server are ready");
        let uri = storage.uri();
        let given = Given {
            workspace: parts.workspace,
            kernel: parts.kernel,
            directory: &directory,
            tools: &parts.tools.directory,
            api_port: plane.api_port,
            server: &uri,
        };
        let ports: [u16; NODES.len()] = free_ports()?;
        let nodes: Result<Vec<Node>> = (1..)
            .zip(NODES.iter().zip(ports))
            .map(|(number, (name, port))| Node::start(&given, name, number, port))
            .collect();
        let kubectl = plane.kubectl();
        let mut cluster = Self {
            nodes: nodes?,
            plane,
            storage,
            kubectl,
            steps,
            tools: parts.tools.directory.clone(),
            chart: parts.workspace.root.join("deploy/kubernetes/volnode"),
            directory: owned,
        };
        match cluster.install() {
            Ok(()) => Ok(cluster),
            Err(error) => {
                let kept = cluster.keep_logs(parts.workspace);
                Err(error.context(format!("logs are in {kept}")))
            }
        }
    }

    fn install(&mut self) -> Result<()> {
        self.install_definitions()?;
        let kubectl = self.kubectl.clone();
        for index in 0..self.nodes.len() {
            let name = self.nodes[index].name.clone();
            kubectl.wait(&format!("{name} to be ready"), NODE_DEADLINE, |kubectl| {
                self.nodes[index].check()?;
                Ok(is_true(&kubectl.get(&["node", &name])?, "Ready").then_some(()))
            })?;
            self.steps.done(&format!("{name} is ready"));
        }
        // Before the chart: kubelet tries again ever more seldom where an image is not there.
        for node in &mut self.nodes {
            node.wait_for_images(CHART_DEADLINE)?;
        }
        self.steps.done("both nodes have the images");
        self.install_chart()?;
        self.steps.done("the chart is installed");
        self.wait_for_chart()
    }

    /// Waits until every pod of the chart is ready.
    ///
    /// # Errors
    /// They are not in time.
    pub(super) fn wait_for_chart(&mut self) -> Result<()> {
        let kubectl = self.kubectl.within(NAMESPACE);
        kubectl.wait("the node's pods to be ready", CHART_DEADLINE, |kubectl| {
            let set = kubectl.get(&["daemonset", "volnode-node"])?;
            Ok((set["status"]["numberReady"] == NODES.len()).then_some(()))
        })?;
        self.steps.done("the node plugin's pods are ready");
        kubectl.wait("the controller to be ready", CHART_DEADLINE, |kubectl| {
            let deployment = kubectl.get(&["deployment", "volnode-controller"])?;
            Ok((deployment["status"]["readyReplicas"] == 2).then_some(()))
        })?;
        self.steps.done("the controller's pods are ready");
        Ok(())
    }

    /// The definitions of snapshots, and the controller that belongs to a cluster and not to a driver.
    fn install_definitions(&mut self) -> Result<()> {
        let definitions = self.tools.join("crd");
        self.kubectl.run(&["apply", "--kustomize", &definitions.display().to_string()])?;
        let names = ["volumesnapshots", "volumesnapshotcontents", "volumesnapshotclasses"];
        for name in names.map(|name| format!("crd/{name}.snapshot.storage.k8s.io")) {
            self.kubectl.run(&["wait", "--for=condition=Established", &name, "--timeout=60s"])?;
        }
        self.plane.start_snapshot_controller()
    }

    /// As the documentation says it, with our images in place of those of a registry.
    ///
    /// # Errors
    /// Helm's word.
    pub(super) fn install_chart(&self) -> Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        self.kubectl.apply(&namespace)?;
        let label = "pod-security.kubernetes.io/enforce=privileged";
        self.kubectl.run(&["label", "namespace", NAMESPACE, label, "--overwrite"])?;
        let mut values = vec![format!("server.uri={}", self.storage.uri()), "tls.enabled=false".to_owned()];
        for (value, program, module) in SIDECARS {
            values.push(format!("images.{value}={}", images::sidecar_image(program, module)?));
        }
        self.helm(&["install", "volnode", &self.chart.display().to_string(), "--set", &values.join(",")])
    }

    /// Runs Helm in the chart's namespace.
    ///
    /// # Errors
    /// It fails: with its own words.
    pub(super) fn helm(&self, words: &[&str]) -> Result<()> {
        let mut helm = std::process::Command::new(self.tools.join("helm"));
        helm.arg("--kubeconfig").arg(&self.kubectl.kubeconfig).args(["--namespace", NAMESPACE]).args(words);
        tool::output(&mut helm, HELM_DEADLINE).map(drop)
    }

    /// The node of this name.
    pub(super) fn node(&mut self, name: &str) -> Result<&mut Node> {
        self.nodes.iter_mut().find(|node| node.name == name).with_context(|| format!("no node {name}"))
    }

    /// Makes a namespace for pods, and gives its kubectl.
    ///
    /// # Errors
    /// The API server's word.
    pub(super) fn namespace(&self, name: &str) -> Result<Kubectl> {
        self.kubectl.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))?;
        Ok(self.kubectl.within(name))
    }

    /// Copies logs to where they outlive the cluster, and says where that is.
    pub(super) fn keep_logs(&self, workspace: &Workspace) -> String {
        let kept = workspace.target.join("kubernetes-logs");
        let _ = fs::remove_dir_all(&kept);
        let copies = [("logs".to_owned(), "control-plane".to_owned())]
            .into_iter()
            .chain(NODES.map(|node| (format!("{node}/logs"), node.to_owned())));
        for (from, to) in copies {
            let to = kept.join(to);
            let _ = fs::create_dir_all(&to);
            for entry in fs::read_dir(self.directory.path().join(from)).into_iter().flatten().flatten() {
                let _ = fs::copy(entry.path(), to.join(entry.file_name()));
            }
        }
        for (name, words) in [
            ("pods.txt", &["get", "pods", "--all-namespaces", "--output", "wide"][..]),
            ("events.txt", &["get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"]),
            ("volumes.txt", &["get", "pv,volumeattachments,csinodes", "--output", "yaml"]),
        ] {
            let _ = fs::write(kept.join(name), self.kubectl.run(words).unwrap_or_default());
        }
        let kubectl = self.kubectl.within(NAMESPACE);
        for pod in self.chart_pods() {
            let words = ["logs", &pod, "--all-containers", "--prefix"];
            let _ = fs::write(kept.join(format!("{pod}.log")), kubectl.run(&words).unwrap_or_default());
        }
        kept.display().to_string()
    }

    fn chart_pods(&self) -> Vec<String> {
        let pods = self.kubectl.within(NAMESPACE).get(&["pods"]).unwrap_or_default();
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        pods.iter().filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect()
    }
}

/// Whether a condition of an object is true.
pub(super) fn is_true(object: &Value, condition: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    conditions.iter().any(|found| found["type"] == condition && found["status"] == "True")
}
