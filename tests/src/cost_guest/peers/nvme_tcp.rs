//! The kernel's NVMe over TCP: its target (`nvmet-tcp.ko`) on a RAM disk (`brd.ko`) and its client (`nvme-tcp.ko`).
//!
//! Needs neither nvme-cli nor nvmetcli: the target is configured through configfs, the client
//! by one line written to `/dev/nvme-fabrics`. Everything is taken down when dropped, the client's device before its target.
//! Source: Linux 7.3 `Documentation/nvme/`, `drivers/nvme/target/configfs.c`, `drivers/nvme/host/fabrics.c`.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::shell::{run, wait_for};

const CONFIGFS: &str = "/sys/kernel/config";

/// The port's number in configfs.
const PORT: &str = "ports/1";

/// The port IANA gave to NVMe over TCP.
const SERVICE: &str = "4420";

/// The client finds its namespace at once; a guest is slow.
const NAMESPACE_DEADLINE: Duration = Duration::from_secs(60);

/// A target that serves a RAM disk on loopback.
pub(crate) struct NvmeTcpTarget {
    /// In configfs.
    subsystem: PathBuf,
    /// By which the port offers it.
    link: PathBuf,
}

impl NvmeTcpTarget {
    /// Serves one of `size_mib` as `subsystem` (its NVMe qualified name).
    ///
    /// # Errors
    /// A driver cannot be loaded, or refuses the configuration.
    pub(crate) fn start(subsystem: &str, size_mib: u64) -> Result<Self> {
        run("modprobe", &["brd", "rd_nr=1", &format!("rd_size={}", size_mib << 10)])?;
        load_core()?;
        run("modprobe", &["nvmet-tcp"])?;
        if !nvmet().exists() {
            run("mount", &["-t", "configfs", "config", CONFIGFS])?;
        }
        let port = nvmet().join(PORT);
        create(&port)?;
        let address = [("trtype", "tcp"), ("adrfam", "ipv4"), ("traddr", "127.0.0.1"), ("trsvcid", SERVICE)];
        for (name, value) in address {
            write(&port.join(format!("addr_{name}")), value)?;
        }
        let target = Self {
            subsystem: nvmet().join("subsystems").join(subsystem),
            link: port.join("subsystems").join(subsystem),
        };
        create(&target.subsystem)?;
        write(&target.subsystem.join("attr_allow_any_host"), "1")?;
        let namespace = target.subsystem.join("namespaces/1");
        create(&namespace)?;
        write(&namespace.join("device_path"), "/dev/ram0")?;
        write(&namespace.join("enable"), "1")?;
        symlink(&target.subsystem, &target.link).with_context(|| target.link.display().to_string())?;
        Ok(target)
    }

    fn take_down(&self) -> Result<()> {
        if self.link.exists() {
            fs::remove_file(&self.link).with_context(|| self.link.display().to_string())?;
        }
        for directory in [self.subsystem.join("namespaces/1"), self.subsystem.clone()] {
            fs::remove_dir(&directory).with_context(|| directory.display().to_string())?;
        }
        fs::remove_dir(nvmet().join(PORT)).context("removing the target's port")
    }
}

impl Drop for NvmeTcpTarget {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            eprintln!("taking down the NVMe target: {error:#}");
        }
    }
}

/// A controller connected to a target of this machine, and its one namespace.
pub(crate) struct NvmeTcp {
    controller: String,
    device: PathBuf,
}

impl NvmeTcp {
    /// Connects to a subsystem with one I/O queue.
    ///
    /// # Errors
    /// The driver cannot be loaded, or the target refuses; the reason is in the kernel's log.
    pub(crate) fn connect(subsystem: &str) -> Result<Self> {
        load_core()?;
        run("modprobe", &["nvme-tcp"])?;
        let options =
            format!("transport=tcp,traddr=127.0.0.1,trsvcid={SERVICE},nqn={subsystem},nr_io_queues=1");
        let mut fabrics =
            File::options().read(true).write(true).open("/dev/nvme-fabrics").context("/dev/nvme-fabrics")?;
        fabrics.write_all(options.as_bytes()).with_context(|| format!("connecting with {options}"))?;
        let mut answer = [0; 128];
        let length = fabrics.read(&mut answer).context("the answer of /dev/nvme-fabrics")?;
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        let instance = answer.split([',', '\n']).find_map(|part| part.strip_prefix("instance="));
        let controller = format!("nvme{}", instance.with_context(|| answer.clone())?);
        let device = PathBuf::from(format!("/dev/{controller}n1"));
        let connected = Self { controller, device };
        // The namespace is scanned for in the background; its node in /dev comes before its queues in sysfs.
        let queues = wait_for("the NVMe namespace", NAMESPACE_DEADLINE, || Ok(connected.queues()))?;
        ensure!(queues == 1, "{queues} I/O queues instead of one");
        Ok(connected)
    }

    /// The block device.
    pub(crate) fn device(&self) -> &Path {
        &self.device
    }

    /// Its I/O queues, once it is there.
    fn queues(&self) -> Option<usize> {
        let listed = fs::read_dir(format!("/sys/block/{}n1/mq", self.controller)).ok()?;
        Some(listed.count()).filter(|&queues| queues > 0)
    }
}

impl Drop for NvmeTcp {
    fn drop(&mut self) {
        let file = format!("/sys/class/nvme/{}/delete_controller", self.controller);
        if let Err(error) = fs::write(&file, "1") {
            eprintln!("{file}: {error}");
        }
    }
}

/// Loads the module that client and target share, before either does. Without multipathing a namespace is called after its
/// controller, and an I/O takes no detour.
fn load_core() -> Result<()> {
    run("modprobe", &["nvme_core", "multipath=N"]).map(drop)
}

fn nvmet() -> PathBuf {
    Path::new(CONFIGFS).join("nvmet")
}

fn create(directory: &Path) -> Result<()> {
    fs::create_dir(directory).with_context(|| format!("creating {}", directory.display()))
}

fn write(file: &Path, value: &str) -> Result<()> {
    fs::write(file, value).with_context(|| format!("writing {value} to {}", file.display()))
}
