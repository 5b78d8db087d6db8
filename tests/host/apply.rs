//! `volctl apply` with the real volserver: what is declared is made, once; what cannot be is refused before anything is changed; and
//! whoever is interrupted goes on.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use testlab::volserver::Volserver;

use super::images::Mounted;
use super::programs;

/// A server and a directory for files.
struct Bench {
    directory: tempfile::TempDir,
    server: Volserver,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = start(directory.path());
        Self { directory, server }
    }

    fn volctl(&self, words: &[&str]) -> Command {
        let mut command = Command::new(programs::directory().join("volctl"));
        command.env("VOLNODE_SERVER", self.server.management_uri());
        command.current_dir(self.directory.path()).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.volctl(words).stdin(Stdio::null()).output().unwrap()
    }

    /// What a command printed that ended with this code.
    #[track_caller]
    fn said(&self, words: &[&str], code: i32) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The JSON of a command that has to succeed.
    #[track_caller]
    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.said(&[words, &["--output", "json"]].concat(), 0)).unwrap()
    }

    /// What a command said on stderr that ended with this code and printed no result.
    #[track_caller]
    fn refused(&self, words: &[&str], code: i32) -> String {
        let output = self.run(words);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn write(&self, text: &str) {
        fs::write(self.directory.path().join("volumes.yaml"), text).unwrap();
    }

    fn names(&self) -> Vec<String> {
        let listed = self.json(&["list"]);
        listed.as_array().unwrap().iter().map(|volume| volume["name"].as_str().unwrap().to_owned()).collect()
    }
}

fn start(directory: &Path) -> Volserver {
    let mut command = Command::new(programs::directory().join("volserver"));
    command.args(["--threads", "1", "--memory-max", "1G", "--log", "error"]);
    Volserver::start(&mut command, directory).unwrap()
}

const APPLY: [&str; 3] = ["apply", "-f", "volumes.yaml"];
const DRY_RUN: [&str; 4] = ["apply", "-f", "volumes.yaml", "--dry-run"];

const DECLARED: &str = "\
# Two of them as a list, and one by itself.
- name: db
  size: 100M
  block_size: 512
  write_cache: off
  labels: {app: shop, tier: 1}
  description: orders
  protected: true
  limits: {read_iops: 500, write_bandwidth: 20M}
- name: scratch
  size: 16M
  backend: memory
---
name: golden
size: 64M
read_only: true
";

#[test]
fn what_is_declared_is_made_once_and_changed_when_it_is_declared_otherwise() {
    let bench = Bench::new();
    bench.said(&["create", "other", "--size", "1M"], 0);
    bench.write(DECLARED);
    let planned = "\
volume db would be created: size 100M, backend file, block size 512, write cache off, label app shop, label tier 1, description \"orders\", protected yes, read IOPS 500, write bandwidth 20M/s
volume scratch would be created: size 16M, backend memory, block size 4096, write cache on
volume golden would be created: size 64M, backend file, block size 4096, write cache on
volume golden would be changed: read-only from no to yes
";
    assert_eq!(bench.said(&DRY_RUN, 10), planned);
    assert_eq!(bench.names(), ["other"], "a dry run changes nothing");
    assert_eq!(bench.said(&APPLY, 0), planned.replace("would be ", ""));
    assert_eq!(bench.names(), ["db", "golden", "other", "scratch"]);
    let db = bench.json(&["show", "db"]);
    assert_eq!((&db["capacity_bytes"], &db["block_size_bytes"]), (&(100 << 20).into(), &512.into()));
    assert_eq!((&db["write_cache"], &db["labels"]["tier"]), (&"off".into(), &"1".into()));
    assert_eq!((&db["is_protected"], &db["limits"]["read_iops"]), (&true.into(), &500.into()));
    assert_eq!(bench.json(&["show", "golden"])["is_read_only"], true);

    let before = bench.json(&["list"]);
    let unchanged = "volume db unchanged\nvolume scratch unchanged\nvolume golden unchanged\n";
    for _ in 0..2 {
        assert_eq!(bench.said(&APPLY, 0), unchanged);
    }
    assert_eq!((bench.said(&DRY_RUN, 0).as_str(), &bench.json(&["list"])), (unchanged, &before));

    // What others set is left alone.
    bench.said(&["set", "db", "--label", "by=others"], 0);
    bench.write(
        &DECLARED.replace("100M", "128M").replace("tier: 1", "tier: ~").replace("read_iops: 500", "burst: 3"),
    );
    let changes = "\
volume db changed: size from 100M to 128M
volume db changed: burst from 0 s to 3 s
volume db changed: label tier from 1 to none
volume scratch unchanged
volume golden unchanged
";
    assert_eq!(bench.said(&DRY_RUN, 10), changes.replace("db changed", "db would be changed"));
    assert_eq!(bench.said(&APPLY, 0), changes);
    let db = bench.json(&["show", "db"]);
    assert_eq!(db["labels"], serde_json::json!({ "app": "shop", "by": "others" }));
    assert_eq!((&db["limits"]["read_iops"], &db["capacity_bytes"]), (&500.into(), &(128 << 20).into()));
    assert_eq!(bench.said(&APPLY, 0), unchanged);
}

