//! Encrypted volumes: LUKS by the node daemon, from the header's making to the change of its passphrase, and what nobody may find.
//!
//! What is decided is in the unit tests of `client/src/node/luks/`. The node daemon finds a `cryptsetup` here that has the true one derive
//! keys quickly: by default that takes some seconds each time, and a minute in all.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use testlab::harness::{Env, Test};
use testlab::shell::{path_with, run, sh, wait_for};
use testlab::storage_node::StorageNode;

use crate::bad_input::exit_code;
use crate::direct;

pub(crate) const TESTS: &[Test] = &[
    Test::new("luks::an_encrypted_volume_lives_through_all_that_is_done_to_it", an_encrypted_volume_lives)
        .once()
        .within(400),
    Test::new(
        "luks::a_daemon_that_is_killed_between_two_steps_goes_on_with_the_next",
        a_daemon_killed_between_steps,
    )
    .once()
    .within(400),
];

/// Found by nobody but cryptsetup.
const PASSPHRASE: &str = "correct-horse-battery-staple";
const NEXT_PASSPHRASE: &str = "another-horse-another-staple";
const MIB: u64 = 1 << 20;
/// Words that would be seen where they are in the clear, at this offset.
const AT: u64 = 8 * MIB;

fn words() -> Vec<u8> {
    b"these words are in the clear    ".repeat(4096)
}

fn check_words(disk: &Path) -> Result<()> {
    let read = direct::read(disk, AT, words().len())??;
    ensure!(read == words(), "{}: other bytes than were written", disk.display());
    Ok(())
}

/// A file with a passphrase, and a line feed that is not part of it.
fn passphrase_file(env: &Env, name: &str, passphrase: &str) -> Result<String> {
    let path = env.directory.join(name);
    fs::write(&path, format!("{passphrase}\n"))?;
    Ok(path.display().to_string())
}

/// Attaches with a passphrase; gives the clear disk.
fn unlock(node: &StorageNode, target: &str, file: &str) -> Result<PathBuf> {
    let told = node.volctl(&["attach", target, "--passphrase-file", file])?.succeeded()?;
    let disk = told.trim_end();
    ensure!(disk.starts_with("/dev/mapper/volnode-"), "attach printed {told:?}");
    Ok(PathBuf::from(disk))
}

fn disk_bytes(disk: &Path) -> Result<u64> {
    run("blockdev", &["--getsize64".as_ref(), disk.as_os_str()])?.trim().parse().context("a size")
}

fn shown(node: &StorageNode, name: &str) -> Result<serde_json::Value> {
    serde_json::from_str(&node.volctl(&["show", name, "--output", "json"])?.succeeded()?).context("JSON")
}

fn clear_disks() -> Result<usize> {
    let names = fs::read_dir("/dev/mapper")?.flatten();
    Ok(names.filter(|entry| entry.file_name().to_string_lossy().starts_with("volnode-")).count())
}

fn an_encrypted_volume_lives(env: &Env) -> Result<()> {
    sh("modprobe dm_mod")?;
    // Before the daemon starts, which has it then.
    let cores = Cores::allow(env)?;
    let stops = Stops::new(env)?;
    let mut node = StorageNode::start_on_xfs(env)?;
    node.kill_client()?;
    let mut daemon = stops.start_daemon(&node, env)?;
    let file = passphrase_file(env, "passphrase", PASSPHRASE)?;
    let next_file = passphrase_file(env, "next", NEXT_PASSPHRASE)?;
    node.volctl(&["create", "vol-1", "--encrypted", "--size", "32M"])?.succeeded()?;
    let volume = shown(&node, "vol-1")?;
    ensure!(volume["capacity_bytes"] == 48 * MIB && volume["is_encrypted"] == true, "{volume}");
    node.volctl(&["attach", "vol-1"])?.failed_with(exit_code::PASSPHRASE)?;
    ensure!(shown(&node, "vol-1")?["content"] == "never_written", "written to without a passphrase");

    let watch = Watch::start();
    let disk = unlock(&node, "vol-1", &file)?;
    let link = node.device_dir.join("vol-1");
    ensure!(fs::canonicalize(&link)? == fs::canonicalize(&disk)?, "{}", link.display());
    ensure!(disk_bytes(&disk)? == 32 * MIB, "the header is not on top of the size");
    ensure!(shown(&node, "vol-1")?["content"] == "written");
    direct::write(&disk, AT, &words())??;
    direct::flush(&disk)?;
    // The daemon keeps nothing: the next one finds the clear disk open.
    kill(daemon)?;
    daemon = stops.start_daemon(&node, env)?;
    ensure!(node.volctl(&["attach", "vol-1"])?.succeeded()?.trim_end() == disk.to_string_lossy());
    check_words(&disk)?;
    nothing_in_the_clear(&node, "vol-1", &file)?;

    grows(&node, &disk)?;
    // What is copied before the change keeps the passphrase.
    node.volctl(&["snapshot", "create", "vol-1", "s"])?.succeeded()?;
    node.volctl(&["clone", "vol-1@s", "copy"])?.succeeded()?;
    node.volctl(&["passphrase", "vol-1", "--old-file", &file, "--new-file", &next_file])?.succeeded()?;
    for target in ["vol-1@s", "copy"] {
        let copied = unlock(&node, target, &file)?;
        check_words(&copied)?;
        node.detach(target)?;
    }
    watch.end()?;
    is_closed_with_its_disk(&node, &disk)?;
    let refused = node.volctl(&["attach", "vol-1", "--passphrase-file", &file])?;
    let refused = refused.failed_with(exit_code::PASSPHRASE)?;
    ensure!(refused.contains("is wrong"), "{refused}");
    ensure!(node.attachment("vol-1").is_err() && clear_disks()? == 0, "a wrong passphrase left something");

    goes_by_force(&node, &next_file)?;
    nobody_has_it(&node, env)?;
    cores.has_none_of(daemon)
}

