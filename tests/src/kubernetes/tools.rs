//! The programs of a Kubernetes, its container runtime and the CSI sidecars: built of one Go module, `tests/kubernetes/go.mod`, and kept.
//!
//! Owns where they are kept: in the lab's cache, under a name that follows from the module, so neither `cargo clean` nor a change
//! elsewhere has them built again. They appear there by one rename: what is there is whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ring::digest::{SHA256, digest};

use crate::lab::progress::Step;
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// What they are built of, with every version.
const MODULE: &str = include_str!("../../kubernetes/go.mod");
const SUMS: &str = include_str!("../../kubernetes/go.sum");

/// What they take themselves for: the API server refuses to start as no version at all.
const LINKER_FLAGS: &str = "-s -w -X k8s.io/component-base/version.gitVersion=v1.37.2 \
     -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37";

/// The module that has the CustomResourceDefinitions of snapshots.
const SNAPSHOT_CLIENT: &str = "github.com/kubernetes-csi/external-snapshotter/client/v8";

/// Twenty packages of Go, and two thousand that they need, on two slow cores that others use, too.
const BUILD_DEADLINE: Duration = Duration::from_secs(3 * 60 * 60);

/// Looking something up in a module that is there.
const LOOK_DEADLINE: Duration = Duration::from_secs(10 * 60);

/// How often the programs that are there are counted.
const PROGRAMS: usize = 16;

/// The built programs.
pub(super) struct Tools {
    /// Has the programs, and `crd/`.
    pub(super) directory: PathBuf,
}

impl Tools {
    /// Builds what is not there.
    ///
    /// # Errors
    /// Go fails: with what it said.
    pub(super) fn ensure(workspace: &Workspace) -> Result<Self> {
        let kept = workspace.cache.join("kubernetes");
        let key: String = digest(&SHA256, format!("{MODULE}{SUMS}{LINKER_FLAGS}").as_bytes()).as_ref()[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let tools = Self { directory: kept.join(key) };
        if !tools.directory.exists() {
            let unfinished = kept.join("unfinished");
            let _ = fs::remove_dir_all(&unfinished);
            fs::create_dir_all(unfinished.join("crd")).with_context(|| unfinished.display().to_string())?;
            build(workspace, &unfinished)?;
            fs::rename(&unfinished, &tools.directory).context("keeping the programs of Kubernetes")?;
        }
        Ok(tools)
    }
}

/// Builds all of it in a directory.
fn build(workspace: &Workspace, directory: &Path) -> Result<()> {
    let module = directory.join("module");
    fs::create_dir_all(&module)?;
    fs::write(module.join("go.mod"), MODULE)?;
    fs::write(module.join("go.sum"), SUMS)?;
    let what = format!("compiling Kubernetes 1.37.2, its runtime and the CSI sidecars ({PROGRAMS} programs)");
    let step = Step::begin_fetching(&what, directory);
    let mut go = go(workspace, &module);
    go.args(["build", "-trimpath", "-ldflags", LINKER_FLAGS, "-o"]).arg(directory).arg("tool");
    tool::output(&mut go, BUILD_DEADLINE).context("Kubernetes cannot be built")?;
    // The package's name is a common one.
    fs::rename(directory.join("server"), directory.join("etcd")).context("etcd")?;
    let mut list = self::go(workspace, &module);
    list.args(["list", "-m", "-f", "{{.Dir}}", SNAPSHOT_CLIENT]);
    let client = String::from_utf8(tool::output(&mut list, LOOK_DEADLINE)?)?;
    for entry in fs::read_dir(Path::new(client.trim()).join("config/crd")).context(client.clone())? {
        let entry = entry?;
        fs::copy(entry.path(), directory.join("crd").join(entry.file_name()))?;
    }
    fs::remove_dir_all(&module)?;
    step.end();
    Ok(())
}

/// Go in the module, with modules of the lab's own.
fn go(workspace: &Workspace, module: &Path) -> Command {
    let mut go = tool::command("go");
    go.current_dir(module).env("GOTOOLCHAIN", "auto").env("GOFLAGS", "-modcacherw");
    go.env("GOPATH", workspace.cache.join("go"));
    go
}

/// The version of a module that the programs are built of.
///
/// # Errors
/// It is none of theirs.
pub(super) fn version_of(module: &str) -> Result<&'static str> {
    let line = MODULE.lines().find_map(|line| line.trim().strip_prefix(module)?.strip_prefix(' '));
    let version = line.and_then(|rest| rest.split_whitespace().next());
    version.with_context(|| format!("tests/kubernetes/go.mod has no {module}"))
}
