//! The real server, killed before and after what it has LVM change: what the next one has is as before the call or as behind it.
//!
//! In the place where the server looks for `lvm` first is a script that runs the real one, and kills whoever called it before a change or
//! behind it. All changes of all calls, with the catalog beside them, are in the unit tests of `server/src/lifecycle/tests/thin_kills.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::wait_for;
use testlab::storage_node::StorageNode;

use crate::direct;
use crate::lvm::{GROUP, ThinPool, stored};

pub(crate) const TESTS: &[Test] = &[Test::new(
    "lvm_kills::a_server_that_is_killed_while_lvm_works_leaves_it_done_or_not",
    killed_while_lvm_works,
)
.within(500)
.once()];

/// Where the server looks for LVM's tools first.
const SCRIPT: &str = "/usr/local/sbin/lvm";
const REAL: &str = "/usr/sbin/lvm";

/// Kills whoever has LVM change something, when it was told to.
struct Killer {
    dir: PathBuf,
}

impl Killer {
    fn new(dir: &Path) -> Result<Self> {
        ensure!(Path::new(REAL).exists(), "{REAL} is not there");
        let killer = Self { dir: dir.to_owned() };
        killer.spare()?;
        let dir = dir.display();
        let script = format!(
            r#"#!/bin/bash
case "$1" in lvcreate|lvextend|lvrename|lvremove) ;; *) exec {REAL} "$@" ;; esac
number=$(($(< {dir}/changes) + 1))
echo $number > {dir}/changes
victim=$(< {dir}/victim)
if [ "$victim" = "before $number" ]; then kill -KILL $PPID; exit 1; fi
{REAL} "$@"
ended=$?
if [ "$victim" = "after $number" ]; then kill -KILL $PPID; fi
exit $ended
"#
        );
        fs::write(SCRIPT, script)?;
        fs::set_permissions(SCRIPT, fs::Permissions::from_mode(0o755))?;
        Ok(killer)
    }

    /// At the next call's change of that number, from 1 on.
    fn kill(&self, when: &str, number: u32) -> Result<()> {
        fs::write(self.dir.join("victim"), format!("{when} {number}"))?;
        Ok(fs::write(self.dir.join("changes"), "0")?)
    }

    fn spare(&self) -> Result<()> {
        self.kill("never", 0)
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        let _ = fs::remove_file(SCRIPT);
    }
}

fn json(node: &StorageNode, arguments: &[&str]) -> Result<serde_json::Value> {
    let told = node.volctl(&[arguments, &["--output", "json"]].concat())?.succeeded()?;
    Ok(serde_json::from_str(&told)?)
}

/// The logical volumes that there have to be: one for each volume and each snapshot.
fn expected(node: &StorageNode) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for (command, field, prefix) in [
        (&["list"][..], "volume_uid", "volnode-v-"),
        (&["snapshot", "list"][..], "snapshot_uid", "volnode-s-"),
    ] {
        for row in json(node, command)?.as_array().context("a list")? {
            let uid = row[field].as_str().with_context(|| format!("{field} in {row}"))?;
            names.insert(format!("{prefix}{uid}"));
        }
    }
    Ok(names)
}

/// Does something, killed there; the server that comes next has it or has it not, and has nothing besides. Then it is done, if it was not.
fn killed(
    node: &mut StorageNode,
    killer: &Killer,
    when: (&str, u32),
    call: &[&str],
    is_done: impl Fn(&StorageNode) -> Result<bool>,
) -> Result<()> {
    let at = format!("{call:?}, killed {} change {}", when.0, when.1);
    killer.kill(when.0, when.1)?;
    let answer = node.volctl(call)?;
    ensure!(answer.exit_code != 0, "{at}: answered all the same");
    let is_dead = || -> Result<Option<()>> { Ok((!node.server_is_alive()?).then_some(())) };
    wait_for(&format!("{at}: the server's end"), Duration::from_secs(60), is_dead)?;
    killer.spare()?;
    node.kill_server()?;
    node.start_server().with_context(|| at.clone())?;
    let found: BTreeSet<String> = stored()?.into_iter().collect();
    ensure!(found == expected(node)?, "{at}: {found:?}, and the catalog has {:?}", expected(node)?);
    if !is_done(node)? {
        node.volctl(call)?.succeeded().with_context(|| format!("{at}: done again"))?;
        ensure!(is_done(node)?, "{at}: it is not done");
    }
    Ok(())
}

