//! Where things are: the workspace, its target directory, the lab's cache, and how to call cargo.
//!
//! Reads the environment and `cargo metadata`; creates only the cache directory.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::tool;

/// The cargo profile of everything that runs in the lab: optimised, with assertions.
pub(crate) const PROFILE: &str = "lab";

/// `cargo metadata` may have to download the index once.
const METADATA_DEADLINE: Duration = Duration::from_secs(300);

/// The directories the lab works with.
pub(crate) struct Workspace {
    /// The repository's root.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
    /// Kernels, package lists and the directories of running machines.
    pub(crate) cache: PathBuf,
}

#[derive(Deserialize)]
struct Metadata {
    workspace_root: PathBuf,
    target_directory: PathBuf,
}

impl Workspace {
    /// Asks cargo and the environment.
    ///
    /// # Errors
    /// Cargo cannot be run, there is no home directory for the cache, or the cache cannot be created.
    pub(crate) fn locate() -> Result<Self> {
        // Set by `cargo lab`; called in another way, the lab belongs to the workspace it was built from.
        let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let manifest = Path::new(&package).join("Cargo.toml");
        let mut metadata = cargo();
        metadata.args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"]).arg(manifest);
        let metadata: Metadata = serde_json::from_slice(&tool::output(&mut metadata, METADATA_DEADLINE)?)
            .context("reading cargo metadata")?;
        let cache = cache_directory()?;
        std::fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
        Ok(Self { root: metadata.workspace_root, target: metadata.target_directory, cache })
    }

    /// Where the programs built with [`PROFILE`] are.
    pub(crate) fn programs(&self) -> PathBuf {
        self.target.join(PROFILE)
    }

    /// The lab itself, for what it runs in a guest. By this name, because the file that this process was started from may have
    /// been built anew since.
    pub(crate) fn own_program(&self) -> PathBuf {
        self.programs().join("lab")
    }

    /// Where programs from crates.io that the tests call are installed: in its `bin`.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// A cargo command that runs in the workspace.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = cargo();
        command.current_dir(&self.root);
        command
    }

    /// PATH with the programs of this build and the installed tools first.
    pub(crate) fn search_path(&self) -> Result<String> {
        let inherited = env::var_os("PATH").unwrap_or_default();
        let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
        let path = env::join_paths(
            [self.programs(), self.tools().join("bin")]
                .into_iter()
                .chain(env::split_paths(&inherited))
                .chain(system),
        )
        .context("the target directory's name contains ':'")?;
        path.into_string().map_err(|path| anyhow::anyhow!("PATH is not UTF-8: {}", path.display()))
    }
}

/// The cargo that runs us, or the one in PATH. It is not told what `cargo run` tells us of our own package: there are build scripts
/// that run again when these variables differ (ring's), and with each turn from one cargo to the other all that rests on them
/// would be compiled anew.
fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os().filter(|(name, _)| is_of_a_package(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command
}

/// Whether cargo sets the variable to what it knows of the package that it runs.
fn is_of_a_package(name: &str) -> bool {
    name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
}

fn cache_directory() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(own) = set("VOLNODE_LAB_CACHE") {
        return std::path::absolute(own).context("VOLNODE_LAB_CACHE");
    }
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache"))).context(
        "neither VOLNODE_LAB_CACHE nor XDG_CACHE_HOME nor HOME is set: where may the lab keep kernels?",
    )?;
    Ok(base.join("volnode-lab"))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn a_cargo_of_ours_hears_nothing_of_our_own_package() {
        // Whoever runs a test sets this for it, cargo and the lab alike.
        let name = OsStr::new("CARGO_MANIFEST_DIR");
        assert!(env::var_os(name).is_some());
        assert!(cargo().get_envs().any(|(removed, value)| removed == name && value.is_none()));
        assert!(is_of_a_package("CARGO_PKG_VERSION_MAJOR"));
        assert!(!is_of_a_package("CARGO_HOME") && !is_of_a_package("CARGO_TARGET_DIR"));
    }
}