#[test]
fn what_cannot_be_changed_changes_nothing_and_is_told_with_both_values() {
    let bench = Bench::new();
    bench.write(DECLARED);
    bench.said(&APPLY, 0);
    let before = bench.json(&["list"]);
    bench.write(&format!(
        "{}---\nname: new\nsize: 1M\n",
        DECLARED.replace("100M", "50M").replace("512", "4096").replace("64M", "65M")
    ));
    for words in [&APPLY[..], &DRY_RUN] {
        let told = bench.refused(words, 4);
        assert!(told.contains("volume db: its size is 100M, and 50M is declared"), "{told}");
        assert!(told.contains("volume db: its block size is 512, and 4096 is declared"), "{told}");
        assert!(told.contains("\n  next: ") && told.contains("nothing was changed"), "{told}");
    }
    assert_eq!(bench.json(&["list"]), before, "golden did not grow, and new is not there");
    bench.write("name: scratch\nsize: 32M\n");
    assert!(bench.refused(&APPLY, 4).contains("a volume in memory keeps its size"));
    bench.write("name: db\nsize: 128M\nblock-size: 512\n");
    let told = bench.refused(&APPLY, 2);
    assert!(told.contains("unknown field `block-size`") && told.contains(" at line 3 "), "{told}");
    assert_eq!(bench.json(&["list"]), before);
}

#[test]
fn a_step_that_fails_ends_it_and_the_next_time_goes_on_from_there() {
    let bench = Bench::new();
    let declared = "- {name: a, size: 1M}\n- {name: b, size: 1M, backend: lvm}\n- {name: c, size: 1M}\n";
    bench.write(declared);
    let output = bench.run(&APPLY);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert!(stdout.starts_with("volume a created: ") && stdout.lines().count() == 1, "{stdout}");
    assert!(
        stderr.contains("volume b: ") && stderr.contains("; 1 of 3 steps were done before\n"),
        "{stderr}"
    );
    assert!(stderr.contains("then apply again: it goes on from there"), "{stderr}");
    assert_eq!(bench.names(), ["a"]);
    let told = bench.said(&["apply", "-f", "volumes.yaml", "--output", "json"], 5);
    let told: Value = serde_json::from_str(&told).unwrap();
    let state = |index: usize| told["volumes"][index]["steps"][0]["state"].as_str().unwrap_or("none");
    assert_eq!([state(0), state(1), state(2)], ["none", "failed", "not_tried"], "{told}");
    assert!(!told["volumes"][1]["steps"][0]["error"].as_str().unwrap().is_empty(), "{told}");
    bench.write(&declared.replace(", backend: lvm", ""));
    let done = bench.said(&APPLY, 0);
    assert!(
        done.starts_with("volume a unchanged\nvolume b created: ") && done.contains("volume c created: "),
        "{done}"
    );
}

