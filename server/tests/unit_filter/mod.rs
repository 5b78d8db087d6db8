//! The system-call filter that systemd puts on the server, for the servers that tests start.
//!
//! Taken from the unit that is shipped, its sets expanded by this machine's systemd. What it does not list ends the process
//! here, whatever the unit says is to happen: a call that was forgotten is to be seen, not got around. A filter is a
//! thread's, and of the threads and processes that this one starts: the test's own client is not under it.
#![allow(dead_code, unreachable_pub)] // Each test file is a crate of its own and uses a part of this.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::OnceLock;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

const UNIT: &str = include_str!("../../../deploy/volserver.service");
/// Names and numbers of this machine's system calls, of the package that the C compiler needs.
const NUMBERS: &str = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h";

/// Runs `act` on a thread under the unit's filter; without it where this machine cannot make it.
pub fn under<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    static PROGRAM: OnceLock<Option<BpfProgram>> = OnceLock::new();
    match PROGRAM.get_or_init(|| Some(program(&allowed()?, SeccompAction::KillProcess))) {
        Some(program) => under_program(program, act),
        None => act(),
    }
}

/// Runs `act` under the unit's filter without one more call, which fails as the unit has all others fail.
pub fn under_without<T: Send>(call: &str, act: impl FnOnce() -> T + Send) -> Option<T> {
    let mut allowed = allowed()?;
    assert!(allowed.remove(&numbers()[call]), "{call} is not in the filter");
    // So that the unit's own can be put on top of it.
    allowed.insert(numbers()["seccomp"]);
    Some(under_program(&program(&allowed, SeccompAction::Errno(libc::EPERM as u32)), act))
}

/// What the unit says of `key`, as words.
pub fn words_of_unit(key: &str) -> Vec<&'static str> {
    let lines = UNIT.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    lines.flat_map(str::split_whitespace).collect()
}

fn under_program<T: Send>(program: &BpfProgram, act: impl FnOnce() -> T + Send) -> T {
    let filtered = || {
        apply_filter(program).unwrap();
        act()
    };
    let ended = std::thread::scope(|scope| scope.spawn(filtered).join());
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn program(allowed: &BTreeSet<i64>, otherwise: SeccompAction) -> BpfProgram {
    let rules = allowed.iter().map(|number| (*number, Vec::new())).collect();
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, architecture).unwrap();
    filter.try_into().unwrap()
}

/// The numbers of all calls that the unit allows; `None`, with the reason said, where systemd or the names are not here.
fn allowed() -> Option<BTreeSet<i64>> {
    let sets = Command::new("systemd-analyze").arg("syscall-filter").output();
    let Ok(sets) = sets.map(|output| String::from_utf8(output.stdout).unwrap()) else {
        return skip("no systemd-analyze (Debian package systemd)");
    };
    if !std::path::Path::new(NUMBERS).exists() {
        return skip("the names of system calls are known for x86-64 with linux-libc-dev only");
    }
    let sets = members_of_sets(&sets);
    let numbers = numbers();
    let mut names: Vec<&str> = words_of_unit("SystemCallFilter");
    // systemd lets these pass whatever a unit says.
    names.push("@default");
    assert!(names.iter().all(|name| !name.starts_with('~')), "a list of what is refused is not read here");
    let mut allowed = BTreeSet::new();
    while let Some(name) = names.pop() {
        match sets.get(name) {
            Some(members) => names.extend(members),
            // A call of another architecture has no number here.
            None => allowed.extend(numbers.get(name)),
        }
    }
    Some(allowed)
}

/// What `systemd-analyze syscall-filter` prints: each set's name, and indented below it its members.
fn members_of_sets(printed: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut sets: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut set = "";
    for line in printed.lines().filter(|line| !line.trim_start().starts_with('#')) {
        match line.strip_prefix(' ') {
            Some(member) => sets.entry(set).or_default().push(member.trim()),
            None => set = line.trim(),
        }
    }
    sets
}

fn numbers() -> BTreeMap<String, i64> {
    let header = std::fs::read_to_string(NUMBERS).unwrap();
    let defined = |line: &str| {
        let (name, number) = line.strip_prefix("#define __NR_")?.split_once(' ')?;
        Some((name.to_owned(), number.trim().parse().ok()?))
    };
    header.lines().filter_map(defined).collect()
}

fn skip<T>(why: &str) -> Option<T> {
    let is_promised = std::env::var_os("VOLNODE_LAB_TOOLS").is_some_and(|value| value == "1");
    assert!(!is_promised, "cannot run: {why}");
    println!("SKIP the unit's system-call filter: {why}");
    None
}