/// While it is used, with its bytes as they were.
fn grows(node: &StorageNode, disk: &Path) -> Result<()> {
    node.volctl(&["resize", "vol-1", "--size", "40M"])?.succeeded()?;
    ensure!(shown(node, "vol-1")?["capacity_bytes"] == 56 * MIB);
    wait_for("the clear disk to grow", Duration::from_secs(60), || {
        Ok((disk_bytes(disk)? == 40 * MIB).then_some(()))
    })?;
    check_words(disk)?;
    ensure!(node.attachment("vol-1")?["capacity_bytes"] == 40 * MIB);
    Ok(())
}

fn is_closed_with_its_disk(node: &StorageNode, disk: &Path) -> Result<()> {
    let held = File::open(disk)?;
    let refused = node.volctl(&["detach", "vol-1"])?.failed_with(exit_code::PRECONDITION)?;
    ensure!(refused.contains("open by pid"), "{refused}");
    check_words(disk)?;
    drop(held);
    node.detach("vol-1")?;
    ensure!(!disk.exists() && !node.device_dir.join("vol-1").is_symlink(), "names are left");
    Ok(())
}

/// Whoever has it open: then it goes with them.
fn goes_by_force(node: &StorageNode, file: &str) -> Result<()> {
    let disk = unlock(node, "vol-1", file)?;
    check_words(&disk)?;
    let held = File::open(&disk)?;
    node.volctl(&["detach", "vol-1", "--force"])?.succeeded()?;
    ensure!(!node.device_dir.join("vol-1").is_symlink(), "its name is left");
    let mut bytes = [0; 4096];
    let read = std::os::unix::fs::FileExt::read_at(&held, &mut bytes, 16 * MIB);
    ensure!(read.is_err(), "a disk that is gone was read");
    drop(held);
    wait_for("the clear disk to go with its last user", Duration::from_secs(20), || {
        Ok((run("dmsetup", &["ls"])?.find("volnode-").is_none()).then_some(()))
    })
}

/// What the server keeps is noise, but for the header.
fn nothing_in_the_clear(node: &StorageNode, name: &str, passphrase_file: &str) -> Result<()> {
    let file = node.volume_file(name)?;
    let mut header = [0; 6];
    std::os::unix::fs::FileExt::read_exact_at(&File::open(&file)?, &mut header, 0)?;
    ensure!(header == *b"LUKS\xba\xbe", "no header in {}", file.display());
    let is_clear = |words: &str| sh(&format!("grep -qaF {words} {} && echo yes || true", file.display()));
    ensure!(is_clear("-e LUKS")?.trim() == "yes", "grep finds nothing at all");
    let found = is_clear(&format!("-e 'in the clear' -f {passphrase_file}"))?;
    ensure!(found.is_empty(), "{} has what is encrypted", file.display());
    Ok(())
}

