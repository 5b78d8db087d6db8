//! Debian's stock kernels, fetched once and kept in the lab's cache: an image and a module tree per series.
//!
//! Always the newest of a series, found through its metapackage, because the mirror drops older builds. A cached
//! kernel is used for a day before the mirror is asked again, and for as long as the mirror cannot be
//! reached. A kernel appears in the cache by one rename, so one that is there is whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use testlab::kernel_series::KernelSeries;

use super::apt::{self, Apt};
use super::packages;
use crate::lab::progress::Step;
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// The Debian release whose archive holds the kernels of both series.
const DEBIAN_RELEASE: &str = "trixie";

/// The package that depends on the newest kernel of a suite.
const METAPACKAGE: &str = "linux-image-amd64";

/// Packages that hold files of the kernel. Others it depends on (kmod, an initramfs generator) are not unpacked.
const KERNEL_PACKAGES: [&str; 4] = ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"];

/// How long a cached kernel is used without asking the mirror for a newer one.
const CHECK_INTERVAL: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a mirror that could not be reached is left alone: asking one that does not answer takes a minute.
const RETRY_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// Unpacking 120 MB of compressed modules.
const UNPACK_DEADLINE: Duration = Duration::from_secs(300);

/// A kernel that can be booted.
#[derive(Clone)]
pub(crate) struct Kernel {
    /// As `uname -r` will print it.
    pub(crate) release: String,
    /// The bootable image.
    pub(crate) image: PathBuf,
    /// The directory that becomes the guest's `/lib/modules`.
    pub(crate) modules: PathBuf,
}

/// The kernel of `series`, fetched if the cache has none or an older one.
///
/// # Errors
/// The cache has none, and the mirror cannot be reached or its packages cannot be verified.
pub(crate) fn ensure_cached(workspace: &Workspace, series: KernelSeries) -> Result<Kernel> {
    // A machine may run with it, and several may start at once: what this process has once found is used to its end.
    static FOUND: Mutex<Vec<(KernelSeries, Kernel)>> = Mutex::new(Vec::new());
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, kernel)) = found.iter().find(|(known, _)| *known == series) {
        return Ok(kernel.clone());
    }
    let kernel = find(workspace, series)?;
    found.push((series, kernel.clone()));
    Ok(kernel)
}

fn find(workspace: &Workspace, series: KernelSeries) -> Result<Kernel> {
    let directory = workspace.cache.join("kernels").join(series.name());
    let checked = directory.join("checked");
    let age = |file: &Path| SystemTime::now().duration_since(fs::metadata(file).ok()?.modified().ok()?).ok();
    if age(&checked).is_some_and(|age| age < CHECK_INTERVAL) {
        return open(series, &directory);
    }
    match fetch_newest(workspace, series, &directory) {
        Ok(()) => {
            fs::write(&checked, "").context("noting when the mirror was asked")?;
            open(series, &directory)
        }
        Err(error) => {
            crate::lab::interrupt::check()?;
            let cached = open(series, &directory);
            let Ok(cached) = cached else {
                return Err(error).with_context(|| format!("there is no {series} kernel in the cache"));
            };
            eprintln!("lab: using the cached kernel {}: {error:#}", cached.release);
            let last_check = SystemTime::now() - CHECK_INTERVAL + RETRY_INTERVAL;
            let checked = fs::File::create(&checked).context("noting when the mirror was asked")?;
            checked.set_modified(last_check).context("noting when the mirror was asked")?;
            Ok(cached)
        }
    }
}

/// Opens the kernel in the cache.
fn open(series: KernelSeries, directory: &Path) -> Result<Kernel> {
    let current = directory.join("current");
    let modules = current.join("modules");
    let mut releases = Vec::new();
    for entry in fs::read_dir(&modules).with_context(|| format!("reading {}", modules.display()))? {
        releases.push(entry?.file_name().to_string_lossy().into_owned());
    }
    let [release] = releases.as_slice() else {
        bail!("{}: want one kernel, have {releases:?}", modules.display())
    };
    ensure!(series.contains_release(release), "{release} is no {series} kernel");
    Ok(Kernel { release: release.clone(), image: current.join("vmlinuz"), modules })
}

