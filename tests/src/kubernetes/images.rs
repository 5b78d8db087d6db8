//! The images that the nodes are given: our plugin's as `cargo lab images` makes it, the sidecars', and one for the lab's own pods.
//!
//! Owns the lists. No registry is asked: containerd imports the archives.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use testlab::image_contents;
use testlab::oci_image::{Entry, Image};

use super::tools::{self, Tools};
use crate::lab::tool;

/// The lab's own: the sandbox of every pod, and what writes.
pub(super) const BOX: &str = "docker.io/volnode-lab/box:1";

/// The chart's value for a sidecar, its program, and the module that it is of.
pub(super) const SIDECARS: [(&str, &str, &str); 4] = [
    ("provisioner", "csi-provisioner", "github.com/kubernetes-csi/external-provisioner/v6"),
    ("attacher", "csi-attacher", "github.com/kubernetes-csi/external-attacher/v4"),
    ("resizer", "csi-resizer", "github.com/kubernetes-csi/external-resizer/v2"),
    ("snapshotter", "csi-snapshotter", "github.com/kubernetes-csi/external-snapshotter/v8"),
];

/// What the lab's own image has of busybox.
const APPLETS: [&str; 14] = [
    "blockdev",
    "cat",
    "dd",
    "df",
    "echo",
    "kill",
    "ls",
    "mkdir",
    "rm",
    "sh",
    "sha256sum",
    "sleep",
    "sync",
    "touch",
];

/// The name of a sidecar's image.
pub(super) fn sidecar_image(program: &str, module: &str) -> Result<String> {
    Ok(format!("volnode-lab/{program}:{}", tools::version_of(module)?))
}

/// Writes the archives of all images into a directory.
///
/// # Errors
/// A program is missing: the error says which.
pub(super) fn write(tools: &Tools, programs: &Path, directory: &Path) -> Result<()> {
    image_contents::image("volcsi", programs)?.write(&directory.join("volcsi.tar"))?;
    for (_, program, module) in SIDECARS {
        let name = sidecar_image(program, module)?;
        let files = [(program, tools.directory.join(program))];
        of_programs(name, program, &files, &[])?.write(&directory.join(format!("{program}.tar")))?;
    }
    let busybox = tool::find("busybox").context("there is no busybox")?;
    let files = [("block-writer", programs.join("block-writer")), ("bin/busybox", busybox)];
    let links: Vec<(String, &str)> =
        APPLETS.iter().map(|applet| (format!("bin/{applet}"), "busybox")).collect();
    let name = BOX.trim_start_matches("docker.io/").to_owned();
    of_programs(name, "block-writer", &files, &links)?.write(&directory.join("box.tar"))
}

/// An image of programs, with their libraries, and links.
fn of_programs(
    name: String,
    entry_point: &str,
    programs: &[(&str, std::path::PathBuf)],
    links: &[(String, &str)],
) -> Result<Image> {
    let mut entries = BTreeMap::new();
    for (to, from) in programs {
        // A static program has none, and ldd says so by failing.
        for library in image_contents::libraries(from).unwrap_or_default() {
            entries.insert(library[1..].to_owned(), Entry::Copy(library.into(), 0o755));
        }
        entries.insert((*to).to_owned(), Entry::Copy(from.clone(), 0o755));
    }
    entries.extend(links.iter().map(|(path, target)| (path.clone(), Entry::Link((*target).to_owned()))));
    entries.insert("tmp".to_owned(), Entry::Directory(0o1777));
    Ok(Image { name, entry_point: format!("/{entry_point}"), entries })
}
