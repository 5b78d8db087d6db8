//! Furnishes a copy of the bare Debian: sources of packages, the way to the network, and a user's home with the project in it.
//!
//! Only writes below the root it is given, which nothing runs in yet. The project is what git knows of it, as it lies here,
//! uncommitted changes and new files included, with the modes that a clone under the umask would give.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::network;
use crate::lab::machine::apt;
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// The user's home; not root's, though root runs there: nothing may rest on where the home is.
pub(super) const HOME: &str = "/home/builder";

/// The project, in the home.
pub(super) const PROJECT: &str = "volnode";

/// git lists some thousand files.
const LIST_DEADLINE: Duration = Duration::from_secs(60);

/// Files of this machine's by which names are found.
const NAME_FILES: [&str; 2] = ["etc/resolv.conf", "etc/hosts"];

/// Makes of the bare `release` in `root` a machine on which the project can be set up, cloned under `umask`.
///
/// # Errors
/// A file cannot be read or written, or the workspace is no git repository.
pub(super) fn furnish(root: &Path, workspace: &Workspace, release: &str, umask: u32) -> Result<()> {
    let mirror = apt::debian_mirror()?;
    let sources: String =
        ["", "-updates"].iter().map(|suffix| format!("deb {mirror} {release}{suffix} main\n")).collect();
    write(root, "etc/apt/sources.list", sources.as_bytes())?;
    write(root, "etc/apt/apt.conf.d/90network", network::apt_configuration()?.as_bytes())?;
    for name in NAME_FILES {
        let file = Path::new("/").join(name);
        write(root, name, &fs::read(&file).with_context(|| format!("reading {}", file.display()))?)?;
    }
    let certificates = network::certificates();
    let authorities = fs::read(&certificates);
    let authorities = authorities.with_context(|| format!("reading {}", certificates.display()))?;
    write(root, network::CERTIFICATES, &authorities)?;

    let home = root.join(HOME.trim_start_matches('/'));
    make_directory(&home, umask)?;
    if let Some(configuration) = network::cargo_configuration() {
        make_directory(&home.join(".cargo"), umask)?;
        let copy = home.join(".cargo/config.toml");
        let text = fs::read_to_string(&configuration);
        let text = text.with_context(|| format!("reading {}", configuration.display()))?;
        fs::write(copy, network::ways_to_registries(&text)).context("writing cargo's configuration")?;
    }
    let project = home.join(PROJECT);
    make_directory(&project, umask)?;
    for file in files_of(workspace)? {
        copy_file(&workspace.root.join(&file), &project, &file, umask)
            .with_context(|| format!("copying {}", file.display()))?;
    }
    Ok(())
}

/// Replaces a file of the system's; what is there may be a link that leads out of the tree.
fn write(root: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = root.join(name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("replacing {}", path.display()));
        }
        _ => {}
    }
    fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
    // As the system's own files are, whatever the umask here.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
        .with_context(|| format!("{}", path.display()))
}

/// What git has, and what `git add --all` would give it.
fn files_of(workspace: &Workspace) -> Result<Vec<PathBuf>> {
    let mut git = tool::command("git");
    git.arg("-C").arg(&workspace.root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let listed = tool::output(&mut git, LIST_DEADLINE).context("listing the sources")?;
    let names = listed.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| PathBuf::from(OsStr::from_bytes(name))).collect())
}

/// Copies `name` into `project` with the mode git would give it: only who may execute it is remembered.
fn copy_file(source: &Path, project: &Path, name: &Path, umask: u32) -> Result<()> {
    let metadata = match fs::symlink_metadata(source) {
        // Deleted, and not committed yet.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata.context("its metadata")?,
    };
    if let Some(parent) = name.parent() {
        make_directory(&project.join(parent), umask)?;
    }
    let copy = project.join(name);
    if metadata.is_symlink() {
        return symlink(fs::read_link(source)?, copy).context("making the link");
    }
    fs::copy(source, &copy)?;
    let is_executable = metadata.permissions().mode() & 0o100 != 0;
    let mode = if is_executable { 0o777 } else { 0o666 };
    fs::set_permissions(copy, fs::Permissions::from_mode(mode & !umask)).context("its mode")
}

/// Makes a directory and those above it that are missing.
fn make_directory(path: &Path, umask: u32) -> Result<()> {
    // The umask here may be stricter, and applies as well.
    let mode = 0o777 & !umask;
    for directory in path.ancestors().collect::<Vec<_>>().into_iter().rev().filter(|path| !path.exists()) {
        let made = DirBuilder::new().mode(mode).create(directory);
        made.with_context(|| format!("creating {}", directory.display()))?;
        fs::set_permissions(directory, fs::Permissions::from_mode(mode)).context("a directory's mode")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode_of(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn files_are_copied_as_a_clone_under_the_umask_would_have_them() {
        let directory = std::env::temp_dir().join(format!("lab-fresh-{}", std::process::id()));
        let (source, project) = (directory.join("source"), directory.join("project"));
        fs::create_dir_all(source.join("a/b")).unwrap();
        for (name, mode) in [("a/b/program", 0o750), ("a/text", 0o600)] {
            fs::write(source.join(name), name).unwrap();
            fs::set_permissions(source.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("../gone", source.join("a/link")).unwrap();
        make_directory(&project, 0o027).unwrap();
        for name in ["a/b/program", "a/text", "a/link", "a/deleted"].map(Path::new) {
            copy_file(&source.join(name), &project, name, 0o027).unwrap();
        }
        let modes = ["a", "a/b", "a/b/program", "a/text"].map(|name| mode_of(&project.join(name)));
        assert_eq!(modes, [0o750, 0o750, 0o750, 0o640]);
        assert_eq!(fs::read_link(project.join("a/link")).unwrap(), Path::new("../gone"));
        assert!(!project.join("a/deleted").exists());
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_link_in_the_tree_is_replaced_and_not_followed() {
        let directory = std::env::temp_dir().join(format!("lab-fresh-link-{}", std::process::id()));
        fs::create_dir_all(directory.join("root/etc")).unwrap();
        let outside = directory.join("outside");
        fs::write(&outside, "mine").unwrap();
        symlink(&outside, directory.join("root/etc/resolv.conf")).unwrap();
        write(&directory.join("root"), "etc/resolv.conf", b"theirs").unwrap();
        assert_eq!(fs::read(&outside).unwrap(), b"mine");
        assert_eq!(fs::read(directory.join("root/etc/resolv.conf")).unwrap(), b"theirs");
        assert_eq!(mode_of(&directory.join("root/etc/resolv.conf")), 0o644);
        fs::remove_dir_all(&directory).unwrap();
    }
}
