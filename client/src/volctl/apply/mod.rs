//! `apply`: volumes made and changed until they are as a file declares them. Nothing is ever deleted.
//!
//! Owns the loop: the file is read, everything that is declared is looked at, and the steps are decided (`plan.rs`), before the
//! first of them is done; so what cannot be changed changes nothing at all. A step that fails ends it: those before it were done and
//! told, those after it were not tried, and the next time begins with what is there by then.

mod change;
mod declared;
mod plan;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::Path;

use proto::error_reason as reason;
use proto::v1;
use proto::v1::management_client::ManagementClient;
use serde_json::{Value, json};
use tonic::transport::Channel;

use self::declared::Declared;
use self::plan::{Action, Conflict, Found, Source, Step};
use crate::cli::ApplyArgs;
use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::once::once;
use crate::output::OutputFormat;
use crate::report::{Report, disk_bytes, header_bytes};
use crate::settings::LimitArgs;
use crate::snapshots::{Named, clone_to_its_end};
use crate::volumes::notes_on_new;

/// Of a file: more than the 10,000 volumes of a server need. A stream without an end is not read for ever.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// A declared volume, and what becomes of it.
#[derive(Debug)]
struct Volume {
    name: String,
    /// Empty until it is there.
    uid: String,
    steps: Vec<Step>,
    done: usize,
    /// Why the step behind those that are done failed.
    error: Option<String>,
}

pub(crate) async fn apply(
    server: &ServerAddress,
    args: ApplyArgs,
    output: OutputFormat,
) -> Result<Report, Failure> {
    let declared = read(&args.file)?;
    let mut client = connect::server(server).await?;
    let mut volumes = planned(&mut client, &declared).await?;
    if args.dry_run {
        return Ok(would_be_done(&volumes));
    }
    let outcome = carry_out(&mut client, &mut volumes, output).await;
    let report = Report::new("", result_json(&volumes, false));
    match outcome {
        Ok(()) if output.is_for_people() => Ok(report.printed()),
        Ok(()) => Ok(report),
        Err(failure) => {
            if !output.is_for_people() {
                report.print(output)?;
            }
            Err(failure)
        }
    }
}

fn read(path: &Path) -> Result<Vec<Declared>, Failure> {
    let mut text = String::new();
    let (name, read) = if path == Path::new("-") {
        let read = io::stdin().lock().take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
        ("stdin".to_owned(), read)
    } else {
        let read = |file: File| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
        (path.display().to_string(), File::open(path).and_then(read))
    };
    let wrong =
        |what: String| Failure::new(ExitCode::Usage, what, "see `volctl apply --help`; nothing was changed");
    match read {
        Err(error) => Err(Failure::other(format!("cannot read {name}: {error}"))),
        Ok(length) if length as u64 > FILE_BYTES_MAX => {
            Err(wrong(format!("{name} has more than {FILE_BYTES_MAX} bytes")))
        }
        Ok(_) => match declared::read(&text) {
            Err(why) => Err(wrong(format!("{name}: {why}"))),
            Ok(declared) if declared.is_empty() => Err(wrong(format!("{name} declares no volume"))),
            Ok(declared) => Ok(declared),
        },
    }
}

/// Every declared volume with its steps; or everything that cannot be changed.
async fn planned(
    client: &mut ManagementClient<Channel>,
    declared: &[Declared],
) -> Result<Vec<Volume>, Failure> {
    let (mut volumes, mut conflicts) = (Vec::new(), Vec::new());
    let mut earlier = BTreeMap::new();
    for one in declared {
        let there = volume(client, &one.name).await?;
        let source = match &one.source {
            Some(text) => Some(source(client, text, &earlier).await?),
            None => None,
        };
        let is_encrypted = there.as_ref().is_some_and(|there| there.is_encrypted)
            || source.as_ref().is_some_and(|source| source.is_encrypted)
            || one.encrypted.unwrap_or_default();
        match plan::plan(one, there.as_ref(), source.as_ref()) {
            Ok(steps) => {
                let uid = there.map(|there| there.volume_uid).unwrap_or_default();
                volumes.push(Volume { name: one.name.clone(), uid, steps, done: 0, error: None });
            }
            Err(found) => conflicts.extend(found),
        }
        earlier.insert(one.name.as_str(), is_encrypted);
    }
    match conflicts.first() {
        None => Ok(volumes),
        Some(Conflict { exit_code, .. }) => {
            let what: Vec<&str> = conflicts.iter().map(|conflict| conflict.what.as_str()).collect();
            let next = "declare what can be, or a volume of another name; nothing was changed";
            Err(Failure::new(*exit_code, what.join("; "), next))
        }
    }
}

