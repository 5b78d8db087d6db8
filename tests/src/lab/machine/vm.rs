//! One virtual machine from boot to its command's exit code: QEMU under software emulation, Debian's kernel, this
//! machine's root file system.
//!
//! Called by the subcommands. The guest says three things on its console: `up`, `exit N` and `failed: why`. Only
//! `exit N` is success: a panic (`panic=-1` ends QEMU), an oops (made a panic), a hang (a deadline here) or a
//! dead QEMU all come out as an error that carries the console log. What the command prints arrives over two
//! virtio ports, apart from the console. QEMU never outlives the lab: it is killed when this value is
//! dropped, and by the kernel (parent-death signal, `prctl(2)`) if the lab is killed outright.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use testlab::card_pair::{FAR_MAC, NEAR_MAC};

use super::guest_command::GuestCommand;
use super::initramfs;
use super::kernels::Kernel;
use super::vm_directory::VmDirectory;
use crate::lab::progress::{self, Step};
use crate::lab::workspace::Workspace;
use crate::lab::{interrupt, tool};

/// Runs as process 1 of the guest's real root.
const SECOND_STAGE: &str = include_str!("guest/second_stage.sh");

/// Directories that are the guest's own; see `guest/first_stage.sh`.
const GUEST_OWN_DIRECTORIES: [&str; 4] = ["/tmp", "/run", "/mnt", "/dev"];

/// From QEMU's start to the guest's `up`: 10–20 s are usual on two cores, others may be building on them.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

/// The same for a machine that counts instructions: one thread does all its work.
const COUNTED_BOOT_DEADLINE: Duration = Duration::from_secs(600);

/// Silence after which a dead machine has nothing more to say.
const DRAIN_SILENCE: Duration = Duration::from_millis(500);

/// QEMU says what it knows and ends.
const HELP_DEADLINE: Duration = Duration::from_secs(20);

/// The scratch disk, `/dev/vda`. It is sparse: only what the guest writes takes space.
const SCRATCH_DISK_BYTES: u64 = 4 << 30;

/// What the guest writes to its console before its own messages.
const CONSOLE_PREFIX: &str = "lab-guest: ";

/// Console lines shown with a failure; a boot has some fifty, a panic some hundred.
const CONSOLE_LINES_SHOWN: usize = 300;

/// Where the guest reaches this machine's loopback addresses: QEMU's user-mode network, whose own address for a guest is
/// 10.0.2.15.
pub(crate) const HOST_FROM_GUEST: &str = "10.0.2.2";

/// The tap device that is the card of [`Processors::CountedWithCard`], in the network namespace of whoever starts the machine.
pub(crate) const TAP: &str = "lab-tap";

/// Which of the two output streams of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// How the command and the terminal are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Terminal {
    /// Output arrives in pieces, stdin is empty.
    Streams,
    /// The terminal is the guest's: QEMU has it in raw mode.
    Interactive,
}

/// What executes the guest, and what its clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Processors {
    /// Two processors on two threads; real time.
    Two,
    /// One processor whose clock counts its instructions: a microsecond is a thousand of them, and while it idles the
    /// clock jumps to the next timer.
    Counted(ByteCopies),
    /// The same, with nobody copying so, and with a network card, the tap device [`TAP`]: while the machine waits for others its clock goes
    /// on in real time.
    CountedWithCard,
}

/// Who copies by `rep movsb` on a processor that counts: that instruction counts once for each byte, so machines that differ
/// in nothing else tell how many bytes are copied, and by whom.
///
/// Linux 7.3: `copy_from_user` and `copy_to_user` take `rep movsq` without `erms` (`arch/x86/lib/copy_user_64.S`), `memcpy`
/// takes moves of registers without `fsrm` (`memcpy_64.S`). A page is cleared by `rep stosb` with `erms`, by `rep stosq` without
/// if the kernel takes that for good (`clear_page_64.S`), which it is told to: it would not on each emulator's processor. glibc 2.36: `memcpy` of [`PROGRAMS_BYTE_COPY_MIN`] and more takes `rep movsb` with `erms`, moves of
/// vectors without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByteCopies {
    /// Nobody.
    None,
    /// Copies between the kernel and user memory, programs' own large ones; pages are cleared in the same way.
    Users,
    /// Those, and copies within the kernel.
    All,
}