fn has(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

fn is_told(bytes: &[u8]) -> bool {
    has(bytes, PASSPHRASE.as_bytes()) || has(bytes, NEXT_PASSPHRASE.as_bytes())
}

/// Neither in logs, state files and the catalog, nor in what the programs tell.
fn nobody_has_it(node: &StorageNode, env: &Env) -> Result<()> {
    let mut folders = vec![env.directory.clone(), node.run_dir.clone()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            let is_given = ["passphrase", "next"].map(|name| env.directory.join(name)).contains(&path);
            // Of the data directory the volumes were looked at.
            if kind.is_dir() && entry.file_name() != "volumes" && entry.file_name() != "snapshots" {
                folders.push(path);
            } else if kind.is_file() && !is_given {
                ensure!(!is_told(&fs::read(&path)?), "{} has a passphrase", path.display());
                files += 1;
            }
        }
    }
    ensure!(files >= 4, "only {files} files were looked at: the logs are not among them");
    for told in [&["list", "--output", "json"][..], &["attachments", "--output", "json"], &["doctor"]] {
        let told = node.volctl(told)?;
        ensure!(!is_told(told.stdout.as_bytes()) && !is_told(told.stderr.as_bytes()));
    }
    Ok(())
}

/// Looks at the arguments and variables of every process again and again.
struct Watch {
    is_over: Arc<AtomicBool>,
    looks: JoinHandle<Result<()>>,
}

impl Watch {
    fn start() -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&is_over);
        let look = move || -> Result<()> {
            let mut seen = 0_u32;
            while !ends.load(Ordering::Relaxed) {
                for process in fs::read_dir("/proc")?.flatten() {
                    for table in ["cmdline", "environ"] {
                        // One that has ended meanwhile has neither.
                        let bytes = fs::read(process.path().join(table)).unwrap_or_default();
                        ensure!(!is_told(&bytes), "{}: {table} has a passphrase", process.path().display());
                        seen += u32::from(table == "cmdline" && has(&bytes, b"cryptsetup\0"));
                    }
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            ensure!(seen > 0, "cryptsetup was never seen: nothing was proved");
            Ok(())
        };
        Self { is_over, looks: std::thread::spawn(look) }
    }

    fn end(self) -> Result<()> {
        self.is_over.store(true, Ordering::Relaxed);
        self.looks.join().map_err(|_| anyhow::anyhow!("the watch panicked"))?
    }
}

fn kill(mut daemon: Child) -> Result<()> {
    daemon.kill()?;
    daemon.wait()?;
    Ok(())
}

/// The machine writes cores into a folder, until this is dropped.
struct Cores {
    folder: PathBuf,
    pattern: String,
    limit: Rlimit,
}

const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

