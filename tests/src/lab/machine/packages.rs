//! The Debian packages the lab needs: finds out which are missing and installs them.
//!
//! A package counts as present if the program it is wanted for is, in a version that serves the tests: on a machine that is
//! not Debian the user may have them from anywhere. Where they cannot be installed the error says exactly what to install.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::apt::{self, Apt};
use super::python_tools::ensure_python_tools;
use crate::lab::progress::{self, Step};
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// A package and the program that shows it is there.
struct Package {
    name: &'static str,
    program: &'static str,
    /// The option that makes the program tell its version, and the oldest that serves the tests.
    oldest: Option<(&'static str, Version)>,
}

/// The first two numbers of a version.
type Version = (u32, u32);

impl Package {
    /// One of which any version will do.
    const fn any(name: &'static str, program: &'static str) -> Self {
        Self { name, program, oldest: None }
    }

    /// One that has to be `oldest` or newer.
    const fn from(name: &'static str, program: &'static str, option: &'static str, oldest: Version) -> Self {
        Self { name, program, oldest: Some((option, oldest)) }
    }
}

/// The QEMU that `cargo lab cost` was made with: what it sets of the processor makes 7.2 count the same, but that one may hang
/// with a clock that counts instructions. The tests of extended headers need 9.1. Debian: trixie, or bookworm-backports.
pub(crate) const QEMU_SERIES: Version = (10, 0);

/// The emulator's program.
const QEMU: &str = "qemu-system-x86_64";

/// Where QEMU's packages are concerned: they are of one version, and are installed together.
const QEMU_PACKAGES: [Package; 2] = [
    Package::from("qemu-system-x86", QEMU, "--version", QEMU_SERIES),
    Package::from("qemu-utils", "qemu-io", "--version", QEMU_SERIES),
];

/// What else the lab and the tests call. The versions are Debian 12's, on which the tests were made.
const PACKAGES: [Package; 32] = [
    Package::any("g++", "g++"),
    Package::any("busybox-static", "busybox"),
    Package::any("cpio", "cpio"),
    Package::any("xz-utils", "xz"),
    Package::any("zstd", "zstd"),
    Package::any("kmod", "depmod"),
    Package::any("util-linux", "setpriv"),
    Package::any("fdisk", "sfdisk"),
    Package::any("iproute2", "ip"),
    Package::from("systemd", "systemd-analyze", "--version", (252, 0)),
    Package::any("procps", "ps"),
    Package::any("python3", "/usr/bin/python3"),
    Package::any("python3-pip", "/usr/lib/python3/dist-packages/pip/__init__.py"),
    Package::any("openssl", "openssl"),
    Package::any("python3-grpcio", "/usr/lib/python3/dist-packages/grpc/__init__.py"),
    Package::any("protobuf-compiler", "protoc"),
    Package::any("libprotobuf-dev", "/usr/include/google/protobuf/field_mask.proto"),
    Package::any("protobuf-compiler-grpc", "grpc_python_plugin"),
    // A newer compiler is fetched by this one, as a module, where a program asks for it.
    Package::from("golang-go", "go", "version", (1, 21)),
    Package::any("e2fsprogs", "mkfs.ext4"),
    Package::any("xfsprogs", "mkfs.xfs"),
    Package::any("btrfs-progs", "mkfs.btrfs"),
    Package::any("dmsetup", "dmsetup"),
    Package::from("cryptsetup-bin", "cryptsetup", "--version", (2, 6)),
    Package::any("lvm2", "lvcreate"),
    Package::any("thin-provisioning-tools", "thin_check"),
    Package::from("fio", "fio", "--version", (3, 33)),
    Package::from("nbdkit", "nbdkit", "--version", (1, 32)),
    Package::from("libnbd-bin", "nbdcopy", "--version", (1, 14)),
    Package::any("python3-libnbd", "nbdsh"),
    Package::from("nbd-client", "nbd-client", "-V", (3, 24)),
    Package::from("nbd-server", "nbd-server", "-V", (3, 24)),
];

/// What containers run in. containerd itself is built with Kubernetes: Debian's is too old for it.
const CONTAINER_RUNTIME: [Package; 3] = [
    Package::any("runc", "runc"),
    Package::any("containernetworking-plugins", "/usr/lib/cni/bridge"),
    Package::any("nftables", "nft"),
];

/// How programs call the API that have no code of ours, from Go's modules.
const GRPCURL: GoProgram =
    GoProgram { name: "grpcurl", package: "github.com/fullstorydev/grpcurl/cmd/grpcurl", version: "v1.9.3" };

/// The CSI conformance suite, the same. Older ones know nothing of CSI 1.13's health calls.
const CSI_SANITY: GoProgram = GoProgram {
    name: "csi-sanity",
    package: "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
    version: "v5.6.0",
};
const GO_PROGRAMS: [&GoProgram; 2] = [&GRPCURL, &CSI_SANITY];

/// A program that is built of a Go module.
struct GoProgram {
    name: &'static str,
    package: &'static str,
    version: &'static str,
}

/// The file system exerciser, from crates.io.
const FSX: &str = "fsx@0.3.2";

/// Building a small program and its dependencies from nothing.
const TOOL_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// `--version` of a program that works takes no time at all.
const VERSION_DEADLINE: Duration = Duration::from_secs(20);

/// Makes sure that every program the lab needs is there, in a version that serves it.
///
/// # Errors
/// Something is missing or too old and cannot be installed: not Debian, not root, no network. The error names it.
pub(crate) fn ensure_installed(workspace: &Workspace) -> Result<()> {
    ensure(workspace, PACKAGES.iter().chain(&QEMU_PACKAGES))?;
    GO_PROGRAMS.iter().try_for_each(|program| ensure_go_program(workspace, program))?;
    ensure_python_tools(workspace)?;
    // A newer one is somebody's own: it serves, but the ruler's figures may be others.
    let found = version_of(QEMU, "--version").context("QEMU is installed but does not run")?;
    if found > QEMU_SERIES {
        let (wanted, found) = (shown(QEMU_SERIES), shown(found));
        eprintln!("lab: QEMU here is {found}; the ratios of `cargo lab cost` were made with {wanted}");
    }
    Ok(())
}

/// Makes sure of every program but the virtual machine.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_tools(workspace: &Workspace) -> Result<()> {
    ensure(workspace, PACKAGES.iter().chain(&QEMU_PACKAGES[1..]))?;
    GO_PROGRAMS.iter().try_for_each(|program| ensure_go_program(workspace, program))?;
    ensure_python_tools(workspace)
}