/// Asks the mirror, and replaces the cached kernel if there is a newer one.
fn fetch_newest(workspace: &Workspace, series: KernelSeries, directory: &Path) -> Result<()> {
    packages::ensure_keys_of(DEBIAN_RELEASE)?;
    let suite = match series {
        KernelSeries::V7 => format!("{DEBIAN_RELEASE}-backports"),
        KernelSeries::V6_12 => DEBIAN_RELEASE.to_owned(),
    };
    let apt_directory = workspace.cache.join(format!("apt-{suite}"));
    let apt = Apt::with_suites(&apt_directory, &apt::debian_mirror()?, &[suite], true)?;
    let asking = Step::begin(&format!("asking the Debian mirror for the newest {series} kernel"));
    apt.update().context("the Debian mirror")?;
    asking.end();
    let version = apt.newest_version(METAPACKAGE)?;
    ensure!(series.contains_release(&version), "Debian's newest kernel there is {version}, not a {series}");
    let current = directory.join("current");
    if fs::read_to_string(current.join("version")).is_ok_and(|cached| cached == version) {
        return Ok(());
    }
    let wanted = kernel_packages(&apt)?;
    let staging = directory.join("staging");
    let step = Step::begin_fetching(&format!("fetching kernel {version}"), &staging);
    remove_if_there(&staging)?;
    let archives = apt.download(&wanted, &staging.join("packages"))?;
    unpack(&archives, &staging).with_context(|| format!("unpacking {wanted:?}"))?;
    fs::write(staging.join("version"), version).context("noting the kernel's version")?;
    remove_if_there(&staging.join("packages"))?;
    remove_if_there(&current)?;
    fs::rename(&staging, &current).context("moving the kernel into the cache")?;
    step.end();
    Ok(())
}

/// The packages that make up the newest kernel, without the metapackages (which hold no files).
fn kernel_packages(apt: &Apt) -> Result<Vec<String>> {
    let mut names = apt.dependencies(METAPACKAGE)?;
    let has_version = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
    names.retain(|name| {
        KERNEL_PACKAGES.iter().any(|prefix| name.strip_prefix(prefix).is_some_and(has_version))
            && !name.ends_with("-unsigned")
    });
    names.sort();
    names.dedup();
    ensure!(!names.is_empty(), "{METAPACKAGE} depends on no kernel package we know");
    Ok(names)
}

/// Unpacks the packages and puts image and modules where [`open`] looks for them, with an index for modprobe.
fn unpack(archives: &[PathBuf], staging: &Path) -> Result<()> {
    let tree = staging.join("tree");
    for archive in archives {
        tool::output(tool::command("dpkg-deb").arg("-x").arg(archive).arg(&tree), UNPACK_DEADLINE)?;
    }
    // Packages of either kind: before and after Debian merged /lib into /usr/lib.
    let modules = ["usr/lib/modules", "lib/modules"].map(|path| tree.join(path));
    let modules = modules.iter().find(|path| path.is_dir()).context("the packages hold no modules")?;
    let release = first_entry(modules)?.file_name().context("a module tree has a name")?.to_owned();
    let image_beside_modules = modules.join(&release).join("vmlinuz");
    let image_in_boot = tree.join("boot").join(format!("vmlinuz-{}", release.to_string_lossy()));
    let image = if image_beside_modules.is_file() { image_beside_modules } else { image_in_boot };
    fs::rename(&image, staging.join("vmlinuz")).with_context(|| format!("moving {}", image.display()))?;
    // depmod wants the tree below a `lib/modules` of its own.
    let base = staging.join("depmod");
    fs::create_dir_all(base.join("lib")).context("creating depmod's directory")?;
    fs::rename(modules, base.join("lib/modules")).context("moving the modules")?;
    tool::output(tool::command("depmod").arg("-b").arg(&base).arg(&release), UNPACK_DEADLINE)?;
    fs::rename(base.join("lib/modules"), staging.join("modules")).context("moving the modules")?;
    remove_if_there(&base)?;
    remove_if_there(&tree)
}

fn first_entry(directory: &Path) -> Result<PathBuf> {
    let entry =
        fs::read_dir(directory)?.next().with_context(|| format!("{} is empty", directory.display()))?;
    Ok(entry?.path())
}

fn remove_if_there(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", directory.display()))
        }
        _ => Ok(()),
    }
}
