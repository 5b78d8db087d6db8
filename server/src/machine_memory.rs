//! How much memory this process may have: the machine's, or what a control group allows if that is less.
//!
//! Owns: finding the limits of the process's own control group and all above it, in both versions of the interface, and what they
//! leave to memory volumes. Never: allocates, or enforces a limit. Called by `data/server.rs` (at start) and, each time a memory
//! volume is made, by `lifecycle/`, because a limit may be changed while a server runs.
//! Source: `Documentation/admin-guide/cgroup-v2.rst` (`memory.max`, `memory.high`), `cgroup-v1/memory.rst`
//! (`memory.limit_in_bytes`), cgroups(7) and cgroup_namespaces(7) for the paths.

use std::fmt;
use std::path::{Component, Path, PathBuf};

/// What bounds the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BoundBy {
    /// There is no more in the machine.
    Machine,
    /// This file of a control group.
    ControlGroup(PathBuf),
}

impl fmt::Display for BoundBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("the machine"),
            Self::ControlGroup(file) => write!(f, "{} (MemoryMax= or MemoryHigh= of a unit)", file.display()),
        }
    }
}

/// The memory that this process may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// So much, in bytes.
    pub bytes: u64,
    /// And why no more.
    pub by: BoundBy,
    /// What the machine has, in bytes.
    pub machine_bytes: u64,
}

impl Allowed {
    /// The smallest of the machine's memory and the limits that were found.
    pub fn smallest(machine_bytes: u64, limits: impl IntoIterator<Item = (PathBuf, u64)>) -> Self {
        let of_machine = Self { bytes: machine_bytes, by: BoundBy::Machine, machine_bytes };
        limits.into_iter().fold(of_machine, |least, (file, bytes)| {
            if bytes < least.bytes {
                Self { bytes, by: BoundBy::ControlGroup(file), machine_bytes }
            } else {
                least
            }
        })
    }

    /// As the kernel says now. What cannot be read bounds nothing.
    pub fn of_this_process() -> Self {
        let info = rustix::system::sysinfo();
        let machine_bytes = info.totalram.saturating_mul(u64::from(info.mem_unit));
        Self::smallest(machine_bytes, limits_below(Path::new("/")))
    }
}

/// What memory volumes may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForVolumes {
    /// What the process may.
    pub allowed: Allowed,
    /// What the data side may come to take of it, in bytes (`--memory-max`).
    pub data_side_bytes: u64,
}

/// Memory volumes would come to more than there is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "all volumes in memory would come to {wanted_mib} MiB, and may have {volumes_mib} MiB: {allowed_mib} MiB, by {by}, less what \
     --memory-max keeps for connections"
)]
pub struct TooMuchMemory {
    /// This one and those that there are, in MiB.
    pub wanted_mib: u64,
    /// What they may have, in MiB.
    pub volumes_mib: u64,
    /// What the process may have, in MiB.
    pub allowed_mib: u64,
    /// And why no more.
    pub by: BoundBy,
}

impl ForVolumes {
    /// What they may have together, in bytes: what the data side leaves, and half at least, however much that was given.
    pub fn bytes(&self) -> u64 {
        let allowed_bytes = self.allowed.bytes;
        allowed_bytes - self.data_side_bytes.min(allowed_bytes / 2)
    }

    /// Whether memory volumes of so many bytes in all fit.
    ///
    /// # Errors
    /// [`TooMuchMemory`]
    pub fn check(&self, all_bytes: u64) -> Result<(), TooMuchMemory> {
        if all_bytes <= self.bytes() {
            return Ok(());
        }
        Err(TooMuchMemory {
            wanted_mib: all_bytes.div_ceil(1 << 20),
            volumes_mib: self.bytes() >> 20,
            allowed_mib: self.allowed.bytes >> 20,
            by: self.allowed.by.clone(),
        })
    }
}

/// Which version of the interface a hierarchy has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    fn limit_files(self) -> &'static [&'static str] {
        match self {
            Self::One => &["memory.limit_in_bytes"],
            Self::Two => &["memory.max", "memory.high"],
        }
    }
}