fn ensure<'a>(workspace: &Workspace, packages: impl Iterator<Item = &'a Package>) -> Result<()> {
    let unserved: Vec<(&Package, String)> =
        packages.filter_map(|package| Some((package, unserved(package)?))).collect();
    if unserved.is_empty() {
        return Ok(());
    }
    let (packages, why): (Vec<&Package>, Vec<String>) = unserved.into_iter().unzip();
    let names: Vec<&str> = packages.iter().map(|package| package.name).collect();
    let advice = format!("the lab needs these Debian packages: {} ({})", names.join(" "), why.join(", "));
    apt::debian_code_name().with_context(|| advice.clone())?;
    ensure!(rustix::process::geteuid().is_root(), "{advice}\nInstall them as root, or run the lab as root.");
    let step = Step::begin(&format!("installing {} ({})", names.join(" "), why.join(", ")));
    install(workspace, &packages).with_context(|| advice.clone())?;
    step.end();
    for package in packages {
        if let Some(why) = self::unserved(package) {
            bail!("{advice}\napt-get succeeded, and yet: {why}");
        }
    }
    Ok(())
}

/// Why the tests cannot use what is there of a package; none if they can.
fn unserved(package: &Package) -> Option<String> {
    if tool::find(package.program).is_none() {
        return Some(format!("no {}", package.program));
    }
    let (option, oldest) = package.oldest?;
    match version_of(package.program, option) {
        Ok(found) if found >= oldest => None,
        Ok(found) => Some(format!("{} is {}, {} is wanted", package.program, shown(found), shown(oldest))),
        Err(error) => Some(format!("{error:#}")),
    }
}

