//! `cargo lab zero-copy`: what a large WRITE costs the client's machine, copied and sent from the request's own pages, as a table.
//!
//! Builds the product as it is shipped, boots a machine that counts instructions and has a network card which fetches data from where
//! it lies, with the storage server outside of it, and lets `zero_copy_guest` measure there. Both are in a network namespace of the
//! measurement's own, which goes with them: a tap device joins them. Called by `commands`. What was not measured is an error.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::harness::STORAGE_MACHINE_VARIABLE;
use testlab::kernel_series::KernelSeries;

use super::{measurement, network};
use crate::lab::machine::guest_command::GuestCommand;
use crate::lab::machine::storage_machine::StorageMachine;
use crate::lab::machine::vm::{HOST_FROM_GUEST, Processors, TAP};
use crate::lab::machine::{kernels, packages};
use crate::lab::programs;
use crate::lab::tool;
use crate::lab::workspace::Workspace;
use crate::zero_copy_guest::{MODES, Measured, PREFIX, SHAPES};

/// The profile whose programs are measured: optimised, no assertions.
const PROFILE: &str = "release";

/// From QEMU's start to its end: some ten minutes on a processor of one's own.
const RUN_DEADLINE: Duration = Duration::from_secs(60 * 60);

const BEGIN: &str = "<!-- begin: cargo lab zero-copy --write -->\n";
const END: &str = "<!-- end: cargo lab zero-copy --write -->\n";

/// Measures, prints the table; with `write`, also updates the document.
///
/// # Errors
/// The product does not build, the machine fails, something was not measured, or the card copied.
pub(crate) fn run(workspace: &Workspace, write: bool) -> Result<()> {
    let this_program = workspace.own_program();
    packages::ensure_installed(workspace)?;
    let kernel = kernels::ensure_cached(workspace, KernelSeries::V7)?;
    programs::build_product(workspace, PROFILE)?;
    let programs = workspace.target.join(PROFILE);
    enter_network()?;
    let server = StorageMachine::start_at(workspace, &programs, HOST_FROM_GUEST)?;
    let words =
        [this_program.display().to_string(), "guest-zero-copy".to_owned(), programs.display().to_string()];
    let command = GuestCommand::new(workspace, words.to_vec())?
        .in_directory(&workspace.root)
        .with_variable(STORAGE_MACHINE_VARIABLE, &server.management_uri);
    let stdout =
        measurement::guest_output(workspace, &kernel, &command, Processors::CountedWithCard, RUN_DEADLINE)?;
    let lines = stdout.lines().filter_map(|line| line.strip_prefix(PREFIX));
    let measured: Vec<Measured> =
        lines.map(serde_json::from_str).collect::<Result<_, _>>().context("a line")?;
    let text = format!("{}\n{}", measurement::machine_line(&kernel.release)?, table(&measured)?);
    print!("{text}");
    if write {
        measurement::keep(workspace, BEGIN, END, &text)?;
    }
    Ok(())
}

/// What this thread starts from now on, the server and the machine, is in a network of its own: loopback, and the tap that is the
/// machine's card.
fn enter_network() -> Result<()> {
    network::enter()?;
    let address = format!("{HOST_FROM_GUEST}/24");
    for words in [
        &["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"][..],
        &["addr", "add", &address, "dev", TAP],
        &["link", "set", TAP, "up"],
    ] {
        tool::output(tool::command("ip").args(words), network::IP_DEADLINE)
            .context("the network of the measurement")?;
    }
    Ok(())
}

/// The table, a line for each cell. Of the repetitions the cheapest counts: what others do on this machine makes the server slower, the
/// batches smaller, and the wake-ups more.
fn table(measured: &[Measured]) -> Result<String> {
    let mut text = "| WRITE, KiB/in flight | copied, then lent | all repetitions | from its pages | all repetitions | difference | bytes copied, both ways |\n\
                    | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for (block_kib, depth) in SHAPES {
        let of = |mode: &str| {
            let is_it =
                |one: &&Measured| one.mode == mode && (one.block_kib, one.depth) == (block_kib, depth);
            let one = measured.iter().find(is_it).filter(|one| !one.thousands.is_empty());
            one.with_context(|| format!("{block_kib}k/{depth}, {mode}: it was not measured"))
        };
        let [copied, sent] = [of(MODES[0])?, of(MODES[1])?];
        ensure!(
            copied.send_zc == "off" && sent.send_zc == "used" && sent.copied_bytes == 0.0,
            "{block_kib}k/{depth}: it was not sent as it was meant ({}, {}, {} bytes)",
            copied.send_zc,
            sent.send_zc,
            sent.copied_bytes
        );
        let [before, after] =
            [copied, sent].map(|one| one.thousands.iter().copied().fold(f64::INFINITY, f64::min));
        let [all_before, all_after] = [copied, sent].map(|one| {
            one.thousands.iter().map(|value| format!("{value:.0}")).collect::<Vec<_>>().join(", ")
        });
        let difference = (after / before - 1.0) * 100.0;
        let _ = writeln!(
            text,
            "| {block_kib}/{depth} | {before:.1} | {all_before} | {after:.1} | {all_after} | {difference:+.1} % | {:.0}, {:.0} |",
            copied.copied_bytes, sent.copied_bytes
        );
    }
    text.push_str("\nThousand instructions for each WRITE of the client's machine; the cheapest repetition, and all of them.\n");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured() -> Vec<Measured> {
        let mut all = Vec::new();
        for (mode, thousands, copied_bytes, send_zc) in
            [("off", 100.0, 65536.0, "off"), ("on", 90.0, 0.0, "used")]
        {
            for (block_kib, depth) in SHAPES {
                let (mode, send_zc) = (mode.to_owned(), send_zc.to_owned());
                let thousands = vec![thousands + 1.0, thousands, thousands + 20.0];
                all.push(Measured { mode, block_kib, depth, thousands, copied_bytes, send_zc });
            }
        }
        all
    }

    #[test]
    fn both_ways_stand_side_by_side() {
        let text = table(&measured()).unwrap();
        let line = "| 64/1 | 100.0 | 101, 100, 120 | 90.0 | 91, 90, 110 | -10.0 % | 65536, 0 |\n";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn what_is_missing_and_what_was_copied_are_errors() {
        let mut less = measured();
        less.pop();
        assert!(table(&less).is_err());
        for change in [
            |one: &mut Measured| one.send_zc = "copied".to_owned(),
            |one: &mut Measured| one.copied_bytes = 1.0,
        ] {
            let mut copied = measured();
            copied.iter_mut().for_each(change);
            assert!(table(&copied).is_err());
        }
    }
}
