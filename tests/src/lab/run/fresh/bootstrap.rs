//! The bare Debian: made by debootstrap once, kept in the lab's cache as it was made, and copied for each run.
//!
//! `--variant=minbase` with gcc and git, which is what the README asks for beside Rust, and certificates, without which nothing is
//! fetched. Packages are checked against Debian's archive keys. A tree appears in the cache by one rename, so one that is there is
//! whole; nobody but this file touches it. A copy (two seconds) and no overlay: the tests then run on an ordinary file system.

use std::collections::VecDeque;
use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use super::network;
use crate::lab::machine::apt::{self, KEYRING};
use crate::lab::machine::packages;
use crate::lab::owned_directory::OwnedDirectory;
use crate::lab::progress::Step;
use crate::lab::tool::Running;
use crate::lab::workspace::Workspace;
use crate::lab::{interrupt, tool};

/// What is there beside Debian's essential packages and apt.
const INCLUDED: &str = "ca-certificates,gcc,git,libc6-dev";

/// How long a tree is used. A release's packages change seldom, and apt brings newer ones where that matters.
const AGE_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Some 100 MB of packages, unpacked and configured one by one.
const BOOTSTRAP_DEADLINE: Duration = Duration::from_secs(20 * 60);

/// Lines of debootstrap's that are shown when it fails.
const LINES_SHOWN: usize = 10;

/// Some 600 MB of small files.
const COPY_DEADLINE: Duration = Duration::from_secs(10 * 60);

/// Makes `root` a copy of the bare Debian `release`.
///
/// # Errors
/// It cannot be made: no mirror, no keys, no space. Or the lab was interrupted.
pub(super) fn copy_of_pristine(workspace: &Workspace, release: &str, root: &Path) -> Result<()> {
    let trees = workspace.cache.join("fresh/trees");
    fs::create_dir_all(&trees).with_context(|| format!("creating {}", trees.display()))?;
    let _lock = lock(&trees.join(format!("{release}.lock")))?;
    let tree = trees.join(release);
    if !is_current(&tree) {
        make(workspace, release, &tree)?;
    }
    let step = Step::begin(&format!("copying the bare {release}"));
    let mut copy = tool::command("cp");
    copy.args(["--archive", "--reflink=auto"]).arg(tree.join("root")).arg(root);
    tool::output(&mut copy, COPY_DEADLINE).context("copying the bare Debian")?;
    step.end();
    Ok(())
}

/// One lab makes or copies a tree while others wait.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut step = None;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                step.get_or_insert_with(|| Step::begin("waiting for another `cargo lab fresh`"));
                interrupt::check()?;
                thread::sleep(tool::POLL_INTERVAL);
            }
            Err(TryLockError::Error(error)) => return Err(error).context("locking the bare Debian"),
        }
    }
}

/// Whether the tree is there, young enough, and made with what is included today.
fn is_current(tree: &Path) -> bool {
    let note = tree.join("included");
    let age = || SystemTime::now().duration_since(fs::metadata(&note).ok()?.modified().ok()?).ok();
    fs::read_to_string(&note).is_ok_and(|included| included == INCLUDED)
        && age().is_some_and(|age| age < AGE_MAX)
}

/// Makes the tree anew.
fn make(workspace: &Workspace, release: &str, tree: &Path) -> Result<()> {
    packages::ensure_keys_of(release)?;
    let staging = OwnedDirectory::create(&workspace.cache.join("fresh/staging"))?;
    let made = staging.path().join("tree");
    fs::create_dir(&made).context("creating the tree")?;
    debootstrap(release, &made.join("root"))?;
    fs::write(made.join("included"), INCLUDED).context("noting what the tree was made with")?;
    if tree.exists() {
        fs::rename(tree, staging.path().join("old")).context("taking the old tree out of the cache")?;
    }
    fs::rename(&made, tree).context("moving the tree into the cache")
}

/// Runs debootstrap, in mount and process namespaces: what it mounts goes with it, and it goes with us.
fn debootstrap(release: &str, root: &Path) -> Result<()> {
    let step = Step::begin(&format!("bootstrapping a bare {release} ({INCLUDED})"));
    let mut command = tool::command("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--fork", "--kill-child"]);
    command.args(["--propagation", "private", "sh", "-c", "umask 022; exec debootstrap \"$@\" 2>&1", "sh"]);
    command.args(["--force-check-gpg", &format!("--keyring={KEYRING}"), "--variant=minbase"]);
    command.arg(format!("--include={INCLUDED}")).arg(release).arg(root).arg(apt::debian_mirror()?);
    command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
    // Both lead elsewhere inside the tree; and debootstrap does not ask apt how the mirror is reached.
    command.env_remove("TMPDIR").env_remove("TMP").envs(network::proxy_of_apt()?);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = Running(command.spawn().context("cannot run unshare")?);
    let stdout = child.0.stdout.take().context("debootstrap's output")?;
    let mut last_lines = VecDeque::new();
    let take = &mut |line: Option<&str>| {
        if let Some(line) = line {
            step.is_at(line.trim_start_matches("I: "));
            last_lines.push_back(line.to_owned());
            last_lines.drain(..last_lines.len().saturating_sub(LINES_SHOWN));
        }
        Ok(())
    };
    tool::follow_lines(stdout, BOOTSTRAP_DEADLINE, take).context("debootstrap")?;
    let status = tool::wait(&mut child.0, BOOTSTRAP_DEADLINE).context("debootstrap")?;
    ensure!(status.success(), "debootstrap: {status}\n{}", Vec::from(last_lines).join("\n"));
    step.end();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_that_is_old_or_was_made_otherwise_is_made_anew() {
        let tree = std::env::temp_dir().join(format!("lab-tree-{}", std::process::id()));
        fs::create_dir(&tree).unwrap();
        assert!(!is_current(&tree));
        fs::write(tree.join("included"), "gcc").unwrap();
        assert!(!is_current(&tree));
        fs::write(tree.join("included"), INCLUDED).unwrap();
        assert!(is_current(&tree));
        let note = File::options().write(true).open(tree.join("included")).unwrap();
        note.set_modified(SystemTime::now() - AGE_MAX).unwrap();
        assert!(!is_current(&tree));
        fs::remove_dir_all(&tree).unwrap();
    }
}