impl ByteCopies {
    /// The processor, on an emulator that knows the processor features in `known`. What else clears or compares memory byte by
    /// byte is hidden: nothing tells how much that is.
    fn processor(self, known: &str) -> String {
        let known: Vec<&str> = known.split_whitespace().collect();
        let erms = if self == Self::None { '-' } else { '+' };
        let hidden = ["fsrm", "fsrs", "fsrc", "fzrm"].into_iter().filter(|feature| known.contains(feature));
        let hidden: String = hidden.map(|feature| format!(",-{feature}")).collect();
        format!("max,{erms}erms{hidden}")
    }

    /// What the kernel is told. It takes `fsrm` for given: QEMU before 8 has no such processor, and programs see no difference.
    fn kernel_parameters(self) -> &'static str {
        if self == Self::All { " setcpuid=rep_good,fsrm" } else { " setcpuid=rep_good" }
    }

    /// The features that tell these machines apart, as the kernel lists them (`flags` in `/proc/cpuinfo`), and whether this one
    /// has them.
    pub(crate) fn flags(self) -> [(&'static str, bool); 3] {
        [("rep_good", true), ("erms", self != Self::None), ("fsrm", self == Self::All)]
    }
}

/// Bytes from which a program's own `memcpy` takes `rep movsb` where the processor has `erms`: what glibc takes with `fsrm`.
pub(crate) const PROGRAMS_BYTE_COPY_MIN: u32 = 2112;

/// Watches a command from outside the machine.
pub(crate) trait Follower {
    /// Takes a piece of output as it comes. An error ends the machine.
    fn output(&mut self, stream: Stream, bytes: &[u8]) -> Result<()>;

    /// Called several times a second: the place for deadlines. An error ends the machine.
    fn tick(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The guest never said `up`, and nothing of ours has run in it: an accident of the emulator's. Seen: the emulation spins before
/// the kernel's first line; the kernel runs into a breakpoint that it has taken out again (see [`kernel_command_line`]).
#[derive(Debug)]
struct NotUp {
    /// One line.
    why: String,
}

impl std::fmt::Display for NotUp {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "the machine did not come up: {}", self.why)
    }
}

impl std::error::Error for NotUp {}

/// How often a machine is started that does not come up.
const BOOTS_MAX: usize = 3;

/// Runs `command` in a machine to its end, its output passed to `follower`. A machine that does not come up is started again, at
/// most twice, and one line says so.
///
/// # Errors
/// As [`Vm::start`] and [`Vm::run_to_end`].
pub(crate) fn run(
    workspace: &Workspace,
    kernel: &Kernel,
    command: &GuestCommand,
    processors: Processors,
    deadline: Duration,
    follower: &mut dyn Follower,
) -> Result<Ended> {
    run_on(workspace, kernel, command, Terminal::Streams, processors, deadline, follower)
}

/// As [`run`], with a choice of terminal.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_on(
    workspace: &Workspace,
    kernel: &Kernel,
    command: &GuestCommand,
    terminal: Terminal,
    processors: Processors,
    deadline: Duration,
    follower: &mut dyn Follower,
) -> Result<Ended> {
    let mut boots = 0;
    loop {
        boots += 1;
        let vm = Vm::start(workspace, kernel, command, terminal, processors)?;
        match vm.run_to_end(deadline, follower) {
            Err(error) if boots < BOOTS_MAX && error.is::<NotUp>() => {
                let why = error.downcast_ref::<NotUp>().map(|not_up| not_up.why.as_str()).unwrap_or_default();
                interrupt::check()?;
                progress::say(&format!(
                    "lab: the emulated machine did not come up ({why}): booting it again ({} of {BOOTS_MAX})",
                    boots + 1
                ));
            }
            ended => return ended.map(|ended| Ended { boots, ..ended }),
        }
    }
}

