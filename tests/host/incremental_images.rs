//! Differences between snapshots as images: made by the real volctl, and put together again by it and by qemu-img alone.
//!
//! Owns volumes whose histories are random and whose bytes are known at each snapshot.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use proto::nbd::transmission::{Command, CommandFlags};
use serde_json::Value;
use testlab::nbd_client::Client;
use testlab::seed;

use super::images::{Bench, MIB, Mounted, dense, is_there, kill_after, readable, run};

const SNAPSHOTS: usize = 11;
const SIZE_BYTES: usize = 6 * MIB;

/// A volume that is written to, and what it has to have.
struct History {
    random: fastrand::Rng,
    bytes: Vec<u8>,
}

impl History {
    /// Some writes of all sorts at the volume's blocks, one of them at its end.
    fn go_on(&mut self, bench: &Bench) {
        let mut client = Client::open(bench.server.data, "vol").unwrap();
        let blocks = self.bytes.len() / 4096;
        for number in 0..12 {
            let length = self.random.usize(1..=64).min(blocks);
            let start = if number == 0 { blocks - length } else { self.random.usize(..=blocks - length) };
            let (at, length) = (start * 4096, length * 4096);
            let there = &mut self.bytes[at..at + length];
            match self.random.u8(..6) {
                0 => {
                    let zero = Command::WriteZeroes;
                    client.call(zero, CommandFlags::NONE, at as u64, length as u32, &[]).unwrap();
                    there.fill(0);
                }
                1 => {
                    client.call(Command::Trim, CommandFlags::NONE, at as u64, length as u32, &[]).unwrap();
                    // What is trimmed may read as anything, and is read for that.
                    there.copy_from_slice(&client.read(at as u64, length as u32).unwrap());
                }
                // What is there already, or zeroes that are written.
                2 => client.write(at as u64, there).unwrap(),
                3 => {
                    there.fill(0);
                    client.write(at as u64, there).unwrap();
                }
                _ => {
                    self.random.fill(there);
                    client.write(at as u64, there).unwrap();
                }
            }
        }
        client.flush().unwrap();
    }
}

fn image_of(number: usize) -> String {
    format!("s{number}.qcow2")
}

/// Exports what a snapshot has that the one before has not.
fn export_since(bench: &Bench, number: usize) -> Value {
    let (source, since) = (format!("vol@s{number}"), format!("s{}", number - 1));
    let (image, base) = (image_of(number), image_of(number - 1));
    bench.done(&["export", &source, &image, "--since", &since, "--base-image", &base])
}

/// The bytes of an image, as QEMU has them by itself.
fn by_qemu(bench: &Bench, image: &str) -> Vec<u8> {
    let text = |name: &str| bench.path(name).to_str().unwrap().to_owned();
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &text(image), &text("converted")]);
    fs::read(bench.path("converted")).unwrap()
}

/// Something else than what is there, in one block.
fn spoil(bench: &Bench, volume: &str, at: u64) {
    let mut client = Client::open(bench.server.data, volume).unwrap();
    let mut block = client.read(at, 4096).unwrap();
    block[7] ^= 1;
    client.write(at, &block).unwrap();
    client.flush().unwrap();
}