/// A volume's device, of which the server has nothing open: nobody is attached.
fn device_of(node: &StorageNode, name: &str) -> Result<PathBuf> {
    let shown = json(node, &["show", name])?;
    let uid = shown["volume_uid"].as_str().context("volume_uid")?;
    let name = format!("{}-volnode--v--{}", GROUP.replace('-', "--"), uid.replace('-', "--"));
    Ok(Path::new("/dev/mapper").join(name))
}

fn killed_while_lvm_works(env: &Env) -> Result<()> {
    let pool = ThinPool::new(env.scratch_disk()?, 128)?;
    let killer = Killer::new(&env.directory)?;
    let pool_name = format!("{GROUP}/pool");
    let options = ["--lvm", &pool_name];
    let mut node = StorageNode::start_server_only(env, &env.directory.join("data"), &options)?;
    let (node, killer) = (&mut node, &killer);
    let has_volume = |name: &'static str| {
        move |node: &StorageNode| -> Result<bool> { Ok(node.volctl(&["show", name])?.exit_code == 0) }
    };
    let create = |name: &'static str| ["create", name, "--size", "16M", "--backend", "lvm"];
    killed(node, killer, ("before", 1), &create("a"), has_volume("a"))?;
    killed(node, killer, ("after", 1), &create("b"), has_volume("b"))?;

    let monday = direct::random_bytes(4096);
    direct::write(&device_of(node, "a")?, 0, &monday)??;
    // One of the group is made, and the other not; and both, of which the catalog does not know yet.
    for (name, when) in [("s1", ("after", 1)), ("s2", ("before", 2)), ("s3", ("after", 2))] {
        let has_both = |node: &StorageNode| -> Result<bool> {
            let has = |volume: &str| -> Result<bool> {
                Ok(node.volctl(&["snapshot", "show", volume, name])?.exit_code == 0)
            };
            let (a, b) = (has("a")?, has("b")?);
            ensure!(a == b, "{name} of one volume, and not of the other");
            Ok(a)
        };
        killed(node, killer, when, &["snapshot", "create", "a,b", name], has_both)?;
    }
    killed(node, killer, ("after", 1), &["clone", "a@s1", "c", "--size", "32M"], has_volume("c"))?;
    let is_grown = |node: &StorageNode| -> Result<bool> {
        Ok(json(node, &["show", "b"])?["capacity_bytes"] == 24 << 20)
    };
    killed(node, killer, ("after", 1), &["resize", "b", "--size", "24M"], is_grown)?;

    // Copied, the former put aside, the copy put in its place, the former removed.
    let tuesday = direct::random_bytes(4096);
    for number in 1..=4 {
        direct::write(&device_of(node, "a")?, 0, &tuesday)??;
        let is_restored = |node: &StorageNode| -> Result<bool> {
            let bytes = direct::read(&device_of(node, "a")?, 0, monday.len())??;
            ensure!(bytes == monday || bytes == tuesday, "neither the former bytes nor the snapshot's");
            Ok(bytes == monday)
        };
        killed(node, killer, ("after", number), &["snapshot", "restore", "a", "s1"], is_restored)?;
    }
    let is_gone = |node: &StorageNode| -> Result<bool> { Ok(node.volctl(&["show", "c"])?.exit_code != 0) };
    killed(node, killer, ("after", 1), &["delete", "c"], is_gone)?;
    node.kill_server()?;
    drop(pool);
    Ok(())
}