/// A running machine.
pub(crate) struct Vm {
    qemu: Child,
    output: Receiver<(Stream, Vec<u8>)>,
    started: Instant,
    boot_deadline: Duration,
    power_off_max: Duration,
    boot_time: Option<Duration>,
    /// Spoken of until the machine is up.
    booting: Option<Step>,
    directory: VmDirectory,
}

/// How a machine ended whose command ended.
pub(crate) struct Ended {
    /// The command's.
    pub(crate) exit_code: u8,
    /// How many machines were started until one came up.
    pub(crate) boots: usize,
    /// From QEMU's start to the guest's `up`.
    pub(crate) boot_time: Duration,
    /// From the command's end to the machine's.
    pub(crate) power_off_time: Duration,
    /// What the kernel said on the console, without the guest's own messages.
    pub(crate) kernel_messages: String,
}

impl Vm {
    /// Starts a machine that will run `command`.
    ///
    /// # Errors
    /// The machine's files cannot be written, or QEMU cannot be started.
    fn start(
        workspace: &Workspace,
        kernel: &Kernel,
        command: &GuestCommand,
        terminal: Terminal,
        processors: Processors,
    ) -> Result<Self> {
        let directory = VmDirectory::create(&workspace.cache)?;
        write_share(workspace, command, terminal, &directory.path().join("share"))?;
        let initramfs = initramfs::build(kernel, directory.path()).context("building the initramfs")?;
        let scratch =
            File::create(directory.path().join("scratch.raw")).context("creating the scratch disk")?;
        scratch.set_len(SCRATCH_DISK_BYTES).context("sizing the scratch disk")?;
        let (sender, output) = mpsc::channel();
        for (stream, name) in [(Stream::Stdout, "stdout"), (Stream::Stderr, "stderr")] {
            let listener = UnixListener::bind(directory.path().join(format!("{name}.sock")))
                .context("listening for the guest's output")?;
            let sender = sender.clone();
            thread::spawn(move || forward(&listener, stream, &sender));
        }
        let booting = Some(Step::begin(&format!("booting Linux {} in an emulated machine", kernel.release)));
        let started = Instant::now();
        let mut qemu = qemu_command(kernel, &initramfs, directory.path(), terminal, processors, command)?;
        let qemu = qemu.spawn().context("cannot run QEMU")?;
        let boot_deadline = match processors {
            Processors::Two => BOOT_DEADLINE,
            Processors::Counted(_) | Processors::CountedWithCard => COUNTED_BOOT_DEADLINE,
        };
        let power_off_max = command.power_off_max();
        Ok(Self { qemu, output, started, boot_deadline, power_off_max, boot_time: None, booting, directory })
    }

    /// Passes the command's output to `follower` until the machine has powered off.
    ///
    /// # Errors
    /// The machine did not come up, died, or did not end in time; the follower gave up; the lab was interrupted. In
    /// all but the last two the error ends with the console log.
    fn run_to_end(mut self, deadline: Duration, follower: &mut dyn Follower) -> Result<Ended> {
        let result = self.follow(deadline, follower);
        if result.is_err() {
            tool::kill_and_reap(&mut self.qemu);
            // What the command said last is worth as much as the console.
            self.drain(follower)?;
        }
        result
    }