#[test]
fn a_chain_of_ten_differences_is_what_the_volume_was_to_volctl_and_to_qemu_alone() {
    if !is_there("qemu-img") || !is_there("qemu-nbd") {
        return;
    }
    let Some(mounted) = Mounted::new() else { return };
    let bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    let seed = seed::choose().unwrap();
    let mut history = History { random: fastrand::Rng::with_seed(seed), bytes: vec![0; SIZE_BYTES] };
    bench.done(&["create", "vol", "--size", &SIZE_BYTES.to_string()]);
    let (mut contents, mut digests) = (Vec::<Vec<u8>>::new(), Vec::new());
    for number in 0..SNAPSHOTS {
        if number == 4 || number == 7 {
            // Neither a multiple of what is copied, nor of a cluster.
            let size = history.bytes.len() + MIB + 4096 * number;
            bench.done(&["resize", "vol", "--size", &size.to_string()]);
            history.bytes.resize(size, 0);
        }
        history.go_on(&bench);
        bench.done(&["snapshot", "create", "vol", &format!("s{number}")]);
        contents.push(history.bytes.clone());
        let exported = match number {
            0 => bench.done(&["export", "vol@s0", "s0.qcow2"]),
            number => export_since(&bench, number),
        };
        if number > 0 {
            let own = exported["difference_bytes"].as_u64().unwrap();
            assert!(own > 0 && own <= 12 * (64 + 64) * 4096, "seed {seed}: {exported}");
            // With zeroes behind the base's end it is another digest.
            let is_as_large = contents[number - 1].len() == history.bytes.len();
            let is_the_bases = exported["base_digest"] == digests[number - 1];
            assert_eq!(is_the_bases, is_as_large, "seed {seed}, {number}: {exported}");
        }
        digests.push(exported["digest"].clone());
    }
    assert_eq!(bench.done(&["list"]).as_array().unwrap().len(), 1, "no clone is left");
    for number in [1, 4, 10] {
        assert!(by_qemu(&bench, &image_of(number)) == contents[number], "seed {seed}, {number} by qemu-img");
        let image = bench.path(&image_of(number));
        run("qemu-img", &["check", "-q", "-f", "qcow2", image.to_str().unwrap()]);
    }
    readable(&bench.path("s0.qcow2"));
    bench.done(&["import", "s0.qcow2", "again", "--create"]);
    for number in 1..SNAPSHOTS {
        let image = image_of(number);
        readable(&bench.path(&image));
        if contents[number].len() > contents[number - 1].len() {
            let size = contents[number].len().to_string();
            bench.refused(&["import", &image, "again", "--apply"], 2, "only", "volctl resize again");
            bench.done(&["resize", "again", "--size", &size]);
        }
        let applied = bench.done(&["import", &image, "again", "--apply"]);
        assert_eq!(applied["digest"], digests[number], "seed {seed}, {number}: {applied}");
    }
    assert!(bench.bytes_of("again") == contents[10], "seed {seed}");
    // The last of them as a clone, of an image whose base has another name by now.
    let text = |name: &str| bench.path(name).to_str().unwrap().to_owned();
    run("qemu-img", &["rebase", "-u", "-F", "raw", "-b", "elsewhere.img", "-f", "qcow2", &text("s10.qcow2")]);
    let clone = ["import", "s10.qcow2", "cloned", "--create", "--base", "vol@s9"];
    assert_eq!(bench.done(&clone)["digest"], digests[10], "seed {seed}");
    assert_eq!(bench.done(&clone)["digest"], digests[10], "once more");
    assert!(bench.bytes_of("cloned") == contents[10], "seed {seed}");
    fs::write(bench.path("elsewhere.img"), &contents[9]).unwrap();
    assert!(by_qemu(&bench, "s10.qcow2") == contents[10], "seed {seed}: a raw base by qemu-img");
}