/// The volume of that name, if there is one.
async fn volume(client: &mut ManagementClient<Channel>, name: &str) -> Result<Option<v1::Volume>, Failure> {
    match call(client.get_volume(v1::GetVolumeRequest { name: name.to_owned(), ..Default::default() })).await
    {
        Ok(volume) => Ok(Some(volume)),
        Err(failure) if failure.reason == reason::VOLUME_NOT_FOUND => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// What a clone is to be made of. `earlier` are the volumes that there will be before it, and whether they are encrypted.
async fn source(
    client: &mut ManagementClient<Channel>,
    text: &str,
    earlier: &BTreeMap<&str, bool>,
) -> Result<Source, Failure> {
    let named = match Named::of_source(text.to_owned())? {
        Ok(snapshot) => snapshot,
        Err(volume_name) => {
            let (found, is_encrypted) = match volume(client, &volume_name).await? {
                Some(there) => {
                    let capacity_bytes = disk_bytes(&there);
                    (Found::There { uid: there.volume_uid, capacity_bytes }, there.is_encrypted)
                }
                None => match earlier.get(volume_name.as_str()) {
                    Some(is_encrypted) => (Found::ToBeMade, *is_encrypted),
                    None => (Found::Gone, false),
                },
            };
            return Ok(Source { named: Named { volume_name, ..Named::default() }, found, is_encrypted });
        }
    };
    let Named { volume_name, name, snapshot_uid } = named.clone();
    let (found, is_encrypted) = match call(client.get_snapshot(v1::GetSnapshotRequest {
        volume_name,
        name,
        snapshot_uid,
        ..Default::default()
    }))
    .await
    {
        Ok(v1::Snapshot { snapshot_uid: uid, capacity_bytes, is_encrypted, .. }) => {
            let capacity_bytes = capacity_bytes.saturating_sub(header_bytes(is_encrypted));
            (Found::There { uid, capacity_bytes }, is_encrypted)
        }
        Err(failure)
            if [reason::VOLUME_NOT_FOUND, reason::SNAPSHOT_NOT_FOUND].contains(&failure.reason.as_str()) =>
        {
            (Found::Gone, false)
        }
        Err(failure) => return Err(failure),
    };
    Ok(Source { named, found, is_encrypted })
}

/// What a dry run has to say.
fn would_be_done(volumes: &[Volume]) -> Report {
    let mut text = String::new();
    for Volume { name, steps, .. } in volumes {
        let lines = steps.iter().flat_map(|step| step.lines(name, false));
        text.extend(lines.map(|line| line + "\n"));
        if steps.is_empty() {
            text += &unchanged(name);
        }
    }
    let is_nothing = volumes.iter().all(|volume| volume.steps.is_empty());
    let exit_code = if is_nothing { ExitCode::Done } else { ExitCode::WouldChange };
    Report { exit_code, ..Report::new(text, result_json(volumes, true)) }
}

fn unchanged(name: &str) -> String {
    format!("volume {name} unchanged\n")
}

/// Does one step after another, and tells people of each when it is done.
async fn carry_out(
    client: &mut ManagementClient<Channel>,
    volumes: &mut [Volume],
    output: OutputFormat,
) -> Result<(), Failure> {
    let total: usize = volumes.iter().map(|volume| volume.steps.len()).sum();
    let mut done = 0;
    // That nobody can be told is no reason to leave it half done.
    let mut told = Ok(());
    let mut tell = |text: String| {
        if output.is_for_people() && told.is_ok() {
            told = say(&text);
        }
    };
    for volume in volumes {
        while let Some(step) = volume.steps.get(volume.done) {
            if let Err(failure) = do_step(client, step, &mut volume.uid).await {
                volume.error = Some(failure.what.clone());
                return Err(ended_by(failure, &volume.name, done, total));
            }
            tell(step.lines(&volume.name, true).into_iter().map(|line| line + "\n").collect());
            volume.done += 1;
            done += 1;
        }
        if volume.steps.is_empty() {
            tell(unchanged(&volume.name));
        }
    }
    told
}

/// A reader that stops reading is no error.
fn say(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::other(format!("everything was done, but the result cannot be written: {error}")))
        }
        _ => Ok(()),
    }
}

/// The failure of a step, with how far it came.
fn ended_by(failure: Failure, name: &str, done: usize, total: usize) -> Failure {
    let what = format!("volume {name}: {}; {done} of {total} steps were done before", failure.what);
    let next = match failure.next.as_str() {
        "" => "apply again: it goes on from there".to_owned(),
        next => format!("{next}; then apply again: it goes on from there"),
    };
    Failure { what, next, ..failure }
}