#[test]
fn a_file_comes_from_stdin_and_the_result_is_yaml() {
    let bench = Bench::new();
    let apply = |words: &[&str]| {
        let mut command = bench.volctl(&["apply", "-f", "-", "--output", "yaml"]);
        let mut child = command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"name: v\nsize: 1M\nlabels: {a: b}\n").unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, planned) = apply(&["--dry-run"]);
    assert!(
        code == Some(10) && planned.contains("is_dry_run: true\n") && planned.contains("state: planned\n"),
        "{planned}"
    );
    let (code, done) = apply(&[]);
    assert_eq!(code, Some(0));
    for line in
        ["action: create\n", "field: capacity_bytes\n", "to: 1048576\n", "field: labels.a\n", "state: done\n"]
    {
        assert!(done.contains(line), "{line}: {done}");
    }
    let (code, again) = apply(&[]);
    assert!(code == Some(0) && again.contains("steps: []\n"), "{again}");
}

#[test]
fn whoever_is_killed_between_goes_on_the_next_time() {
    const VOLUMES: usize = 300;
    let bench = Bench::new();
    let declared: String = (0..VOLUMES)
        .map(|number| format!("- {{name: v{number}, size: 1M, read_only: true, labels: {{n: {number}}}}}\n"))
        .collect();
    bench.write(&declared);
    let mut child = bench.volctl(&APPLY).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().take(5).count();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(lines, 5);
    let rest = bench.said(&APPLY, 0);
    let is_made = |number: usize| rest.contains(&format!("volume v{number} created: "));
    assert!(!is_made(0) && is_made(VOLUMES - 1), "it was killed on its way: {rest}");
    let listed = bench.json(&["list"]);
    let listed = listed.as_array().unwrap();
    let is_right = |volume: &Value| {
        let number = volume["name"].as_str().unwrap().trim_start_matches('v');
        volume["is_read_only"] == true && volume["labels"]["n"] == number
    };
    assert!(listed.len() == VOLUMES && listed.iter().all(is_right));
    let again = bench.said(&APPLY, 0);
    assert!(again.lines().all(|line| line.ends_with(" unchanged")), "{again}");
}

#[test]
fn a_clone_is_declared_by_its_source() {
    let Some(mounted) = Mounted::new() else { return };
    let data = tempfile::tempdir_in(mounted.path()).unwrap();
    let bench = Bench { server: start(data.path()), directory: tempfile::tempdir().unwrap() };
    bench.said(&["create", "golden", "--size", "1M"], 0);
    bench.said(&["snapshot", "create", "golden", "v1"], 0);
    let declared =
        "- {name: web, source: golden@v1, size: 2M, protected: true}\n- {name: copy, source: web}\n";
    bench.write(declared);
    let done = "volume web cloned: source golden@v1, size 2M\nvolume web changed: protected from no to yes\n\
                volume copy cloned: source web\n";
    assert_eq!(bench.said(&APPLY, 0), done);
    assert_eq!(bench.json(&["show", "copy"])["capacity_bytes"], 2 << 20);
    let unchanged = "volume web unchanged\nvolume copy unchanged\n";
    assert_eq!(bench.said(&APPLY, 0), unchanged);
    bench.said(&["snapshot", "delete", "golden", "v1"], 0);
    assert_eq!(bench.said(&APPLY, 0), unchanged, "of what it is a clone nobody can tell any more");
    bench.write("name: web\nsource: golden\n");
    let told = bench.refused(&APPLY, 4);
    assert!(told.contains("volume web: its source is ") && told.contains("golden (uid "), "{told}");
    bench.write("name: late\nsource: golden@v1\n");
    assert!(bench.refused(&APPLY, 3).contains("neither is its source golden@v1"));
    bench.write("name: small\nsource: web\nsize: 1M\n");
    assert!(bench.refused(&APPLY, 2).contains("web has 2M, which is more than the declared 1M"));
}
