//! A mount namespace of the device process's own, with only the mounts it needs.
//!
//! Called once by `attachment.rs`, before any thread starts. A daemon that can see a file system mounted on its own device
//! can hang on its way out, when the last reference to that mount goes and wants to write; and one that copies the
//! mounts of others keeps them from being unmounted for good. So: mounts made later do not reach us (private), and of
//! those that are there only the ones that hold what we use stay. Source:
//! mount_namespaces(7), and hangs seen with daemons that did otherwise.
#![allow(unsafe_code)] // unshare, which is unsafe for what it could do to other threads; there are none.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::thread::UnshareFlags;

use crate::data_address;

/// Where the kernel and its devices are looked up.
const ALWAYS_NEEDED: [&str; 3] = ["/dev", "/proc", "/sys"];

/// Enters a new mount namespace that keeps only the mounts on the way to `needed` (absolute paths), `/dev`, `/proc` and
/// `/sys`.
///
/// Errors: `EPERM` without CAP_SYS_ADMIN; those of reading `/proc/self/mountinfo`.
pub fn enter(needed: &[&Path]) -> io::Result<()> {
    let needed: Vec<&Path> = ALWAYS_NEEDED.iter().map(Path::new).chain(needed.iter().copied()).collect();
    // SAFETY: only the mount namespace (and the file-system context) is unshared, no file descriptors and no memory;
    // the process has one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    std::env::set_current_dir("/")?;
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo")?;
    // Children come after their parents, so the last goes first.
    for mount_point in mount_points(&mountinfo).iter().rev() {
        if !needed.iter().any(|path| path.starts_with(mount_point)) {
            // One that cannot go (it went with its parent, say) is no reason not to serve.
            if let Err(error) = unmount(mount_point, UnmountFlags::DETACH) {
                tracing::debug!(mount_point = %mount_point.display(), %error, "cannot unmount a file system from the private mount namespace");
            }
        }
    }
    Ok(())
}

/// What the C library reads, or asks, for the address of a name; in a container each of these may be a mount of its own.
const NAME_FILES: [&str; 7] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/run/systemd/resolve",
    "/run/nscd",
];

/// Where names are looked up when the server is dialled again, with what these paths link to.
pub fn paths_of_names() -> Vec<PathBuf> {
    let existing = |path: &str| {
        let target = std::fs::canonicalize(path).ok()?;
        Some([PathBuf::from(path), target])
    };
    NAME_FILES.into_iter().filter_map(existing).flatten().collect()
}

/// This program's file and the libraries that it is linked with: it is run once more when its disk is to be stopped. They keep
/// their mounts busy as long as it runs, whatever is unmounted here.
pub fn paths_of_program() -> Vec<PathBuf> {
    program_files(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default())
}

/// The files in a `maps` file of /proc, each once.
fn program_files(maps: &str) -> Vec<PathBuf> {
    // Address, permissions, offset, device, inode and, after spaces, the path.
    let path = |line: &str| line.split_once('/').map(|(_, path)| PathBuf::from(format!("/{path}")));
    let mut files: Vec<PathBuf> = maps.lines().filter_map(path).collect();
    files.sort_unstable();
    files.dedup();
    files
}

/// Where the server's Unix sockets are, with what these paths link to. A server that is started anew may put another socket
/// there, so their directories have to stay in sight.
pub fn paths_of_sockets(addresses: &[String]) -> Vec<PathBuf> {
    let path = |address: &String| data_address::unix_path(address);
    let linked_to =
        |path: &PathBuf| Some(std::fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?));
    let paths = addresses.iter().filter_map(path);
    paths
        .flat_map(|path| [linked_to(&path), std::fs::canonicalize(&path).ok(), Some(path)])
        .flatten()
        .collect()
}

/// The mount points of a mountinfo file, in its order.
fn mount_points(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape).collect()
}

/// Undoes the kernel's escapes of white space and backslash (`\040` and so on).
fn unescape(field: &str) -> PathBuf {
    let mut text = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                text.push(char::from(code));
                rest = &rest[at + 4..];
            }
            None => {
                text.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    text.push_str(rest);
    PathBuf::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_be_looked_up_when_the_server_is_dialled_again() {
        let paths = paths_of_names();
        for wanted in ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"] {
            // What is not there keeps no mount; what is linked to may be behind one as well.
            let target = std::fs::canonicalize(wanted).ok();
            assert_eq!(paths.iter().any(|path| path == Path::new(wanted)), target.is_some(), "{wanted}");
            assert!(target.is_none_or(|target| paths.contains(&target)), "{wanted}");
        }
    }

    #[test]
    fn the_program_can_be_run_once_more() {
        let files = paths_of_program();
        assert!(files.contains(&std::env::current_exe().unwrap()), "{files:?}");
        let maps = "55d0-55d1 r-xp 0 fe:00 12   /usr/sbin/volclient\n7f00-7f01 rw-p 0 00:00 0\n\
                    7f02-7f03 r-xp 0 fe:00 13   /usr/lib/libc.so.6\n7f04-7f05 r--p 0 fe:00 13   /usr/lib/libc.so.6\n\
                    7ffe-7fff rw-p 0 00:00 0   [stack]\n";
        let expected = [PathBuf::from("/usr/lib/libc.so.6"), PathBuf::from("/usr/sbin/volclient")];
        assert_eq!(program_files(maps), expected);
    }

    #[test]
    fn a_servers_socket_is_found_again_where_its_path_leads() {
        let dir = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(dir.path()).unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, dir.path().join("run")).unwrap();
        let named = dir.path().join("run/nbd.sock");
        // Also while the server, and its socket, are away.
        let paths = paths_of_sockets(&["127.0.0.1:1".to_owned(), format!("unix:{}", named.display())]);
        assert_eq!(paths, [real.join("nbd.sock"), named]);
    }

    #[test]
    fn mount_points_are_read_in_order_and_unescaped() {
        let mountinfo = "21 1 0:20 / / rw - ext4 /dev/sda1 rw\n\
                         22 21 0:21 / /proc rw shared:3 - proc proc rw\n\
                         23 21 259:0 / /mnt/my\\040disk rw - ext4 /dev/ublkb0 rw\n";
        let expected = [PathBuf::from("/"), PathBuf::from("/proc"), PathBuf::from("/mnt/my disk")];
        assert_eq!(mount_points(mountinfo), expected);
    }
}