/// One call, to a volume by its uid: never to another that got the name meanwhile.
async fn do_step(
    client: &mut ManagementClient<Channel>,
    step: &Step,
    uid: &mut String,
) -> Result<(), Failure> {
    let name = format!("uid:{uid}");
    match step.action.clone() {
        Action::Create(request) => {
            let volume =
                once(
                    client,
                    request,
                    |mut client, request| async move { client.create_volume(request).await },
                )
                .await?;
            // Whoever closed stderr does not want to know.
            io::stderr().write_all(notes_on_new(&volume).as_bytes()).ok();
            *uid = volume.volume_uid;
        }
        Action::Clone(request) => *uid = clone_to_its_end(client, request).await?.volume_uid,
        Action::Resize(capacity_bytes) => {
            let request = v1::ResizeVolumeRequest { name, capacity_bytes, ..Default::default() };
            once(client, request, |mut client, request| async move { client.resize_volume(request).await })
                .await?;
        }
        Action::Limit(declared) => {
            // What others have set since the plan was made stays.
            let there =
                call(client.get_volume(v1::GetVolumeRequest { name: name.clone(), ..Default::default() }))
                    .await?;
            let limits = Some(LimitArgs::from(declared).applied_to(there.limits.unwrap_or_default()));
            let request = v1::SetVolumeLimitsRequest { name, limits, ..Default::default() };
            once(
                client,
                request,
                |mut client, request| async move { client.set_volume_limits(request).await },
            )
            .await?;
        }
        Action::Set(update) => {
            let request = v1::UpdateVolumeRequest { name, ..update };
            once(client, request, |mut client, request| async move { client.update_volume(request).await })
                .await?;
        }
    }
    Ok(())
}

/// Every volume with its steps, and how each ended.
fn result_json(volumes: &[Volume], is_dry_run: bool) -> Value {
    let volume_json = |volume: &Volume| {
        let steps = volume.steps.iter().enumerate().map(|(index, step)| {
            let failed = volume.error.as_ref().filter(|_| index == volume.done);
            let state = match failed {
                Some(_) => "failed",
                None if is_dry_run => "planned",
                None if index < volume.done => "done",
                None => "not_tried",
            };
            json!({
                "action": step.action.word(),
                "changes": step.changes_json(),
                "state": state,
                "error": failed.map_or("", String::as_str),
            })
        });
        json!({ "name": volume.name, "volume_uid": volume.uid, "steps": steps.collect::<Vec<_>>() })
    };
    json!({ "is_dry_run": is_dry_run, "volumes": volumes.iter().map(volume_json).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resized(done: usize, error: Option<&str>) -> Volume {
        let step = |size: u64| Step {
            action: Action::Resize(size),
            changes: vec![change::Change::size(4096, size)],
        };
        let (name, uid) = ("v".to_owned(), "u".to_owned());
        Volume { name, uid, steps: vec![step(8192), step(16384)], done, error: error.map(str::to_owned) }
    }

    fn states(volume: Volume, is_dry_run: bool) -> Vec<String> {
        let json = result_json(&[volume], is_dry_run);
        let steps = json["volumes"][0]["steps"].as_array().unwrap();
        steps
            .iter()
            .map(|step| format!("{} {}", step["state"].as_str().unwrap(), step["error"].as_str().unwrap()))
            .collect()
    }

    #[test]
    fn each_step_is_told_with_how_it_ended() {
        assert_eq!(states(resized(2, None), false), ["done ", "done "]);
        assert_eq!(states(resized(0, Some("full")), false), ["failed full", "not_tried "]);
        assert_eq!(states(resized(1, Some("full")), false), ["done ", "failed full"]);
        assert_eq!(states(resized(0, None), true), ["planned ", "planned "]);
    }

    #[test]
    fn a_dry_run_ends_with_a_code_of_its_own_where_something_would_be_changed() {
        let report = would_be_done(&[resized(0, None)]);
        let told =
            "volume v would be changed: size from 4K to 8K\nvolume v would be changed: size from 4K to 16K\n";
        assert_eq!((report.text.as_str(), report.exit_code), (told, ExitCode::WouldChange));
        let nothing = Volume { steps: Vec::new(), ..resized(0, None) };
        let report = would_be_done(&[nothing]);
        assert_eq!((report.text.as_str(), report.exit_code), ("volume v unchanged\n", ExitCode::Done));
    }

    #[test]
    fn a_failure_tells_how_far_it_came_and_what_to_do() {
        let full = Failure::new(ExitCode::NoSpace, "no space left", "free some");
        let told = ended_by(full, "v", 2, 5);
        assert_eq!(told.exit_code, ExitCode::NoSpace);
        assert_eq!(told.what, "volume v: no space left; 2 of 5 steps were done before");
        assert_eq!(told.next, "free some; then apply again: it goes on from there");
        assert_eq!(ended_by(Failure::other("x"), "v", 0, 1).next, "apply again: it goes on from there");
    }
}