impl Cores {
    fn allow(env: &Env) -> Result<Self> {
        let folder = env.directory.join("cores");
        fs::create_dir(&folder)?;
        let pattern = fs::read_to_string(CORE_PATTERN)?;
        fs::write(CORE_PATTERN, format!("{}/%e.%p", folder.display()))?;
        let limit = getrlimit(Resource::Core);
        setrlimit(Resource::Core, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
        Ok(Self { folder, pattern, limit })
    }

    /// Of the node daemon, which passphrases have passed through; while others have theirs.
    fn has_none_of(&self, mut daemon: Child) -> Result<()> {
        let names = || -> Result<Vec<String>> {
            let entries = fs::read_dir(&self.folder)?.flatten();
            Ok(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        };
        sh("sleep 100 & sleep 1; kill -ABRT $!; wait $! || true")?;
        ensure!(names()?.iter().any(|name| name.starts_with("sleep.")), "no process has a core here");
        kill_process(Pid::from_child(&daemon), Signal::ABORT)?;
        let ended = daemon.wait()?;
        ensure!(ended.signal() == Some(Signal::ABORT.as_raw()), "the node daemon ended with {ended}");
        ensure!(names()?.len() == 1, "cores: {:?}", names()?);
        Ok(())
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        let _ = fs::write(CORE_PATTERN, &self.pattern);
        let _ = setrlimit(Resource::Core, self.limit);
    }
}

/// A `cryptsetup` before the true one: it derives keys quickly, and stops before a step until it is told to go on.
pub(crate) struct Stops {
    folder: PathBuf,
}

impl Stops {
    pub(crate) fn new(env: &Env) -> Result<Self> {
        let folder = env.directory.join("bin");
        fs::create_dir(&folder)?;
        let stops = Self { folder };
        stops.add(
            "cryptsetup",
            "$1",
            "case $1 in luksFormat|luksChangeKey) set -- \"$@\" --pbkdf pbkdf2 --pbkdf-force-iterations 1000;; esac",
        )?;
        Ok(stops)
    }

    /// A program that does the same: what its step is called, and what its script does before the true one.
    pub(crate) fn add(&self, program: &str, action: &str, change: &str) -> Result<()> {
        let true_one = sh(&format!("command -v {program}"))?;
        let at = self.folder.display();
        let script = format!(
            "#!/bin/sh
             action={action}
             echo $action >> {at}/steps
             if [ -e {at}/stop-before-$action ]; then
                 mv {at}/stop-before-$action {at}/stopped
                 while [ -e {at}/stopped ]; do sleep 0.05; done
             fi
             {change}
             exec {} \"$@\"
            ",
            true_one.trim()
        );
        let path = self.folder.join(program);
        fs::write(&path, script)?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?)
    }

    /// Where the programs are.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A node daemon that finds it first.
    fn start_daemon(&self, node: &StorageNode, env: &Env) -> Result<Child> {
        let log = File::options().create(true).append(true).open(env.directory.join("daemon.log"))?;
        let mut daemon = node
            .program("volclient")
            .arg("serve")
            .env("PATH", path_with(&self.folder))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        let mut ready = String::new();
        BufReader::new(daemon.stdout.take().context("stdout")?).read_line(&mut ready)?;
        ensure!(ready.starts_with("volclient ready"), "{ready:?}");
        Ok(daemon)
    }

    pub(crate) fn before(&self, action: &str) -> Result<()> {
        Ok(fs::write(self.folder.join(format!("stop-before-{action}")), "")?)
    }

    pub(crate) fn wait_until_stopped(&self) -> Result<()> {
        let stopped = self.folder.join("stopped");
        wait_for("cryptsetup to stop", Duration::from_secs(60), || Ok(stopped.exists().then_some(())))
    }

    pub(crate) fn go_on(&self) -> Result<()> {
        Ok(fs::remove_file(self.folder.join("stopped"))?)
    }

    pub(crate) fn steps(&self) -> Result<String> {
        let steps = fs::read_to_string(self.folder.join("steps")).unwrap_or_default();
        let _ = fs::remove_file(self.folder.join("steps"));
        Ok(steps.split_whitespace().collect::<Vec<_>>().join(" "))
    }
}

/// The program that it has started goes on without it, and the next one waits for that.
fn a_daemon_killed_between_steps(env: &Env) -> Result<()> {
    sh("modprobe dm_mod")?;
    let stops = Stops::new(env)?;
    let mut node = StorageNode::start(env)?;
    node.kill_client()?;
    let mut daemon = stops.start_daemon(&node, env)?;
    let file = passphrase_file(env, "passphrase", PASSPHRASE)?;
    for (action, expected) in [
        // Nobody knows what came of the former header, and nothing is lost with it.
        ("luksFormat", "luksFormat luksFormat open"),
        // Opened by the former call's program.
        ("open", "luksFormat open"),
    ] {
        let name = format!("before-{action}");
        node.volctl(&["create", &name, "--encrypted", "--size", "20M"])?.succeeded()?;
        stops.before(action)?;
        let attach = ["attach", &name, "--passphrase-file", &file];
        let (mut cut_off, _) = node.volctl_lines(&attach)?;
        stops.wait_until_stopped()?;
        kill(daemon)?;
        ensure!(!cut_off.wait()?.success(), "an attach came to its end without a daemon");
        daemon = stops.start_daemon(&node, env)?;
        let state = node.attachment(&name)?;
        let reason = state["state_reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("its clear disk is not open"), "{state}");
        let (mut next, lines) = node.volctl_lines(&attach)?;
        std::thread::sleep(Duration::from_millis(500));
        ensure!(next.try_wait()?.is_none(), "{action}: the former call's program was not waited for");
        stops.go_on()?;
        let disk = PathBuf::from(lines.recv_timeout(Duration::from_secs(60))?.trim_end());
        ensure!(next.wait()?.success());
        ensure!(stops.steps()? == expected, "other steps");
        ensure!(shown(&node, &name)?["content"] == "written");
        direct::write(&disk, AT, &words())??;
        node.detach(&name)?;
        check_words(&unlock(&node, &name, &file)?)?;
        stops.steps()?;
        node.detach(&name)?;
    }
    kill(daemon)?;
    node.start_client()?;
    is_named_where_no_attachment_has_it(&mut node, &file)
}

/// A clear disk of which the folder is lost.
fn is_named_where_no_attachment_has_it(node: &mut StorageNode, file: &str) -> Result<()> {
    let disk = unlock(node, "before-open", file)?;
    let id = node.attachment("before-open")?["attachment_id"].as_str().context("an id")?.to_owned();
    node.kill_client()?;
    let folder = node.run_dir.join("attachments").join(&id);
    let kept = node.run_dir.join("kept");
    fs::rename(&folder, &kept)?;
    node.start_client()?;
    let told = node.volctl(&["doctor"])?.stdout;
    ensure!(told.contains(&id) && told.contains("volctl detach"), "{told}");
    node.volctl(&["detach", &id])?.succeeded()?;
    ensure!(!disk.exists(), "it is still open");
    node.kill_client()?;
    fs::rename(&kept, &folder)?;
    node.start_client()?;
    node.detach("before-open")
}