#[test]
fn a_difference_is_not_applied_to_another_base() {
    if !is_there("qemu-img") || !is_there("qemu-nbd") {
        return;
    }
    let Some(mounted) = Mounted::new() else { return };
    let bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    let text = |name: &str| bench.path(name).to_str().unwrap().to_owned();
    dense(&bench.path("in.img"), 4 * MIB, 31);
    bench.done(&["import", "in.img", "vol", "--create"]);
    bench.done(&["snapshot", "create", "vol", "s0"]);
    spoil(&bench, "vol", 70_000 / 4096 * 4096);
    bench.done(&["snapshot", "create", "vol", "s1"]);
    spoil(&bench, "vol", 3 << 20);
    bench.done(&["snapshot", "create", "vol", "s2"]);
    export_since(&bench, 1);
    export_since(&bench, 2);
    let unverified =
        ["export", "vol@s1", "blind.qcow2", "--since", "s0", "--base-image", "x.img", "--no-verify"];
    assert_eq!(bench.done(&unverified)["digest"], Value::Null);
    for image in ["s1.qcow2", "s2.qcow2", "blind.qcow2"] {
        readable(&bench.path(image));
    }
    // Without a word it is an image that names others; nor is a whole one a difference.
    bench.refused(&["import", "s1.qcow2", "v", "--create"], 5, "names a backing file", "--apply");
    bench.done(&["export", "vol@s0", "whole.qcow2"]);
    readable(&bench.path("whole.qcow2"));
    bench.done(&["clone", "vol@s0", "base"]);
    bench.refused(&["import", "whole.qcow2", "base", "--apply"], 2, "names no base", "--apply");
    bench.refused(&["import", "in.img", "base", "--apply"], 2, "only a qcow2", "--apply");
    let wrong = |image: &str, volume: &str| {
        let before = bench.bytes_of(volume);
        bench.refused(
            &["import", image, volume, "--apply"],
            5,
            "does not have the content of vol@s",
            "apply it to",
        );
        assert!(bench.bytes_of(volume) == before, "it was written to");
        assert!(bench.done(&["show", volume])["attachments"].as_array().unwrap().is_empty());
    };
    wrong("s2.qcow2", "base");
    bench.done(&["clone", "vol@s0", "spoiled"]);
    spoil(&bench, "spoiled", 2 << 20);
    wrong("s1.qcow2", "spoiled");
    bench.done(&["create", "empty", "--size", "4M"]);
    wrong("s1.qcow2", "empty");
    // Larger than the image, and not all zeroes behind it.
    bench.done(&["clone", "vol@s0", "larger", "--size", "8M"]);
    spoil(&bench, "larger", 6 << 20);
    wrong("s1.qcow2", "larger");
    let clone = ["import", "s2.qcow2", "made", "--create", "--base", "vol@s0"];
    bench.refused(&clone, 5, "does not have the content of vol@s1", "apply it to");
    bench.refused(&["show", "made"], 3, "made", "");
    bench.done(&["set", "base", "--protect"]);
    bench.refused(&["import", "s1.qcow2", "base", "--apply"], 5, "is protected", "--no-protect");
    bench.done(&["set", "base", "--no-protect"]);
    // Who wants it nevertheless is told that it went wrong, as far as the image says it.
    let unchecked = ["import", "s1.qcow2", "spoiled", "--apply", "--unchecked-base"];
    bench.refused(&unchecked, 5, "is not what the image was made of", "import --drop spoiled");
    bench.done(&["import", "--drop", "spoiled"]);
    let blind = ["import", "blind.qcow2", "base", "--apply"];
    bench.refused(&blind, 5, "does not say what its base has to be", "--unchecked-base");
    bench.done(&[&blind[..], &["--unchecked-base"]].concat());
    // A second time there is nothing to do.
    bench.done(&["import", "s1.qcow2", "base", "--apply"]);
    // A file of this machine that an image names is not read, whatever it is.
    fs::write(bench.path("secret"), vec![b's'; 4 * MIB]).unwrap();
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &text("secret"), &text("evil.qcow2")],
    );
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 101 64k 64k", &text("evil.qcow2")]);
    readable(&bench.path("evil.qcow2"));
    let before = bench.bytes_of("base");
    bench.refused(&["import", "evil.qcow2", "base", "--apply"], 5, "does not say", "--unchecked-base");
    bench.done(&["import", "evil.qcow2", "base", "--apply", "--unchecked-base"]);
    let after = bench.bytes_of("base");
    assert!(after[65536..131_072].iter().all(|byte| *byte == 101));
    assert!(after[..65536] == before[..65536] && after[131_072..] == before[131_072..]);
    refused_exports(&bench);
}

