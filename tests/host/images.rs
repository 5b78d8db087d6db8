//! Images in and out of volumes, by the real volctl and volserver, and other people's programs where images are theirs.
//!
//! Owns small images whose bytes are known, and what is done to copies of them: killed and resumed, refused, compared.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use testlab::seed;
use testlab::volserver::Volserver;

use super::programs;

pub(crate) const MIB: usize = 1 << 20;

/// A server, a directory for images, and another one for what interrupted copies leave.
pub(crate) struct Bench {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) server: Volserver,
    /// The server speaks nothing but TLS, with the certificates in the directory, and asks for them.
    is_tls: bool,
}

impl Bench {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    pub(crate) fn at(directory: tempfile::TempDir) -> Self {
        let server =
            Volserver::start(&mut server_command(directory.path(), false), directory.path()).unwrap();
        Self { directory, server, is_tls: false }
    }

    pub(crate) fn over_tls() -> Self {
        let directory = tempfile::tempdir().unwrap();
        super::api_examples::certificates(directory.path());
        let server = Volserver::start(&mut server_command(directory.path(), true), directory.path()).unwrap();
        Self { directory, server, is_tls: true }
    }

    /// Kills the server, and starts it again where it was.
    pub(crate) fn restart_server(&mut self) {
        let directory = self.directory.path();
        self.server.start_again(&mut server_command(directory, self.is_tls), directory).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// volctl, at the server, with a state directory of its own.
    pub(crate) fn volctl(&self, words: &[&str]) -> Command {
        let mut command = Command::new(programs::directory().join("volctl"));
        command.env("VOLNODE_SERVER", self.server.management_uri());
        if self.is_tls {
            command.env("VOLNODE_SERVER", format!("https://localhost:{}", self.server.management.port()));
            for (variable, file) in [
                ("VOLNODE_TLS_CA", "ca-cert.pem"),
                ("VOLNODE_TLS_CERT", "admin-cert.pem"),
                ("VOLNODE_TLS_KEY", "admin-key.pem"),
            ] {
                command.env(variable, self.path(file));
            }
        }
        command.env("XDG_STATE_HOME", self.path("state")).current_dir(self.directory.path()).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.volctl(words).stdin(Stdio::null()).output().unwrap()
    }

    /// The JSON of a command that has to succeed.
    pub(crate) fn done(&self, words: &[&str]) -> Value {
        let output = self.run(&[words, &["--output", "json"]].concat());
        assert!(output.status.success(), "{words:?}: {}", told(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// A command that has to fail with this code, and say this and what to do next.
    pub(crate) fn refused(&self, words: &[&str], code: i32, what: &str, next: &str) {
        let output = self.run(words);
        let told = told(&output);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {told}");
        let (first, second) = told.split_once("\n  next: ").unwrap_or((&told, ""));
        assert!(first.contains(what) && second.contains(next), "{words:?}: {told}");
    }

    /// The bytes of a volume, through an export.
    pub(crate) fn bytes_of(&self, volume: &str) -> Vec<u8> {
        let path = self.path(&format!("{volume}.bytes"));
        self.done(&["export", volume, path.to_str().unwrap(), "--no-verify", "--force", "--format", "raw"]);
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(path).unwrap();
        bytes
    }
}

fn server_command(directory: &Path, is_tls: bool) -> Command {
    let mut command = Command::new(programs::directory().join("volserver"));
    command.args(["--threads", "2", "--memory-max", "1G", "--connections-max", "256", "--log", "error"]);
    if is_tls {
        command.args(["--tls", "required"]);
        for (option, file) in [
            ("--tls-cert", "server-cert.pem"),
            ("--tls-key", "server-key.pem"),
            ("--tls-client-ca", "ca-cert.pem"),
        ] {
            command.arg(option).arg(directory.join(file));
        }
    }
    command
}

pub(crate) fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An image with data, which comes first, zeroes that are written, and holes: `seed` decides which bytes.
fn image(path: &Path, size_bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; size_bytes];
    let file = File::create(path).unwrap();
    file.set_len(size_bytes as u64).unwrap();
    let mut at = 0;
    while at < size_bytes {
        let length = random.usize(1..3 * MIB).min(size_bytes - at);
        match random.u8(..3) {
            0 if at > 0 => {}
            1 if at > 0 => file.write_all_at(&bytes[at..at + length], at as u64).unwrap(),
            _ => {
                random.fill(&mut bytes[at..at + length]);
                file.write_all_at(&bytes[at..at + length], at as u64).unwrap();
            }
        }
        at += length;
    }
    bytes
}

/// An image that the user may read as whom root has it read, whatever this process's umask is.
pub(crate) fn readable(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

pub(crate) fn run(program: &str, words: &[&str]) {
    let output =
        Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {words:?}: {}", told(&output));
}

pub(crate) fn is_there(program: &str) -> bool {
    let is_there = Command::new(program).arg("--version").output().is_ok();
    if !is_there {
        println!("SKIP no {program}");
    }
    is_there
}

#[test]
fn a_raw_image_comes_back_as_it_was_and_stays_sparse() {
    let bench = Bench::new();
    // The last block is not whole.
    let bytes = image(&bench.path("in.img"), 24 * MIB + 1000, 1);
    let imported = bench.done(&["import", "in.img", "vol", "--create"]);
    assert_eq!(imported["size_bytes"], bytes.len());
    assert_eq!((&imported["verified"], &imported["resumed_bytes"]), (&Value::from(true), &Value::from(0)));
    let volume = bench.done(&["show", "vol"]);
    assert_eq!(volume["capacity_bytes"], bytes.len().next_multiple_of(4096));
    assert!(volume["attachments"].as_array().unwrap().is_empty(), "nothing is left attached");
    let blocks = fs::metadata(bench.path("in.img")).unwrap().blocks();
    let allocated = volume["allocated_bytes"].as_u64().unwrap();
    // A file system may have allocated what was written as zeroes, which no volume needs.
    assert!(allocated <= blocks * 512 + MIB as u64, "{allocated} of {}", blocks * 512);
    let exported = bench.done(&["export", "vol", "out.img"]);
    let mut out = fs::read(bench.path("out.img")).unwrap();
    assert!(out[bytes.len()..].iter().all(|byte| *byte == 0));
    out.truncate(bytes.len());
    assert!(out == bytes, "the export differs");
    let out_blocks = fs::metadata(bench.path("out.img")).unwrap().blocks();
    assert!(out_blocks <= blocks + (MIB / 512) as u64, "{out_blocks} blocks, {blocks} before");
    assert_eq!(exported["size_bytes"], volume["capacity_bytes"]);
    assert!(!bench.path("out.img.part").exists() && !bench.path("out.img.part.journal").exists());
    assert_eq!(fs::read_dir(bench.path("state/volnode/images")).unwrap().count(), 0, "a journal is left");
    bench.refused(&["export", "vol", "out.img"], 4, "is there already", "--force");
    // Nor is anything lost that is named as what is not whole yet.
    fs::write(bench.path("mine.img.part"), "mine").unwrap();
    bench.refused(&["export", "vol", "mine.img"], 4, "mine.img.part is there already", "--force");
    assert_eq!(fs::read(bench.path("mine.img.part")).unwrap(), b"mine");
    assert!(!bench.path("mine.img.part.journal").exists());
    std::os::unix::fs::symlink(bench.path("in.img"), bench.path("link.img.part")).unwrap();
    bench.refused(&["export", "vol", "link.img", "--force"], 1, "link.img.part", "");
    assert!(fs::read(bench.path("in.img")).unwrap() == bytes);
    assert!(bench.done(&["show", "vol"])["attachments"].as_array().unwrap().is_empty());
}

#[test]
fn a_volume_that_was_written_to_is_overwritten_only_if_that_is_said_and_then_wholly() {
    let bench = Bench::new();
    image(&bench.path("a.img"), 8 * MIB, 2);
    let second = image(&bench.path("b.img"), 3 * MIB, 3);
    bench.done(&["import", "a.img", "vol", "--create"]);
    bench.refused(&["import", "b.img", "vol"], 5, "was written to", "--overwrite");
    bench.done(&["import", "b.img", "vol", "--overwrite"]);
    let there = bench.bytes_of("vol");
    assert!(there[..second.len()] == second, "the image");
    assert!(there[second.len()..].iter().all(|byte| *byte == 0), "what was there before shows behind it");
    bench.done(&["create", "small", "--size", "1M"]);
    bench.refused(&["import", "a.img", "small"], 2, "has 8388608 bytes", "volctl resize small");
    let smaller = ["import", "a.img", "smaller", "--create", "--size", "1M"];
    bench.refused(&smaller, 2, "has 8388608 bytes", "8388608 at least");
    bench.refused(&["show", "smaller"], 3, "smaller", "");
    bench.done(&["set", "vol", "--protect"]);
    bench.refused(&["import", "a.img", "vol", "--overwrite"], 5, "is protected", "--no-protect");
    bench.done(&["set", "vol", "--no-protect", "--read-only"]);
    bench.refused(&["import", "a.img", "vol", "--overwrite"], 5, "is read-only", "--no-read-only");
    bench.refused(&["import", "missing.img", "vol"], 1, "missing.img", "");
    bench.refused(&["import", "a.img", "nowhere"], 3, "nowhere", "");
}

/// Bytes of the journals in a directory: a first line of less than 512, and 40 for each MiB that is copied and differs from the one
/// before.
pub(crate) fn journal_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let journals = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".journal"));
    journals.filter_map(|entry| Some(entry.metadata().ok()?.len())).max().unwrap_or_default()
}

/// Kills a copy so long after it has copied so many MiB more, as its journal tells; false: it had ended before.
pub(crate) fn kill_after(mut command: Command, journals: &Path, more: u64, further: Duration) -> bool {
    let begun = journal_bytes(journals);
    let until = if begun == 0 { 512 } else { begun } + more * 40;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while journal_bytes(journals) < until {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(Instant::now() < deadline, "it neither ends nor gets on");
        std::thread::sleep(Duration::from_micros(200));
    }
    // Any place will do: it is in the middle of something.
    std::thread::sleep(further);
    child.kill().unwrap();
    !child.wait().unwrap().success()
}

/// An image without a zero.
pub(crate) fn dense(path: &Path, size_bytes: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; size_bytes];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn a_copy_that_is_killed_at_ten_places_goes_on_where_it_was() {
    let bench = Bench::new();
    let seed = seed::choose().unwrap();
    let mut random = fastrand::Rng::with_seed(seed);
    let bytes = dense(&bench.path("in.img"), 64 * MIB, seed);
    let state = bench.path("state/volnode/images");
    let import = |number: usize| {
        bench.volctl(&["import", "in.img", &format!("vol-{number}"), "--create", "--checkpoint-bytes", "1M"])
    };
    let export = |number: usize| {
        bench.volctl(&["export", "whole", &format!("out-{number}.img"), "--checkpoint-bytes", "1M"])
    };
    let directory = bench.directory.path();
    let mut further = || Duration::from_micros(random.u64(..20_000));
    let volumes = kill_ten_times(&import, &state, &mut further);
    let last = format!("vol-{volumes}");
    let attached = bench.done(&["show", &last])["attachments"].clone();
    assert_eq!(attached.as_array().unwrap().len(), 1, "nobody else may write meanwhile");
    image(&bench.path("other.img"), MIB, 5);
    bench.refused(
        &["import", "other.img", &last],
        5,
        "is attached to volctl@",
        &format!("import --drop {last}"),
    );
    bench.refused(&["export", &last, "x.img"], 5, "is attached to volctl@", &format!("import --drop {last}"));
    let imported = bench.done(&["import", "in.img", &last]);
    assert!(imported["resumed_bytes"].as_u64().unwrap() > 0, "{imported}");
    for number in 0..=volumes {
        assert!(bench.bytes_of(&format!("vol-{number}")) == bytes, "volume {number}, seed {seed}");
    }
    bench.done(&["import", "in.img", "whole", "--create"]);
    let files = kill_ten_times(&export, directory, &mut further);
    let last = format!("out-{files}.img");
    assert!(!bench.path(&last).exists(), "it has its name before it is whole");
    let exported = bench.done(&["export", "whole", &last]);
    assert!(exported["resumed_bytes"].as_u64().unwrap() > 0, "{exported}");
    assert_eq!(exported["digest"], imported["digest"]);
    for number in 0..=files {
        let there = fs::read(bench.path(&format!("out-{number}.img"))).unwrap();
        assert!(there == bytes, "file {number}, seed {seed}");
    }
}

/// Repeats a copy that is killed each time, until ten were; where one ends first, goes on with the next, and tells how many have.
fn kill_ten_times(
    copy: &dyn Fn(usize) -> Command,
    journals: &Path,
    further: &mut dyn FnMut() -> Duration,
) -> usize {
    let (mut kills, mut ended) = (0, 0);
    while kills < 10 {
        match kill_after(copy(ended), journals, 1, further()) {
            true => kills += 1,
            false => ended += 1,
        }
        assert!(ended < 20, "killed {kills} times only: they are too fast");
    }
    ended
}

#[test]
fn an_export_begins_anew_where_its_file_is_not_as_it_was_left() {
    let bench = Bench::new();
    let bytes = dense(&bench.path("in.img"), 32 * MIB, 6);
    bench.done(&["import", "in.img", "vol", "--create"]);
    let export = ["export", "vol", "out.img", "--checkpoint-bytes", "1M", "--no-verify"];
    let part = bench.path("out.img.part");
    let ways: [(&str, &dyn Fn()); 2] = [
        ("it was deleted, and the next one may get its number", &|| fs::remove_file(&part).unwrap()),
        ("it was emptied", &|| drop(File::create(&part).unwrap())),
    ];
    for (what, lose) in ways {
        bench.done(&["limit", "vol", "--read-bandwidth", "24M"]);
        assert!(kill_after(bench.volctl(&export), bench.directory.path(), 2, Duration::ZERO), "{what}");
        lose();
        bench.done(&["limit", "vol", "--read-bandwidth", "none"]);
        let exported = bench.done(&export);
        assert_eq!(exported["resumed_bytes"], 0, "{what}: {exported}");
        assert!(fs::read(bench.path("out.img")).unwrap() == bytes, "{what}");
        fs::remove_file(bench.path("out.img")).unwrap();
    }
    // One that never begins leaves nothing.
    bench.refused(&["export", "nowhere", "none.img"], 3, "nowhere", "");
    let mut unreachable = bench.volctl(&["export", "vol", "none.img"]);
    let unreachable = unreachable.env("VOLNODE_SERVER", "http://127.0.0.1:1").output().unwrap();
    assert_eq!(unreachable.status.code(), Some(6), "{}", told(&unreachable));
    assert!(!bench.path("none.img.part").exists() && !bench.path("none.img.part.journal").exists());
}

#[test]
fn an_import_begins_anew_where_its_image_or_its_attachment_is_another() {
    let bench = Bench::new();
    dense(&bench.path("in.img"), 32 * MIB, 7);
    bench.done(&["create", "vol", "--size", "32M", "--write-bandwidth", "24M"]);
    let state = bench.path("state/volnode/images");
    let import = ["import", "in.img", "vol", "--checkpoint-bytes", "1M"];
    assert!(kill_after(bench.volctl(&import), &state, 2, Duration::ZERO));
    // Of the same size and name.
    let changed = dense(&bench.path("in.img"), 32 * MIB, 8);
    let imported = bench.done(&import);
    assert_eq!(imported["resumed_bytes"], 0, "{imported}");
    assert!(bench.bytes_of("vol") == changed);
    bench.done(&["delete", "vol"]);
    bench.done(&["create", "vol", "--size", "32M", "--write-bandwidth", "24M"]);
    assert!(kill_after(bench.volctl(&import), &state, 2, Duration::ZERO));
    let dropped = bench.done(&["import", "--drop", "vol"]);
    assert!(dropped["dropped"][0].as_str().unwrap().starts_with("volctl@"), "{dropped}");
    assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    assert!(bench.done(&["show", "vol"])["attachments"].as_array().unwrap().is_empty());
    bench.refused(&import, 5, "was written to", "--overwrite");
    assert_eq!(bench.done(&["import", "--drop", "vol"])["dropped"], Value::Array(Vec::new()));
}

#[test]
fn two_runs_are_not_at_one_copy() {
    let bench = Bench::new();
    image(&bench.path("in.img"), 64 * MIB, 9);
    bench.done(&["create", "vol", "--size", "64M", "--write-bandwidth", "4M"]);
    let mut first = bench.volctl(&["import", "in.img", "vol"]).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while bench.done(&["show", "vol"])["attachments"][0]["connections"] != 1 {
        assert!(Instant::now() < deadline && first.try_wait().unwrap().is_none(), "it does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    bench.refused(
        &["import", "in.img", "vol"],
        5,
        "another volctl is at this copy",
        "wait until it has ended",
    );
    bench.done(&["limit", "vol", "--write-bandwidth", "none"]);
    assert!(first.wait().unwrap().success(), "the second one has disturbed it");
}

/// Somebody else's NBD server on a Unix socket. Killed when dropped.
struct Stranger(std::process::Child, String);

impl Stranger {
    fn start(socket: &Path, program: &str, words: &[&str]) -> Self {
        let mut child = Command::new(program).args(words).stdin(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !socket.exists() {
            assert!(child.try_wait().unwrap().is_none(), "{program} {words:?} has ended");
            assert!(Instant::now() < deadline, "{program} is not ready");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child, format!("nbd+unix:///?socket={}", socket.display()))
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn images_come_from_and_go_to_the_nbd_servers_of_others() {
    if !is_there("nbdkit") || !is_there("qemu-nbd") {
        return;
    }
    let bench = Bench::new();
    let bytes = image(&bench.path("in.img"), 16 * MIB, 11);
    let socket = |name: &str| bench.path(name);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (kit, qemu, simple) = (socket("kit.sock"), socket("qemu.sock"), socket("simple.sock"));
    let from =
        Stranger::start(&kit, "nbdkit", &["-f", "-U", &text(&kit), "file", &text(&bench.path("in.img"))]);
    bench.done(&["import", &from.1, "vol", "--create"]);
    assert!(bench.bytes_of("vol") == bytes);
    // One without structured replies, and without WRITE_ZEROES.
    let plain = ["-f", "-U", &text(&simple), "--no-sr", "--filter=nozero", "memory", "16M"];
    let to = Stranger::start(&simple, "nbdkit", &plain);
    bench.refused(&["export", "vol", &to.1], 4, "other bytes than zeroes", "--force");
    bench.done(&["export", "vol", &to.1, "--force"]);
    bench.done(&["import", &to.1, "again", "--create"]);
    assert!(bench.bytes_of("again") == bytes);
    File::create(bench.path("target.img")).unwrap().set_len(20 * MIB as u64).unwrap();
    let words = ["-f", "raw", "-t", "-k", &text(&qemu), &text(&bench.path("target.img"))];
    let to = Stranger::start(&qemu, "qemu-nbd", &words);
    bench.done(&["export", "vol", &to.1]);
    let there = fs::read(bench.path("target.img")).unwrap();
    assert!(there[..bytes.len()] == bytes && there[bytes.len()..].iter().all(|byte| *byte == 0));
    bench.refused(&["export", "vol", &to.1], 4, "other bytes than zeroes", "--force");
    let small = socket("small.sock");
    let to = Stranger::start(&small, "nbdkit", &["-f", "-U", &text(&small), "memory", "1M"]);
    bench.refused(&["export", "vol", &to.1], 2, "has 1048576 bytes", "larger");
    let readonly = socket("ro.sock");
    let to = Stranger::start(&readonly, "nbdkit", &["-r", "-f", "-U", &text(&readonly), "memory", "16M"]);
    bench.refused(&["export", "vol", &to.1, "--force"], 5, "is read-only", "");
}

#[test]
fn a_destination_that_is_full_or_fails_ends_the_copy_which_goes_on_later() {
    if !is_there("nbdkit") {
        return;
    }
    let bench = Bench::new();
    let bytes = image(&bench.path("in.img"), 16 * MIB, 13);
    bench.done(&["import", "in.img", "vol", "--create"]);
    let socket = bench.path("full.sock");
    let trigger = bench.path("full");
    fs::write(&trigger, "").unwrap();
    let options = [
        "-f".to_owned(),
        "-U".to_owned(),
        socket.display().to_string(),
        "--filter=error".to_owned(),
        "memory".to_owned(),
        "16M".to_owned(),
        "error-pwrite=ENOSPC".to_owned(),
        "error-pwrite-rate=100%".to_owned(),
        format!("error-pwrite-file={}", trigger.display()),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let to = Stranger::start(&socket, "nbdkit", &options);
    let export = ["export", "vol", &to.1, "--checkpoint-bytes", "1M"];
    bench.refused(&export, 8, "No space left on device", "goes on where it stopped");
    fs::remove_file(&trigger).unwrap();
    bench.done(&export);
    bench.done(&["import", &to.1, "again", "--create"]);
    assert!(bench.bytes_of("again") == bytes);
}

#[test]
fn what_was_changed_behind_the_copys_back_is_found() {
    if !is_there("nbdkit") {
        return;
    }
    let bench = Bench::new();
    image(&bench.path("in.img"), 4 * MIB, 15);
    bench.done(&["import", "in.img", "vol", "--create"]);
    // A disk that answers every write and keeps none.
    let socket = bench.path("null.sock");
    let to = Stranger::start(&socket, "nbdkit", &["-f", "-U", socket.to_str().unwrap(), "null", "4M"]);
    bench.refused(&["export", "vol", &to.1], 1, "read back differs", "not to be trusted");
}

#[test]
fn images_of_other_formats_come_back_as_they_were() {
    if !is_there("qemu-img") || !is_there("qemu-nbd") {
        return;
    }
    let bench = Bench::new();
    image(&bench.path("in.img"), 16 * MIB, 17);
    let text = |name: &str| bench.path(name).to_str().unwrap().to_owned();
    for format in ["qcow2", "vmdk", "vhdx", "vdi"] {
        let (made, out) = (format!("in.{format}"), format!("out.{format}"));
        run("qemu-img", &["convert", "-f", "raw", "-O", format, &text("in.img"), &text(&made)]);
        readable(&bench.path(&made));
        let imported = bench.done(&["import", &made, format, "--create"]);
        assert_eq!(
            (&imported["format"], &imported["size_bytes"]),
            (&Value::from(format), &Value::from(16 * MIB))
        );
        let exported = bench.done(&["export", format, &out]);
        assert_eq!((&exported["format"], &exported["digest"]), (&Value::from(format), &imported["digest"]));
        run("qemu-img", &["compare", "-f", format, "-F", "raw", &text(&out), &text("in.img")]);
        let [made, out] = [made, out].map(|name| fs::metadata(bench.path(&name)).unwrap().blocks());
        assert!(out <= 2 * made, "{format}: {out} blocks, QEMU's own has {made}");
    }
}

#[test]
fn an_export_to_qcow2_that_is_killed_goes_on() {
    if !is_there("qemu-img") || !is_there("qemu-nbd") {
        return;
    }
    let bench = Bench::new();
    dense(&bench.path("in.img"), 32 * MIB, 19);
    bench.done(&["import", "in.img", "vol", "--create"]);
    bench.done(&["limit", "vol", "--read-bandwidth", "16M"]);
    let export = ["export", "vol", "out.qcow2", "--checkpoint-bytes", "1M"];
    for _ in 0..3 {
        assert!(kill_after(bench.volctl(&export), bench.directory.path(), 2, Duration::ZERO), "it has ended");
    }
    bench.done(&["limit", "vol", "--read-bandwidth", "none"]);
    let exported = bench.done(&export);
    assert!(exported["resumed_bytes"].as_u64().unwrap() >= 3 * MIB as u64, "{exported}");
    let text = |name: &str| bench.path(name).to_str().unwrap().to_owned();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &text("out.qcow2"), &text("in.img")]);
    run("qemu-img", &["check", "-q", "-f", "qcow2", &text("out.qcow2")]);
}

#[test]
fn an_image_is_taken_only_for_what_it_surely_is_and_alone() {
    if !is_there("qemu-img") || !is_there("qemu-nbd") {
        return;
    }
    let bench = Bench::new();
    let text = |name: &str| bench.path(name).to_str().unwrap().to_owned();
    let bytes = image(&bench.path("base.img"), 4 * MIB, 21);
    // What a guest may write to its raw disk: a qcow2 that would read a file of the host.
    fs::write(bench.path("secret"), vec![b's'; MIB]).unwrap();
    let make = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    run("qemu-img", &[&make[..], &[&text("secret"), &text("disguised.img")]].concat());
    bench.refused(&["import", "disguised.img", "v", "--create"], 2, "begins like qcow2", "--format raw");
    bench.done(&["import", "disguised.img", "raw", "--create", "--format", "raw"]);
    let disguised = fs::read(bench.path("disguised.img")).unwrap();
    assert!(bench.bytes_of("raw")[..disguised.len()] == disguised, "byte by byte");
    fs::copy(bench.path("disguised.img"), bench.path("backed.qcow2")).unwrap();
    let backed = ["import", "backed.qcow2", "backed", "--create"];
    bench.refused(&backed, 5, "names a backing file", "--trusted");
    let forced = ["import", "disguised.img", "v", "--create", "--format", "qcow2"];
    bench.refused(&forced, 5, "names a backing file", "--trusted");
    bench.done(&[&backed[..], &["--trusted"]].concat());
    assert!(bench.bytes_of("backed").iter().all(|byte| *byte == b's'));
    let external = format!("data_file={}", text("external.raw"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &external, &text("external.qcow2"), "4M"]);
    bench.refused(&["import", "external.qcow2", "v", "--create"], 5, "in another file", "--trusted");
    let split = ["-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", &text("base.img"), &text("split.vmdk")];
    run("qemu-img", &[&["convert", "-f", "raw"], &split[..]].concat());
    bench.refused(&["import", "split.vmdk", "v", "--create"], 5, "in other files", "--trusted");
    bench.done(&["import", "split.vmdk", "split", "--create", "--trusted"]);
    assert!(bench.bytes_of("split") == bytes);
    // A name says something that is not so, or the other way round; or nobody can read it here.
    fs::copy(bench.path("base.img"), bench.path("base.qcow2")).unwrap();
    bench.refused(&["import", "base.qcow2", "v", "--create"], 2, "does not begin like one", "--format raw");
    let said = ["import", "base.img", "v", "--create", "--format", "qcow2"];
    bench.refused(&said, 2, "is no qcow2", "leave --format out");
    fs::write(bench.path("packed.img"), b"\xfd7zXZ\0 and so on").unwrap();
    bench.refused(&["import", "packed.img", "v", "--create"], 2, "xz has compressed", "decompress it");
    fs::write(bench.path("torn.qcow2"), &fs::read(bench.path("external.qcow2")).unwrap()[..200]).unwrap();
    assert_ne!(bench.run(&["import", "torn.qcow2", "v", "--create"]).status.code(), Some(0));
    // Nothing of all that has made a volume.
    bench.refused(&["show", "v"], 3, "v", "");
    let mut without = bench.volctl(&["import", "backed.qcow2", "v", "--create", "--trusted"]);
    let output = without.env("PATH", "/nowhere").output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", told(&output));
    assert!(told(&output).contains("qemu-utils"), "{}", told(&output));
}

#[test]
fn what_reads_an_image_may_do_nothing_else() {
    let bench = Bench::new();
    fs::write(bench.path("image"), "the image").unwrap();
    fs::write(bench.path("secret"), "the secret").unwrap();
    fs::create_dir(bench.path("here")).unwrap();
    // Opened by a process that may; the program could not by the file's name.
    let limited = |options: &[&str], script: &str| {
        let mut command = bench.volctl(&["image-program", "--parent"]);
        command.arg(std::process::id().to_string()).args(options).args(["--", "/bin/bash", "-c", script]);
        command.current_dir(bench.path("here")).stdin(File::open(bench.path("image")).unwrap());
        command.output().unwrap()
    };
    let own = limited(&[], "cat /proc/self/fd/0");
    assert_eq!(String::from_utf8_lossy(&own.stdout), "the image", "{}", told(&own));
    let port = bench.server.data.port();
    let connect = format!(": < /dev/tcp/127.0.0.1/{port}");
    // The same without limits, so that it is the limits that it fails for.
    let free = Command::new("/bin/bash").args(["-c", &connect]).output().unwrap();
    assert!(free.status.success(), "{}", told(&free));
    let secret = format!("cat {}", bench.path("secret").display());
    let beside = format!("echo > {}", bench.path("beside").display());
    let connect_trusted = limited(&["--opens-files"], &connect);
    // As in a container whose kernel, or whose filter of system calls, does not have it.
    let another_file = client::image::sandbox::kernel_limits_files().then(|| limited(&[], &secret));
    if another_file.is_none() {
        println!("SKIP whether it may open another file: no Landlock here");
    }
    let another_file = another_file.map(|output| ("another file", output));
    for (what, output) in another_file.into_iter().chain([
        ("a new file", limited(&[], &beside)),
        ("a file where its socket is", limited(&[], "echo 1 > file")),
        ("the network", limited(&[], &connect)),
        ("the network, though the image is trusted", connect_trusted),
        ("a signal", limited(&[], &format!("kill -0 {}", std::process::id()))),
    ]) {
        let told = told(&output);
        assert!(!output.status.success() && output.stdout.is_empty(), "{what}: {told}");
        assert!(
            ["denied", "not permitted", "too large"].iter().any(|word| told.contains(word)),
            "{what}: {told}"
        );
    }
    if rustix::process::geteuid().is_root() {
        let nobody = limited(&["--uid", "65534"], "echo $UID $(ulimit -c) $(ulimit -f)");
        assert_eq!(String::from_utf8_lossy(&nobody.stdout), "65534 0 0\n", "{}", told(&nobody));
    }
    let trusted = limited(&["--opens-files"], &secret);
    assert_eq!(String::from_utf8_lossy(&trusted.stdout), "the secret", "{}", told(&trusted));
    let mut orphan = bench.volctl(&["image-program", "--parent", "1", "--", "/bin/true"]);
    assert!(!orphan.status().unwrap().success(), "its volctl has ended");
}

/// A GPT for sectors of so many bytes, with one partition.
fn partitioned(path: &Path, sector_bytes: usize) {
    let mut bytes = vec![0; 4 * MIB];
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[446 + 4] = 0xee;
    bytes[sector_bytes..sector_bytes + 8].copy_from_slice(b"EFI PART");
    fs::write(path, bytes).unwrap();
}

#[test]
fn partitions_for_other_sectors_are_told_before_anything_is_copied() {
    let bench = Bench::new();
    partitioned(&bench.path("512.img"), 512);
    partitioned(&bench.path("4096.img"), 4096);
    bench.done(&["create", "v4096", "--size", "4M"]);
    bench.refused(&["import", "512.img", "v4096"], 5, "GPT for sectors of 512", "--block-size 512");
    assert_eq!(bench.done(&["show", "v4096"])["content"], "never_written");
    bench.done(&["import", "512.img", "v4096", "--ignore-sector-size"]);
    bench.done(&["import", "512.img", "v512", "--create"]);
    assert_eq!(bench.done(&["show", "v512"])["block_size_bytes"], 512, "made for it");
    bench.done(&["import", "4096.img", "large", "--create"]);
    assert_eq!(bench.done(&["show", "large"])["block_size_bytes"], 4096);
    let other = ["import", "4096.img", "wrong", "--create", "--block-size", "512"];
    bench.refused(&other, 5, "GPT for sectors of 4096", "--block-size 4096");
    bench.refused(&["show", "wrong"], 3, "wrong", "");
}

#[test]
fn an_image_comes_through_a_pipe_and_its_end_is_looked_for() {
    let bench = Bench::new();
    let bytes = image(&bench.path("in.img"), 5 * MIB + 300, 23);
    let piped = |words: &[&str]| {
        let mut command = bench.volctl(words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut stdin, bytes) = (child.stdin.take().unwrap(), bytes.clone());
        // It may end without having read all.
        let writer = std::thread::spawn(move || drop(std::io::Write::write_all(&mut stdin, &bytes)));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    };
    let output = piped(&["import", "-", "vol", "--create", "--size", "64M"]);
    assert!(output.status.success(), "{}", told(&output));
    let there = bench.bytes_of("vol");
    assert!(there[..bytes.len()] == bytes && there[bytes.len()..].iter().all(|byte| *byte == 0));
    let output = piped(&["import", "-", "small", "--create", "--size", "5M"]);
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    assert!(told(&output).contains("more than the 5242880 bytes"), "{}", told(&output));
    bench.refused(&["import", "-", "unsized", "--create"], 2, "does not tell its size", "--size");
}

/// A file system that shares blocks, below a directory of its own. Unmounted when dropped.
pub(crate) struct Mounted(tempfile::TempDir);

impl Mounted {
    pub(crate) fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() || !is_there("mkfs.xfs") {
            println!("SKIP no root, or no mkfs.xfs, for snapshots");
            return None;
        }
        if !Path::new("/dev/loop-control").exists() {
            println!("SKIP no loop devices, for snapshots");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let (device, mount) = (directory.path().join("device"), directory.path().join("mount"));
        File::create(&device).unwrap().set_len(640 * MIB as u64).unwrap();
        fs::create_dir(&mount).unwrap();
        run("mkfs.xfs", &["-q", device.to_str().unwrap()]);
        // In a container root may not be allowed to, and a kernel may lack the file system.
        let mut command = Command::new("mount");
        let output = command.args(["-t", "xfs", "-o", "loop"]).arg(&device).arg(&mount).output().unwrap();
        if !output.status.success() {
            println!("SKIP an XFS cannot be mounted, for snapshots: {}", told(&output));
            return None;
        }
        Some(Self(directory))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("mount")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.path().to_str().unwrap()]);
    }
}

#[test]
fn a_snapshot_is_exported_while_its_volume_is_in_use() {
    let Some(mounted) = Mounted::new() else { return };
    let bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    let bytes = dense(&bench.path("in.img"), 24 * MIB, 25);
    bench.done(&["import", "in.img", "vol", "--create"]);
    bench.done(&["snapshot", "create", "vol", "monday"]);
    let mut api = testlab::management_api::ManagementApi::connect(&bench.server.management_uri()).unwrap();
    api.attach_volume("vol", "a-machine").unwrap();
    bench.refused(&["export", "vol", "x.img"], 5, "is attached to a-machine", "snapshot create vol");
    bench.refused(&["export", "vol@tuesday", "x.img"], 3, "tuesday", "");
    bench.done(&["export", "vol@monday", "out.img"]);
    assert!(fs::read(bench.path("out.img")).unwrap() == bytes);
    let volumes = || bench.done(&["list"]).as_array().unwrap().len();
    assert_eq!(volumes(), 1, "the clone is gone");
    // One that is killed leaves its clone, and is given up or goes on.
    let (mut number, journals) = (0, bench.directory.path());
    for goes_on in [false, true] {
        let export = loop {
            let name = format!("again-{number}.img");
            let words = ["export", "vol@monday", &name, "--checkpoint-bytes", "1M"].map(str::to_owned);
            let words_now: Vec<&str> = words.iter().map(String::as_str).collect();
            number += 1;
            if kill_after(bench.volctl(&words_now), journals, 1, Duration::ZERO) {
                break words;
            }
            // A clone has no limits that would make it slow enough each time.
            assert!(number < 40, "every export has ended before it was killed");
        };
        assert_eq!(volumes(), 2);
        if goes_on {
            let words: Vec<&str> = export.iter().map(String::as_str).collect();
            bench.done(&words);
            assert!(fs::read(bench.path(&export[2])).unwrap() == bytes);
        } else {
            let list = bench.done(&["list"]);
            let names = list.as_array().unwrap().iter().map(|volume| volume["name"].as_str().unwrap());
            let clone = names.max().unwrap();
            bench.done(&["import", "--drop", clone]);
            fs::remove_file(bench.path(&format!("{}.part.journal", export[2]))).unwrap();
        }
        assert_eq!(volumes(), 1);
    }
}