/// The version a program tells.
fn version_of(program: &str, option: &str) -> Result<Version> {
    // Some tell it on stderr, and some with an exit code of their own.
    let told = tool::finish(tool::command(program).arg(option), VERSION_DEADLINE)?;
    let text = format!("{}{}", String::from_utf8_lossy(&told.stdout), told.stderr);
    let line = text.lines().next().unwrap_or_default();
    first_version(line).with_context(|| format!("{program} {option} tells no version: {line:?}"))
}

/// The first word of digits in a line with what comes after its dot: `fio-3.33`, `systemd 252 (252.38-1)`, `1:10.0.2+ds`.
fn first_version(text: &str) -> Option<Version> {
    let epoch = text.split_once(':').filter(|(epoch, _)| epoch.chars().all(|c| c.is_ascii_digit()));
    let text = epoch.map_or(text, |(_, version)| version);
    let start = text.find(|c: char| c.is_ascii_digit())?;
    let mut numbers = text[start..].split('.').map(|part| {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        (part[..end].parse().ok(), end == part.len())
    });
    let (major, is_whole) = numbers.next()?;
    let minor = numbers.next().filter(|_| is_whole).and_then(|(minor, _)| minor);
    Some((major?, minor.unwrap_or(0)))
}

fn shown((major, minor): Version) -> String {
    format!("{major}.{minor}")
}

/// Makes sure of udev, which a machine that systemd runs has, and a container has not.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_udev(workspace: &Workspace) -> Result<()> {
    ensure(workspace, std::iter::once(&Package::any("udev", "udevadm")))
}

/// Makes sure of Ansible, which only the playbook's machine needs.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_ansible(workspace: &Workspace) -> Result<()> {
    ensure(workspace, std::iter::once(&Package::any("ansible-core", "ansible-playbook")))
}

/// Makes sure of what nodes of Kubernetes start containers with, which only `cargo lab kubernetes` needs.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_container_runtime(workspace: &Workspace) -> Result<()> {
    ensure(workspace, CONTAINER_RUNTIME.iter())
}

/// Makes sure of debootstrap, which only `cargo lab fresh` needs.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_debootstrap(workspace: &Workspace) -> Result<()> {
    ensure(workspace, std::iter::once(&Package::any("debootstrap", "debootstrap")))
}

/// Makes sure of the file system exerciser, which is no Debian package.
///
/// # Errors
/// It cannot be installed; cargo has said why.
pub(crate) fn ensure_fsx(workspace: &Workspace) -> Result<()> {
    let tools = workspace.tools();
    if tools.join("bin/fsx").exists() {
        return Ok(());
    }
    let mut cargo = workspace.cargo();
    cargo.args(["install", "--locked", FSX, "--root"]).arg(&tools);
    let (status, _) = progress::cargo(&mut cargo, "compiling fsx", Stdio::null(), TOOL_DEADLINE)?;
    ensure!(status.success(), "fsx cannot be installed");
    Ok(())
}

/// Makes sure of a program in Go, in this version. Modules are kept in the lab's cache.
fn ensure_go_program(workspace: &Workspace, program: &GoProgram) -> Result<()> {
    let programs = workspace.tools().join("bin");
    let (installed, which) =
        (programs.join(program.name), format!("{}@{}", program.package, program.version));
    let stamp = programs.join(format!("{}.version", program.name));
    if installed.exists() && fs::read_to_string(&stamp).is_ok_and(|version| version == which) {
        return Ok(());
    }
    let step = Step::begin(&format!("compiling {which}"));
    let mut go = tool::command("go");
    go.args(["install", &which]).current_dir(&workspace.cache).env("GOBIN", &programs);
    // Not the user's own modules; the lab's can be deleted as other files can.
    go.env("GOPATH", workspace.cache.join("go")).env("GOFLAGS", "-modcacherw -trimpath");
    // A module may ask for a newer compiler.
    go.env("GOTOOLCHAIN", "auto").env("CGO_ENABLED", "0");
    tool::output(&mut go, TOOL_DEADLINE).with_context(|| format!("{which} cannot be built"))?;
    fs::write(&stamp, which).with_context(|| format!("writing {}", stamp.display()))?;
    step.end();
    Ok(())
}