    /// Follows the machine to its end, or to the reason why it has to be ended.
    fn follow(&mut self, deadline: Duration, follower: &mut dyn Follower) -> Result<Ended> {
        let mut exit_seen_at = None;
        loop {
            interrupt::check()?;
            follower.tick()?;
            match self.output.recv_timeout(tool::POLL_INTERVAL) {
                Ok((stream, bytes)) => follower.output(stream, &bytes)?,
                // Both ports are closed: QEMU is going away, and polling it must not spin.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(tool::POLL_INTERVAL),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let console = Console::read(self.directory.path());
            if self.boot_time.is_none() && console.is_up() {
                self.boot_time = Some(self.started.elapsed());
                if let Some(booting) = self.booting.take() {
                    booting.end();
                }
            }
            if let Some(status) = self.qemu.try_wait().context("waiting for QEMU")? {
                self.drain(follower)?;
                let console = Console::read(self.directory.path());
                let Some(exit_code) = console.exit_code() else {
                    return Err(console.death(&format!("the machine died ({status})")));
                };
                return Ok(Ended {
                    exit_code,
                    boots: 1,
                    boot_time: self.boot_time.unwrap_or_else(|| self.started.elapsed()),
                    power_off_time: exit_seen_at.map_or(Duration::ZERO, |since: Instant| since.elapsed()),
                    kernel_messages: console.kernel_messages(),
                });
            }
            if console.exit_code().is_some() {
                let since = *exit_seen_at.get_or_insert_with(Instant::now);
                if since.elapsed() > self.power_off_max {
                    return Err(console.failure("the command ended, but the machine did not power off"));
                }
            } else if self.boot_time.is_none() && self.started.elapsed() > self.boot_deadline {
                return Err(console.death(&format!("not up after {} s", self.boot_deadline.as_secs())));
            } else if self.started.elapsed() > deadline {
                return Err(console.failure(&format!("still running after {} s", deadline.as_secs())));
            }
        }
    }

    /// Passes on what is still on its way. QEMU has ended, so what it sent can be read at once; a stream it never
    /// opened stays silent.
    fn drain(&mut self, follower: &mut dyn Follower) -> Result<()> {
        while let Ok((stream, bytes)) = self.output.recv_timeout(DRAIN_SILENCE) {
            follower.output(stream, &bytes)?;
        }
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        tool::kill_and_reap(&mut self.qemu);
    }
}

/// What the guest has said on its console so far.
struct Console {
    text: String,
}

impl Console {
    fn read(directory: &Path) -> Self {
        let bytes = fs::read(directory.join("console.log")).unwrap_or_default();
        Self { text: String::from_utf8_lossy(&bytes).into_owned() }
    }

    /// The guest's own messages, without the kernel's time stamps.
    fn messages(&self) -> impl Iterator<Item = &str> {
        self.text
            .lines()
            .filter_map(|line| line.split_once(CONSOLE_PREFIX))
            .map(|(_, message)| message.trim())
    }

    fn is_up(&self) -> bool {
        self.messages().any(|message| message == "up")
    }

    fn exit_code(&self) -> Option<u8> {
        self.messages().find_map(|message| message.strip_prefix("exit ")?.parse().ok())
    }