/// A directory of a control group that counts for this process.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    directory: PathBuf,
    version: Version,
}

/// The limits of this process's control groups, with their files; `root` is `/` but for tests.
fn limits_below(root: &Path) -> Vec<(PathBuf, u64)> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let groups = groups(&read("proc/self/cgroup"), &read("proc/self/mountinfo"));
    let files = groups
        .iter()
        .flat_map(|group| group.version.limit_files().iter().map(|name| group.directory.join(name)));
    let limits = files.filter_map(|file| {
        let below_root = file.strip_prefix("/").unwrap_or(&file);
        let bytes = limit_bytes(&std::fs::read_to_string(root.join(below_root)).ok()?)?;
        Some((file, bytes))
    });
    limits.collect()
}

/// A limit as its file has it; `None`: there is none.
fn limit_bytes(text: &str) -> Option<u64> {
    // "max", and what is not known, bound nothing; version 1 has a number beyond every machine's memory for it.
    text.trim().parse().ok()
}

/// The process's own groups that may limit memory, and all above them that can be seen.
fn groups(cgroup: &str, mountinfo: &str) -> Vec<Group> {
    let mounts: Vec<(Version, PathBuf, PathBuf)> = mountinfo.lines().filter_map(hierarchy).collect();
    let mut groups = Vec::new();
    for (version, path) in cgroup.lines().filter_map(membership) {
        let Some((_, mount_root, mount_point)) = mounts.iter().find(|(of, ..)| *of == version) else {
            continue;
        };
        let is_outside = path.components().any(|component| component == Component::ParentDir);
        let below = path.strip_prefix(mount_root).ok().filter(|_| !is_outside);
        // In a container the mount may begin at the process's own group, whatever that is called outside.
        let own = mount_point.join(below.unwrap_or(Path::new("")));
        let up_to_mount = own.ancestors().take_while(|directory| directory.starts_with(mount_point));
        groups.extend(up_to_mount.map(|directory| Group { directory: directory.to_owned(), version }));
    }
    groups
}

/// The process's group in a hierarchy that has the memory controller, of a line `number:controllers:path`.
fn membership(line: &str) -> Option<(Version, PathBuf)> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    if controllers.is_empty() {
        return Some((Version::Two, path.into()));
    }
    controllers.split(',').any(|controller| controller == "memory").then(|| (Version::One, path.into()))
}

