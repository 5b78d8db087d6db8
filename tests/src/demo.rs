//! What `cargo lab demo` shows, run inside the machine: a real file system on a network disk, from `volserver` to
//! `volctl delete`, every command as a user would type it, with its output.
//!
//! Uses the product only through its programs. The first step that fails ends the demo with the command that failed.
//! What it starts and mounts it takes away again, whatever happens: with `--host` the machine is somebody's.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use testlab::shell::{run as run_quietly, wait_for};

/// The promise: at least this many files.
const FILES_MIN: usize = 3000;
/// Counting ends here: a tree this large is as good as any larger one.
const FILES_COUNTED_MAX: usize = 20_000;
/// How often a long step says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// A daemon that is not ready, or not gone, by then has failed.
const DAEMON_DEADLINE: Duration = Duration::from_secs(60);
/// The VM's scratch disk; the server's data goes on an XFS there, where O_DIRECT and hole punching work.
const SCRATCH_DISK: &str = "/dev/vda";

/// Runs the demo.
///
/// # Errors
/// The first command that failed.
pub(crate) fn run() -> Result<()> {
    let started = Instant::now();
    let mut stage = Stage::set()?;
    let told = play(&mut stage);
    if told.is_err() {
        stage.show_logs();
    }
    let cleared = stage.clear();
    let proved = told?;
    cleared?;
    println!();
    println!("{proved}");
    println!("{:.0} s from the first command to the last.", started.elapsed().as_secs_f64());
    Ok(())
}

fn play(stage: &mut Stage) -> Result<String> {
    say("A storage server, and the node daemon that turns its volumes into local disks");
    stage.start_daemons()?;
    say("A volume becomes a disk");
    show("volctl create vol-123 --size 2G")?;
    show("volctl attach vol-123")?;
    let device = fs::canonicalize("/dev/volnode/vol-123").context("/dev/volnode/vol-123")?;
    let device = device.display().to_string();
    show("volctl attachments")?;
    let data_path = data_path()?;

    say("ext4 on it, with a real tree of files");
    let (tree, files) = choose_tree()?;
    let mount_point = stage.directory.join("mnt");
    fs::create_dir(&mount_point)?;
    let (mount_point, sums) = (mount_point.display().to_string(), stage.directory.join("SHA256SUMS"));
    let sums = sums.display();
    show(&format!("mkfs.ext4 -q {device}"))?;
    show(&format!("mount {device} {mount_point}"))?;
    let copied = || inodes_in_use(&mount_point).map(|inodes| format!("{inodes} of some {files} files"));
    show_with_progress(&format!("cp -r {} {mount_point}/tree", tree.display()), copied)?;
    let sum = format!("cd {mount_point} && find . -type f -print0 | sort -z | xargs -0 sha256sum > {sums}");
    show_with_progress(&sum, || Ok("checksums".into()))?;
    show(&format!("umount {mount_point}"))?;

    say("Detached, attached again, checked");
    show("volctl detach vol-123")?;
    show("volctl attach vol-123")?;
    show("e2fsck -fn /dev/volnode/vol-123")?;
    show(&format!("mount /dev/volnode/vol-123 {mount_point}"))?;
    let check = format!("cd {mount_point} && sha256sum --check --strict --quiet {sums}");
    show_with_progress(&check, || Ok("comparing checksums".into()))?;
    let checked = fs::read_to_string(stage.directory.join("SHA256SUMS"))?.lines().count();
    ensure!(checked >= FILES_MIN, "only {checked} files were compared");
    show(&format!("umount {mount_point}"))?;

    say("And gone");
    show("volctl detach vol-123")?;
    show("volctl delete vol-123")?;
    show("volctl list")?;
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    Ok(format!(
        "Proved: {checked} files on ext4 on vol-123 came back with equal checksums after a detach and an attach; \
         e2fsck found nothing.\nData path: {data_path} (Linux {release})."
    ))
}

/// What the demo needs around it, and what has to go in the end.
struct Stage {
    directory: PathBuf,
    data_mounted: bool,
    daemons: Vec<Child>,
}