/// Installs packages in versions that serve: from the machine's own sources where these have them, otherwise from its
/// release's backports, which need not be among its sources.
fn install(workspace: &Workspace, packages: &[&Package]) -> Result<()> {
    let apt = Apt::of_this_machine();
    apt.update().or_else(|error| {
        // One broken source of the machine's (a vendor's) need not stop us: installing tells.
        eprintln!("lab: {error:#}");
        Ok::<(), anyhow::Error>(())
    })?;
    let serves = |package: &&&Package| match package.oldest {
        None => true,
        Some((_, oldest)) => {
            let candidate = apt.newest_version(package.name).ok();
            candidate.and_then(|candidate| first_version(&candidate)).is_some_and(|found| found >= oldest)
        }
    };
    let (own, newer): (Vec<&&Package>, Vec<&&Package>) = packages.iter().partition(serves);
    let names = |packages: Vec<&&Package>| packages.iter().map(|package| package.name).collect::<Vec<_>>();
    if !own.is_empty() {
        apt.install(&names(own), None)?;
    }
    if newer.is_empty() { Ok(()) } else { install_from_backports(workspace, &names(newer)) }
}

fn install_from_backports(workspace: &Workspace, names: &[&str]) -> Result<()> {
    let code_name = apt::debian_code_name()?;
    let backports = format!("{code_name}-backports");
    let suites = [code_name.clone(), format!("{code_name}-updates"), backports.clone()];
    let apt = Apt::with_suites(&workspace.cache.join("apt-tools"), &apt::debian_mirror()?, &suites, false)?;
    apt.update()?;
    apt.install(names, Some(&backports)).with_context(|| format!("from {backports}"))
}

/// Makes sure that apt can check the signatures of the Debian release `code_name`.
///
/// # Errors
/// The keys are missing and cannot be installed. Unsigned packages are never accepted.
pub(crate) fn ensure_keys_of(code_name: &str) -> Result<()> {
    // Newer keyring packages name the same file `.pgp`.
    let files =
        ["gpg", "pgp"].map(|kind| format!("/usr/share/keyrings/debian-archive-{code_name}-stable.{kind}"));
    let present = || files.iter().any(|file| Path::new(file).exists());
    if present() {
        return Ok(());
    }
    if rustix::process::geteuid().is_root() {
        eprintln!("lab: updating debian-archive-keyring for the keys of {code_name}");
        let apt = Apt::of_this_machine();
        apt.update()?;
        apt.install(&["debian-archive-keyring"], None)?;
    }
    let advice = "update the package debian-archive-keyring, or kernels cannot be verified";
    ensure!(present(), "{} is missing: {advice}", files[0]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_and_packages_say() {
        for (text, version) in [
            ("fio-3.33", (3, 33)),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)", (10, 0)),
            ("qemu-io version 7.2.22 (Debian 1:7.2+dfsg-7)", (7, 2)),
            ("1:7.2+dfsg-7+deb12u18+b3", (7, 2)),
            ("systemd 252 (252.38-1~deb12u1)", (252, 0)),
            ("This is nbd-client, from nbd 3.24", (3, 24)),
            ("nbdcopy 1.14.2", (1, 14)),
            ("257.9-1~deb13u1", (257, 9)),
        ] {
            assert_eq!(first_version(text), Some(version), "{text}");
        }
        assert_eq!(first_version("no version at all"), None);
    }

    #[test]
    fn a_program_that_is_too_old_is_named_with_both_versions() {
        let old = Package::from("coreutils", "true", "--version", (99_999, 1));
        let why = unserved(&old).unwrap();
        assert!(why.starts_with("true is ") && why.ends_with("99999.1 is wanted"), "{why}");
        assert!(unserved(&Package::any("coreutils", "true")).is_none());
        assert!(unserved(&Package::any("none", "no-such-program")).is_some());
    }
}