/// A hierarchy with the memory controller, of a line of mountinfo: which part of it is mounted, and where.
fn hierarchy(line: &str) -> Option<(Version, PathBuf, PathBuf)> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, point) = (mount.next()?, mount.next()?);
    let mut file_system = file_system.split(' ');
    let version = match file_system.next()? {
        "cgroup2" => Version::Two,
        "cgroup" if file_system.nth(1)?.split(',').any(|option| option == "memory") => Version::One,
        _ => return None,
    };
    Some((version, root.into(), point.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A root directory with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    fn allowed(files: &[(&str, &str)]) -> (u64, String) {
        let root = root(files);
        let allowed = Allowed::smallest(64 * GIB, limits_below(root.path()));
        let by = match allowed.by {
            BoundBy::Machine => String::new(),
            BoundBy::ControlGroup(file) => file.display().to_string(),
        };
        (allowed.bytes, by)
    }

    const V2: &str = "25 1 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn the_smallest_of_all_limits_above_counts() {
        let own = "sys/fs/cgroup/storage.slice/volserver.service";
        let with = |own_max, own_high, slice_max, slice_high| {
            allowed(&[
                ("proc/self/cgroup", "0::/storage.slice/volserver.service\n"),
                ("proc/self/mountinfo", V2),
                (&format!("{own}/memory.max"), own_max),
                (&format!("{own}/memory.high"), own_high),
                ("sys/fs/cgroup/storage.slice/memory.max", slice_max),
                ("sys/fs/cgroup/storage.slice/memory.high", slice_high),
            ])
        };
        let file = |below: &str| format!("/sys/fs/cgroup/storage.slice/{below}");
        assert_eq!(with("max\n", "max\n", "max\n", "max\n"), (64 * GIB, String::new()));
        assert_eq!(
            with("2147483648\n", "max\n", "max\n", "max\n"),
            (2 * GIB, file("volserver.service/memory.max"))
        );
        assert_eq!(
            with("2147483648\n", "1073741824\n", "max\n", "max\n"),
            (GIB, file("volserver.service/memory.high"))
        );
        assert_eq!(with("2147483648\n", "max\n", "1073741824\n", "max\n"), (GIB, file("memory.max")));
        assert_eq!(with("max\n", "max\n", "max\n", "4096\n"), (4096, file("memory.high")));
        // More than the machine has is no limit.
        assert_eq!(with("137438953472\n", "max\n", "max\n", "max\n"), (64 * GIB, String::new()));
    }

    #[test]
    fn version_1_and_both_at_once_are_read() {
        let mountinfo = "35 32 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            36 32 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let cgroup = "4:cpu,cpuacct:/other\n5:memory:/docker/abc\n0::/docker/abc\n";
        let of_docker = "sys/fs/cgroup/memory/docker/memory.limit_in_bytes";
        let without = ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n");
        let files = [("proc/self/cgroup", cgroup), ("proc/self/mountinfo", mountinfo), without];
        assert_eq!(allowed(&files), (64 * GIB, String::new()));
        let limited = [&files[..], &[(of_docker, "536870912\n")]].concat();
        assert_eq!(allowed(&limited), (GIB / 2, format!("/{of_docker}")));
        let unified = "sys/fs/cgroup/unified/docker/abc/memory.max";
        let both = [&limited[..], &[(unified, "1048576\n")]].concat();
        assert_eq!(allowed(&both), (1 << 20, format!("/{unified}")));
    }

    #[test]
    fn in_a_container_the_mount_begins_where_its_limits_are() {
        let own = ("sys/fs/cgroup/memory.max", "1073741824\n");
        // With a namespace of control groups; with the host's names beside a mount of the own group; as seen from outside.
        for (path, mount_root) in [("/", "/"), ("/kube/pod1", "/kube/pod1"), ("/../pod1", "/")] {
            let cgroup = format!("0::{path}\n");
            let mountinfo = V2.replace(" / ", &format!(" {mount_root} "));
            let files = [("proc/self/cgroup", &cgroup[..]), ("proc/self/mountinfo", &mountinfo), own];
            assert_eq!(allowed(&files).0, GIB, "{path}");
        }
    }

    #[test]
    fn what_cannot_be_read_bounds_nothing() {
        assert_eq!(allowed(&[]).0, 64 * GIB);
        let odd =
            [("proc/self/cgroup", "0\n::\nx:memory\n"), ("proc/self/mountinfo", "1 2\n - \n - cgroup\n")];
        assert_eq!(allowed(&odd).0, 64 * GIB);
        assert!(Allowed::of_this_process().bytes > 0);
    }

    #[test]
    fn memory_volumes_have_what_connections_leave_together() {
        let by = BoundBy::ControlGroup("/sys/fs/cgroup/memory.max".into());
        let of = |data_side_bytes| ForVolumes {
            allowed: Allowed { bytes: 4 * GIB, by: by.clone(), machine_bytes: 64 * GIB },
            data_side_bytes,
        };
        assert!(of(GIB).check(3 * GIB).is_ok());
        let refused = of(GIB).check(3 * GIB + 1).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "all volumes in memory would come to 3073 MiB, and may have 3072 MiB: 4096 MiB, by /sys/fs/cgroup/memory.max \
             (MemoryMax= or MemoryHigh= of a unit), less what --memory-max keeps for connections"
        );
        // Half at least, though --memory-max was given more than there is.
        assert!(of(64 * GIB).check(2 * GIB).is_ok() && of(64 * GIB).check(2 * GIB + 1).is_err());
        assert!(of(0).check(u64::MAX).is_err());
    }
}