impl Stage {
    fn set() -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("volnode-demo-{}", std::process::id()));
        fs::create_dir(&directory).context("a directory for the demo")?;
        let mut stage = Self { directory, data_mounted: false, daemons: Vec::new() };
        run_quietly("modprobe", &["ublk_drv"])?;
        if Path::new(SCRATCH_DISK).exists() && in_vm() {
            fs::create_dir_all("/var/lib/volnode")?;
            run_quietly("mkfs.xfs", &["-q", "-f", SCRATCH_DISK])?;
            run_quietly("mount", &[SCRATCH_DISK, "/var/lib/volnode"])?;
            stage.data_mounted = true;
        }
        Ok(stage)
    }

    /// In the VM the daemons run with their defaults; on somebody's machine the server keeps its data apart.
    fn start_daemons(&mut self) -> Result<()> {
        let data_dir =
            if self.data_mounted { PathBuf::from("/var/lib/volnode") } else { self.directory.join("data") };
        self.start(&format!("volserver --data-dir {}", data_dir.display()))?;
        self.start("volclient serve")
    }

    fn start(&mut self, command: &str) -> Result<()> {
        println!("$ {command} &");
        let mut words = command.split(' ');
        let program = words.next().context("an empty command")?;
        let log = File::create(self.log_of(program))?;
        let mut daemon = Command::new(program);
        daemon.args(words).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.daemons.push(daemon.spawn().with_context(|| program.to_owned())?);
        let ready = wait_for(&format!("{program} to be ready"), DAEMON_DEADLINE, || {
            let log = fs::read_to_string(self.log_of(program))?;
            Ok(log.lines().find(|line| line.starts_with(&format!("{program} ready"))).map(str::to_owned))
        })?;
        println!("{ready}");
        Ok(())
    }

    fn log_of(&self, program: &str) -> PathBuf {
        self.directory.join(format!("{program}.log"))
    }

    fn show_logs(&self) {
        for program in ["volserver", "volclient"] {
            let log = fs::read_to_string(self.log_of(program)).unwrap_or_default();
            println!("--- log of {program}\n{log}");
        }
    }

    fn clear(mut self) -> Result<()> {
        let mount_point = self.directory.join("mnt");
        if is_mounted(&mount_point)? {
            run_quietly("umount", &[&mount_point])?;
        }
        // Without a daemon there is nothing to detach from; with one, detaching what is not attached is no error.
        let detached = if self.daemons.len() == 2 {
            run_quietly("volctl", &["detach", "vol-123"]).map(drop)
        } else {
            Ok(())
        };
        while let Some(mut daemon) = self.daemons.pop() {
            kill_process(Pid::from_child(&daemon), Signal::TERM).context("SIGTERM")?;
            wait_for("a daemon to end", DAEMON_DEADLINE, || Ok(daemon.try_wait()?))?;
        }
        if self.data_mounted {
            run_quietly("umount", &["/var/lib/volnode"])?;
        }
        fs::remove_dir_all(&self.directory)?;
        detached
    }
}

fn in_vm() -> bool {
    fs::read_to_string("/sys/class/dmi/id/sys_vendor").is_ok_and(|vendor| vendor.trim() == "QEMU")
}

fn is_mounted(path: &Path) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    Ok(mounts.lines().any(|line| line.split(' ').nth(1) == path.to_str()))
}

/// A heading of the demo.
fn say(heading: &str) {
    println!("\n# {heading}");
}

/// Prints a command as a user would type it, then its output as it comes.
fn show(command: &str) -> Result<()> {
    show_with_progress(command, || Ok(String::new()))
}

/// As [`show`]; while the command runs, says now and then how far it is.
fn show_with_progress(command: &str, progress: impl Fn() -> Result<String>) -> Result<()> {
    println!("$ {command}");
    let mut shell = Command::new("bash")
        .args(["-euo", "pipefail", "-c", command])
        .stdin(Stdio::null())
        .spawn()
        .context("bash")?;
    let started = Instant::now();
    let mut said = started;
    let status = loop {
        if let Some(status) = shell.try_wait()? {
            break status;
        }
        if said.elapsed() >= PROGRESS_INTERVAL {
            said = Instant::now();
            println!("  ... {:.0} s {}", started.elapsed().as_secs_f64(), progress()?);
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    ensure!(status.success(), "`{command}`: {status}");
    Ok(())
}

fn inodes_in_use(mount_point: &str) -> Result<u64> {
    let found = rustix::fs::statvfs(mount_point)?;
    Ok(found.f_files - found.f_ffree)
}

/// The data path of vol-123, as the product tells it.
fn data_path() -> Result<String> {
    let shown = run_quietly("volctl", &["attachments", "--output", "json"])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    Ok(shown[0]["data_path"].as_str().context("data_path")?.to_owned())
}

/// The smallest tree on this machine that has enough files, and how many: documentation, C headers, or the sources of the
/// crates we are built of.
fn choose_tree() -> Result<(PathBuf, usize)> {
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let crates = cargo_home.or(home).map(|cargo| cargo.join("registry/src"));
    let trees = [Some(PathBuf::from("/usr/share/doc")), Some(PathBuf::from("/usr/include")), crates];
    let counted = trees.into_iter().flatten().map(|tree| {
        let files = count_files(&tree, FILES_COUNTED_MAX);
        (tree, files)
    });
    let enough = counted.filter(|(_, files)| *files >= FILES_MIN).min_by_key(|(_, files)| *files);
    enough.context("no tree of 3,000 files on this machine")
}

/// Files below a directory, at most one more than `limit`.
fn count_files(directory: &Path, limit: usize) -> usize {
    let (mut files, mut directories) = (0, vec![directory.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                Ok(kind) if kind.is_file() => files += 1,
                _ => {}
            }
            if files > limit {
                return files;
            }
        }
    }
    files
}
