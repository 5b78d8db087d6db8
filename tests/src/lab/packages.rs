//! The Debian packages the lab needs: finds out which are missing and installs them.
//!
//! A package counts as present if the program it is wanted for is: on a machine that is not Debian the user may
//! have them from anywhere. Where they cannot be installed the error says exactly what to install.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::apt::{self, Apt};
use super::tool;
use super::workspace::Workspace;

/// A package and the program that shows it is there.
struct Package {
    name: &'static str,
    program: &'static str,
}

/// The virtual machine itself; separate because of how it has to be installed (see [`install_qemu`]).
const QEMU: Package = Package { name: "qemu-system-x86", program: "qemu-system-x86_64" };

/// What else the lab and the tests in the VM call.
const PACKAGES: [Package; 20] = [
    Package { name: "g++", program: "g++" },
    Package { name: "busybox-static", program: "busybox" },
    Package { name: "cpio", program: "cpio" },
    Package { name: "xz-utils", program: "xz" },
    Package { name: "zstd", program: "zstd" },
    Package { name: "kmod", program: "depmod" },
    Package { name: "util-linux", program: "setpriv" },
    Package { name: "iproute2", program: "ip" },
    Package { name: "systemd", program: "systemd-analyze" },
    Package { name: "procps", program: "ps" },
    Package { name: "e2fsprogs", program: "mkfs.ext4" },
    Package { name: "xfsprogs", program: "mkfs.xfs" },
    Package { name: "btrfs-progs", program: "mkfs.btrfs" },
    Package { name: "fio", program: "fio" },
    Package { name: "qemu-utils", program: "qemu-img" },
    Package { name: "nbdkit", program: "nbdkit" },
    Package { name: "libnbd-bin", program: "nbdcopy" },
    Package { name: "python3-libnbd", program: "nbdsh" },
    Package { name: "nbd-client", program: "nbd-client" },
    Package { name: "nbd-server", program: "nbd-server" },
];

/// The file system exerciser, from crates.io.
const FSX: &str = "fsx@0.3.2";

/// Building a small program and its dependencies from nothing.
const TOOL_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// `--version` of a program that works takes no time at all.
const VERSION_DEADLINE: Duration = Duration::from_secs(20);

/// Makes sure that every program the lab needs is there and that QEMU runs.
///
/// # Errors
/// Something is missing and cannot be installed: not Debian, not root, no network. The error names it.
pub(crate) fn ensure_installed(workspace: &Workspace) -> Result<()> {
    ensure_programs(workspace, tool::find(QEMU.program).is_none())?;
    let mut version = tool::command(QEMU.program);
    tool::output(version.arg("--version"), VERSION_DEADLINE).context("QEMU is installed but does not run")?;
    Ok(())
}

/// Makes sure of every program but the virtual machine.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_tools(workspace: &Workspace) -> Result<()> {
    ensure_programs(workspace, false)
}

fn ensure_programs(workspace: &Workspace, qemu_missing: bool) -> Result<()> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|package| tool::find(package.program).is_none()).map(|p| p.name).collect();
    if !missing.is_empty() || qemu_missing {
        let mut wanted = missing.clone();
        wanted.extend(qemu_missing.then_some(QEMU.name));
        let advice = format!("the lab needs these Debian packages: {}", wanted.join(" "));
        apt::debian_code_name().with_context(|| advice.clone())?;
        ensure!(
            rustix::process::geteuid().is_root(),
            "{advice}\nInstall them as root, or run the lab as root."
        );
        eprintln!("lab: installing {}", wanted.join(" "));
        install(workspace, &missing, qemu_missing).with_context(|| advice.clone())?;
        let lacking: Vec<&str> = wanted_programs(&wanted).filter(|p| tool::find(p).is_none()).collect();
        ensure!(lacking.is_empty(), "{advice}\napt-get succeeded, yet there is no {}", lacking.join(", "));
    }
    Ok(())
}

/// Makes sure of udev, which a machine that systemd runs has, and a container has not.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_udev(workspace: &Workspace) -> Result<()> {
    if tool::find("udevadm").is_some() { Ok(()) } else { install(workspace, &["udev"], false) }
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
    cargo.args(["install", "--quiet", "--locked", FSX, "--root"]).arg(&tools);
    tool::output(&mut cargo, TOOL_DEADLINE).context("installing fsx").map(drop)
}

/// The programs for which `packages` are wanted.
fn wanted_programs<'a>(packages: &'a [&str]) -> impl Iterator<Item = &'static str> + 'a {
    let all = PACKAGES.iter().chain(std::iter::once(&QEMU));
    all.filter(|package| packages.contains(&package.name)).map(|package| package.program)
}

fn install(workspace: &Workspace, packages: &[&str], qemu: bool) -> Result<()> {
    let apt = Apt::of_this_machine();
    apt.update().or_else(|error| {
        // One broken source of the machine's (a vendor's) need not stop us: installing tells.
        eprintln!("lab: {error:#}");
        Ok::<(), anyhow::Error>(())
    })?;
    if !packages.is_empty() {
        apt.install(packages, None)?;
    }
    if qemu { install_qemu(workspace, &apt) } else { Ok(()) }
}

/// Installs QEMU. Where `qemu-utils` came from backports, the release's own QEMU cannot be installed beside it
/// (the newer one breaks the older `qemu-system-common`), so backports are asked next; their suite need not
/// be among the machine's sources.
fn install_qemu(workspace: &Workspace, apt: &Apt) -> Result<()> {
    let Err(first) = apt.install(&[QEMU.name], None) else { return Ok(()) };
    let code_name = apt::debian_code_name()?;
    let backports = format!("{code_name}-backports");
    let suites = [code_name.clone(), format!("{code_name}-updates"), backports.clone()];
    let with_backports = || -> Result<()> {
        let own =
            Apt::with_suites(&workspace.cache.join("apt-tools"), &apt::debian_mirror()?, &suites, false)?;
        own.update()?;
        own.install(&[QEMU.name], Some(&backports))
    };
    with_backports().with_context(|| format!("from {code_name}: {first:#}\nfrom {backports}"))
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