    /// What the kernel printed by itself.
    fn kernel_messages(&self) -> String {
        let lines =
            self.text.lines().filter(|line| !line.contains(CONSOLE_PREFIX) && !line.trim().is_empty());
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Why the guest gave up by itself, if it did.
    fn own_failure(&self) -> Option<&str> {
        self.messages().find_map(|message| message.strip_prefix("failed: "))
    }

    /// An error for the end of a machine without an exit code; a [`NotUp`] if neither it nor its kernel got as far as us.
    fn death(&self, what: &str) -> anyhow::Error {
        let shown = self.failure(what);
        if self.is_up() || self.own_failure().is_some() {
            return shown;
        }
        // What the kernel died of is one line of its many.
        let oops = |line: &&str| ["Oops", "BUG:", "Kernel panic"].iter().any(|word| line.contains(word));
        let died_of = self.text.lines().find(oops).and_then(|line| line.split_once("] "));
        let why = died_of.map_or_else(|| what.to_owned(), |(_, line)| format!("{what}; {}", line.trim()));
        anyhow::Error::new(NotUp { why }).context(shown)
    }

    /// An error for `what` that shows the end of the log.
    fn failure(&self, what: &str) -> anyhow::Error {
        let lines: Vec<&str> = self.text.lines().collect();
        let shown = &lines[lines.len().saturating_sub(CONSOLE_LINES_SHOWN)..];
        anyhow!("{what}\n---- console log ----\n{}\n---- end of console log ----", shown.join("\n"))
    }
}

/// Writes what the guest reads at `/run/lab`.
fn write_share(
    workspace: &Workspace,
    command: &GuestCommand,
    terminal: Terminal,
    share: &Path,
) -> Result<()> {
    fs::create_dir(share).context("creating the share")?;
    let mut environment = command.environment_script();
    if terminal == Terminal::Interactive {
        fs::write(share.join("interactive"), "").context("writing the share")?;
        environment.push_str(&terminal_size_script());
    }
    let visible = hidden_by_the_guest(&[command.directory(), &workspace.root, &workspace.target]);
    let files = [
        ("second_stage.sh", SECOND_STAGE.to_owned()),
        ("command.sh", command.script()),
        ("environment", environment),
        ("visible", visible.iter().map(|path| format!("{}\n", path.display())).collect()),
    ];
    for (name, text) in command.files() {
        fs::write(share.join(name), text).context("writing the share")?;
    }
    for (name, text) in files {
        fs::write(share.join(name), text).context("writing the share")?;
    }
    Ok(())
}

/// Those of `paths` that exist and would be hidden behind a directory of the guest's own, none inside another.
fn hidden_by_the_guest(paths: &[&Path]) -> Vec<PathBuf> {
    let mut hidden: Vec<PathBuf> = Vec::new();
    let mut paths: Vec<&Path> = paths.to_vec();
    // A directory sorts before what is in it.
    paths.sort();
    for path in paths.into_iter().filter(|path| path.exists()) {
        let own = GUEST_OWN_DIRECTORIES.iter().any(|own| path.starts_with(own));
        if own && !hidden.iter().any(|shown| path.starts_with(shown)) {
            hidden.push(path.to_owned());
        }
    }
    hidden
}

/// A line that gives the guest's console the size of our terminal, if we have one.
fn terminal_size_script() -> String {
    let mut stty = Command::new("stty");
    let size = stty.arg("size").stdin(Stdio::inherit()).stderr(Stdio::null()).output();
    let size = size.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    match size.split_whitespace().collect::<Vec<_>>()[..] {
        [rows, columns] => format!("stty rows {rows} columns {columns} < /dev/hvc0\n"),
        _ => String::new(),
    }
}

/// Forwards one output stream of the guest until QEMU closes it.
fn forward(listener: &UnixListener, stream: Stream, sender: &Sender<(Stream, Vec<u8>)>) {
    let Ok((mut connection, _)) = listener.accept() else { return };
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = connection.read(&mut buffer) {
        if sender.send((stream, buffer[..length].to_vec())).is_err() {
            return;
        }
    }
}

/// What the kernel is told.
///
/// The kernel changes its own code while it boots, under a breakpoint that it sets and takes out; an emulated second processor now
/// and then runs into one that is no longer there ("Oops: int3", in `sched_clock_cpu` or `sched_clock_idle_wakeup_event`). So the
/// second processor starts when that is over (`maxcpus=1`; the second stage brings it up), and what would change that code
/// later, the watch over the time stamp counter, is left out (`tsc=reliable`): the emulator's counters agree. Programs lie at
/// the same addresses each time (`norandmaps`): code that the emulator has translated serves the next process, too.
/// Source: `Documentation/admin-guide/kernel-parameters.txt`.
fn kernel_command_line(processors: Processors) -> String {
    let more = match processors {
        Processors::Two => " maxcpus=1 tsc=reliable norandmaps",
        Processors::Counted(copies) => copies.kernel_parameters(),
        Processors::CountedWithCard => ByteCopies::None.kernel_parameters(),
    };
    format!("console=ttyS0 panic=-1 oops=panic quiet mitigations=off{more}")
}

/// The machine: emulated processors, nothing that is not needed.
fn qemu_command(
    kernel: &Kernel,
    initramfs: &Path,
    directory: &Path,
    terminal: Terminal,
    processors: Processors,
    guest: &GuestCommand,
) -> Result<Command> {
    let file = |name: &str| directory.join(name).display().to_string();
    let mut command = tool::command("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    command.arg(qemu().get_program());
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot"]);
    command.args(["-M", "q35", "-m", "4G"]);
    match processors {
        Processors::Two => command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]),
        Processors::Counted(copies) => command
            .args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"])
            .args(["-cpu", &copies.processor(&known_features()?)]),
        Processors::CountedWithCard => command
            .args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=on", "-smp", "1"])
            .args(["-cpu", &ByteCopies::None.processor(&known_features()?)]),
    };
    // A card's interrupts are counted, too. e1000 fetches data from wherever it lies; virtio's does only where the host's side knows
    // checksums, which a tap device does and the user-mode network does not.
    let card = match processors {
        Processors::Two => {
            let forwards = guest.ports().iter().map(|port| format!(",hostfwd=tcp:127.0.0.1:{port}-:{port}"));
            format!("user,model=e1000{}", forwards.collect::<String>())
        }
        Processors::Counted(_) => "none".to_owned(),
        Processors::CountedWithCard => {
            format!("tap,ifname={TAP},script=no,downscript=no,model=virtio-net-pci")
        }
    };
    if processors == Processors::Two {
        // Two more, with a cable between them: a far end for tests that have to be through a card.
        for (name, mac, other) in [("near", NEAR_MAC, "far"), ("far", FAR_MAC, "near")] {
            let [local, remote] = [name, other].map(|end| file(&format!("{end}.sock")));
            let ends = format!("local.type=unix,local.path={local},remote.type=unix,remote.path={remote}");
            command.args(["-netdev", &format!("dgram,id={name},{ends}")]);
            command.args(["-device", &format!("e1000,netdev={name},mac={mac}")]);
        }
    }
    command.args(["-nic", &card, "-serial"]).arg(format!("file:{}", file("console.log")));
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
    command.args(["-append", &kernel_command_line(processors)]);
    let read_only = "security_model=none,readonly=on,multidevs=remap";
    command.arg("-virtfs").arg(format!("local,path=/,mount_tag=host,{read_only}"));
    let modules = kernel.modules.display();
    command.arg("-virtfs").arg(format!("local,path={modules},mount_tag=modules,{read_only}"));
    let share = file("share");
    command
        .arg("-virtfs")
        .arg(format!("local,path={share},mount_tag=lab,security_model=none,multidevs=remap"));
    if let Some(shared) = guest.shared() {
        let path = shared.display();
        let share = format!("local,path={path},mount_tag=exchange,security_model=none,multidevs=remap");
        command.arg("-virtfs").arg(share).arg("-pidfile").arg(shared.join("qemu.pid"));
    }
    // The disk is scratch: nobody needs its writes on the host's disk, so flushes may cost nothing.
    let scratch = file("scratch.raw");
    let drive = format!("if=none,id=scratch,file={scratch},format=raw,cache=unsafe,discard=unmap");
    command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=scratch,serial=lab-scratch"]);
    command.args(["-device", "virtio-serial-pci"]);
    for name in ["stdout", "stderr"] {
        let socket = file(&format!("{name}.sock"));
        command.args(["-chardev", &format!("socket,id={name},path={socket}")]);
        command.args(["-device", &format!("virtserialport,chardev={name},name=lab.{name}")]);
    }
    if terminal == Terminal::Interactive {
        command.args(["-chardev", "stdio,id=terminal,signal=off"]);
        command.args(["-device", "virtconsole,chardev=terminal"]);
    } else {
        command.stdin(Stdio::null());
    }
    Ok(command)
}

/// The processor features that the emulator knows, as words among others.
fn known_features() -> Result<String> {
    let help = tool::output(qemu().args(["-cpu", "help"]), HELP_DEADLINE)?;
    Ok(String::from_utf8_lossy(&help).into_owned())
}

fn qemu() -> Command {
    tool::command("qemu-system-x86_64")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(text: &str) -> Console {
        Console { text: text.to_owned() }
    }

    #[test]
    fn only_an_exit_line_is_an_exit_code() {
        let up = "[    7.4] lab-guest: up\r\n";
        assert!(console(up).is_up() && console(up).exit_code().is_none());
        assert_eq!(console(&format!("{up}[    9.1] lab-guest: exit 7\r\n")).exit_code(), Some(7));
        assert_eq!(console(&format!("{up}[    9.1] Kernel panic - not syncing\r\n")).exit_code(), None);
    }

    #[test]
    fn a_failure_shows_the_console_and_a_success_only_the_kernels_words() {
        let text = "[    1.0] EXT4-fs error\n[    7.4] lab-guest: up\n";
        assert!(console(text).failure("it died").to_string().contains("EXT4-fs error"));
        assert_eq!(console(text).kernel_messages(), "[    1.0] EXT4-fs error");
    }

    #[test]
    fn only_a_machine_that_never_came_up_is_booted_again() {
        let oops = "[    1.8] Oops: int3: 0000 [#1] SMP NOPTI\n[    1.9] Kernel panic - not syncing\n";
        let death = console(oops).death("the machine died (exit status: 0)");
        let why = &death.downcast_ref::<NotUp>().unwrap().why;
        assert_eq!(why, "the machine died (exit status: 0); Oops: int3: 0000 [#1] SMP NOPTI");
        assert!(format!("{death:#}").contains("console log"), "{death:#}");
        let up = format!("[    1.5] lab-guest: up\n{oops}");
        assert!(!console(&up).death("it died").is::<NotUp>(), "something of ours may have run");
        let missing = "[    1.5] lab-guest: failed: loading 03.ko\n";
        assert!(!console(missing).death("it died").is::<NotUp>(), "it would fail again");
    }

    #[test]
    fn machines_that_count_differ_in_who_copies_byte_by_byte_and_in_nothing_else() {
        let new = "acpi erms fsrm fsrs fsrc fzrm fxsr";
        assert_eq!(ByteCopies::None.processor(new), "max,-erms,-fsrm,-fsrs,-fsrc,-fzrm");
        let users = ByteCopies::Users.processor(new);
        assert_eq!(users, "max,+erms,-fsrm,-fsrs,-fsrc,-fzrm");
        assert_eq!(ByteCopies::All.processor(new), users);
        let told = |copies| kernel_command_line(Processors::Counted(copies));
        assert_eq!(told(ByteCopies::None), told(ByteCopies::Users));
        assert_eq!(told(ByteCopies::All), format!("{},fsrm", told(ByteCopies::Users)));
        assert_eq!(ByteCopies::Users.flags(), [("rep_good", true), ("erms", true), ("fsrm", false)]);
        // QEMU 7.2 would not start with a word that it does not know.
        assert_eq!(ByteCopies::None.processor("erms fsrm"), "max,-erms,-fsrm");
    }

    #[test]
    fn a_path_below_tmp_is_shown_once_and_only_if_it_exists() {
        let outer = std::env::temp_dir().join(format!("lab-visible-{}", std::process::id()));
        let inner = outer.join("target");
        fs::create_dir_all(&inner).unwrap();
        let absent = outer.with_extension("absent");
        let expected = if outer.starts_with("/tmp") { vec![outer.clone()] } else { Vec::new() };
        assert_eq!(hidden_by_the_guest(&[&inner, &absent, Path::new("/usr"), &outer]), expected);
        fs::remove_dir_all(&outer).unwrap();
    }
}
