//! What is in the images of `deploy/kubernetes`: our program, the programs that it runs, and the libraries of all of them, from this machine.
//!
//! Owns the lists. Called by `cargo lab images`, and by the test that runs what is in an image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::oci_image::{Entry, Image};

/// Images by name; `deploy/kubernetes/volnode/values.yaml` has the same ones.
pub const IMAGES: [&str; 3] = ["volcsi", "volserver", "volclient"];

/// What volcsi runs on nodes, and Debian's packages for it.
const FILE_SYSTEM_PROGRAMS: [(&str, &str); 6] = [
    ("blkid", "util-linux"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("resize2fs", "e2fsprogs"),
    ("xfs_growfs", "xfsprogs"),
];

/// Which features an ext4 gets.
const EXT4_DEFAULTS: &str = "/etc/mke2fs.conf";

/// Users by name, for programs that ask; the pods say by number who they are.
const PASSWD: &str = "root:x:0:0:root:/:/nonexistent\nnonroot:x:65532:65532:nonroot:/:/nonexistent\n";

/// The image of one of our programs, [`IMAGES`], that lies in `programs`.
///
/// # Errors
/// A program or a library is not on this machine: the error says which package has it.
pub fn image(program: &str, programs: &Path) -> Result<Image> {
    let own = programs.join(program);
    ensure!(own.is_file(), "{} is not built", own.display());
    let mut entries: BTreeMap<String, Entry> =
        ["dev", "proc", "run", "sys"].map(|directory| (directory.to_owned(), Entry::Directory(0o755))).into();
    entries.insert("tmp".to_owned(), Entry::Directory(0o1777));
    entries.insert("etc/passwd".to_owned(), Entry::Words(PASSWD.to_owned()));
    // Where mke2fs and e2fsck look whether a device is mounted.
    entries.insert("etc/mtab".to_owned(), Entry::Link("../proc/self/mounts".to_owned()));
    let entry_point = format!("/usr/local/bin/{program}");
    let mut found = vec![(entry_point.clone(), own)];
    if program == "volclient" {
        // For `kubectl exec`: hosts without systemd may have no place for it.
        let volctl = programs.join("volctl");
        ensure!(volctl.is_file(), "{} is not built", volctl.display());
        found.push(("/usr/local/bin/volctl".to_owned(), volctl));
    }
    if program == "volcsi" {
        for (name, package) in FILE_SYSTEM_PROGRAMS {
            let path = find(name).with_context(|| format!("no {name}: install {package}"))?;
            found.push((format!("/usr/sbin/{name}"), path));
        }
        if Path::new(EXT4_DEFAULTS).exists() {
            entries.insert(EXT4_DEFAULTS[1..].to_owned(), Entry::Copy(EXT4_DEFAULTS.into(), 0o644));
        }
    }
    for (to, from) in found {
        for library in libraries(&from)? {
            // By the name under which it is looked for, whatever links lead to it here.
            entries.insert(library[1..].to_owned(), Entry::Copy(library.into(), 0o755));
        }
        entries.insert(to[1..].to_owned(), Entry::Copy(from, 0o755));
    }
    let name = format!("volnode/{program}:{}", env!("CARGO_PKG_VERSION"));
    Ok(Image { name, entry_point, entries })
}

fn find(program: &str) -> Option<PathBuf> {
    let directories = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().map(Path::new);
    directories.map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// The paths of a program's libraries, its loader among them.
///
/// # Errors
/// ldd does not know the program, or a library is not on this machine.
pub fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("cannot run ldd")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success() && !said.contains("not found"), "ldd {}: {said}", program.display());
    Ok(paths_in(&said))
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn paths_in(said: &str) -> Vec<String> {
    let path = |line: &str| {
        let after = line.split_once("=>").map_or(line, |(_, after)| after);
        let path = after.split_whitespace().next()?;
        path.starts_with('/').then(|| path.to_owned())
    };
    said.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::paths_in;

    #[test]
    fn libraries_are_read_with_their_loader_and_without_the_kernels_own() {
        let said = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(paths_in(said), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