/// Differences that there cannot be.
fn refused_exports(bench: &Bench) {
    let export = |source, options: &[&str], what: &str, next: &str| {
        bench.refused(&[&["export", source, "x.qcow2"], options].concat(), 2, what, next);
    };
    export("vol@s1", &["--since", "s0"], "--base-image", "");
    let since = ["--since", "s0", "--base-image"];
    export("vol", &[&since[..], &["b.img"]].concat(), "between two snapshots", "snapshot create vol");
    export("vol@s1", &[&since[..], &["/b.img"]].concat(), "no path from", "relative");
    export("vol@s1", &[&since[..], &["nbd:localhost"]].concat(), "protocol", "./a:b");
    export("vol@s0", &[&since[..], &["b.img"]].concat(), "are one snapshot", "--since");
    export("vol@s1", &[&since[..], &["b.img", "--format", "raw"]].concat(), "only a qcow2", "--format");
    let missing = ["export", "vol@s1", "x.qcow2", "--since", "s7", "--base-image", "b.img"];
    bench.refused(&missing, 3, "s7", "");
    assert!(!bench.path("x.qcow2").exists() && !bench.path("x.qcow2.part").exists());
    assert!(!bench.path("x.qcow2.part.journal").exists());
}

#[test]
fn a_difference_that_is_killed_goes_on_or_begins_anew() {
    if !is_there("qemu-img") || !is_there("qemu-nbd") {
        return;
    }
    let Some(mounted) = Mounted::new() else { return };
    let bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    dense(&bench.path("in.img"), 32 * MIB, 33);
    bench.done(&["import", "in.img", "vol", "--create"]);
    bench.done(&["snapshot", "create", "vol", "s0"]);
    let changed = dense(&bench.path("changed.img"), 29 * MIB, 35);
    let file = File::options().write(true).open(bench.path("in.img")).unwrap();
    file.write_all_at(&changed, 2 << 20).unwrap();
    let bytes = fs::read(bench.path("in.img")).unwrap();
    bench.done(&["import", "in.img", "vol", "--overwrite"]);
    bench.done(&["snapshot", "create", "vol", "s1"]);
    let export = [
        "export",
        "vol@s1",
        "s1.qcow2",
        "--since",
        "s0",
        "--base-image",
        "s0.img",
        "--checkpoint-bytes",
        "1M",
    ];
    let directory = bench.directory.path();
    // A clone has no limits that would make it slow: one or another may end before it is killed.
    for number in 0..6 {
        let further = Duration::from_millis(3 * number);
        let is_killed = kill_after(bench.volctl(&export), directory, 1, further);
        if number == 2 && is_killed {
            // It has to begin anew: its journal tells of a file that is not there.
            fs::remove_file(bench.path("s1.qcow2.part")).unwrap_or_default();
        }
        fs::remove_file(bench.path("s1.qcow2")).unwrap_or_default();
    }
    let exported = bench.done(&export);
    bench.done(&["export", "vol@s0", "s0.img"]);
    assert!(by_qemu(&bench, "s1.qcow2") == bytes);
    // The file system is small.
    for name in ["s0.img", "converted", "in.img", "changed.img"] {
        fs::remove_file(bench.path(name)).unwrap();
    }
    assert_eq!(bench.done(&["list"]).as_array().unwrap().len(), 1, "no clone is left");
    readable(&bench.path("s1.qcow2"));
    bench.done(&["clone", "vol@s0", "again"]);
    bench.done(&["limit", "again", "--write-bandwidth", "12M"]);
    let import = ["import", "s1.qcow2", "again", "--apply", "--checkpoint-bytes", "1M"];
    let state = bench.path("state/volnode/images");
    assert!(kill_after(bench.volctl(&import), &state, 1, Duration::ZERO), "it has ended");
    bench.done(&["limit", "again", "--write-bandwidth", "none"]);
    let imported = bench.done(&import);
    assert!(imported["resumed_bytes"].as_u64().unwrap() >= 3 * MIB as u64, "{imported}");
    assert_eq!(imported["digest"], exported["digest"]);
    assert!(bench.bytes_of("again") == bytes);
    // What another machine has begun is neither the base nor the whole, and nobody here knows of it.
    bench.done(&["clone", "vol@s0", "half"]);
    spoil(&bench, "half", 5 << 20);
    let half = ["import", "s1.qcow2", "half", "--apply"];
    bench.refused(&half, 5, "does not have the content of vol@s0", "--unchecked-base");
    let forced = bench.done(&[&half[..], &["--unchecked-base"]].concat());
    assert_eq!(forced["digest"], exported["digest"]);
}
