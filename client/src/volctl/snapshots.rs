//! `snapshot …` and `clone`: copies of the storage server's volumes, and the wait for them.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use proto::error_reason as reason;
use proto::v1;
use proto::v1::management_client::ManagementClient;
use serde_json::{Value, json};
use tonic::Code;
use tonic::transport::Channel;

use crate::cli::{CloneArgs, SnapshotCommand};
use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::once::{identified, once};
use crate::report::{
    Report, attachment_json, attachment_tables, content_word, disk_bytes, header_bytes, nodes_of, or_dash,
    properties, tables, volume_json,
};
use crate::size::human_size;

/// The most that the server gives in one page.
const PAGE_SIZE: u32 = 1000;
/// Begins the names of clones that are there for an export.
const EXPORT_PREFIX: &str = "volctl-export-";
/// Between two looks at an operation.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

pub(crate) async fn snapshot(server: &ServerAddress, command: SnapshotCommand) -> Result<Report, Failure> {
    match command {
        // With a freeze it is `frozen_snapshot.rs`'s.
        SnapshotCommand::Create { volumes, name, .. } => create(server, volumes, name).await,
        SnapshotCommand::List { volume } => list(server, volume.unwrap_or_default()).await,
        SnapshotCommand::Show { volume, name } => show(server, Named::of(volume, name)?).await,
        SnapshotCommand::Delete { volume, name } => delete(server, Named::of(volume, name)?).await,
        SnapshotCommand::Restore { volume, name } => restore(server, volume, name).await,
    }
}

/// A snapshot as it is named on the command line: by its volume and name, or as `@UID`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Named {
    pub(crate) volume_name: String,
    pub(crate) name: String,
    pub(crate) snapshot_uid: String,
}

impl Named {
    /// A snapshot; or, where it names none, the volume.
    pub(crate) fn of_source(source: String) -> Result<Result<Self, String>, Failure> {
        if source.contains('@') { Self::of(source, None).map(Ok) } else { Ok(Err(source)) }
    }

    pub(crate) fn of(volume: String, name: Option<String>) -> Result<Self, Failure> {
        match (volume.strip_prefix('@'), name) {
            (Some(uid), None) => Ok(Self { snapshot_uid: uid.to_owned(), ..Self::default() }),
            (None, Some(name)) => Ok(Self { volume_name: volume, name, ..Self::default() }),
            // As it is opened by name.
            (None, None) => match volume.split_once('@') {
                Some((volume, name)) => Self::of(volume.to_owned(), Some(name.to_owned())),
                None => Err(Failure::new(
                    ExitCode::Usage,
                    format!("which snapshot of {volume}?"),
                    "name it: VOLUME@NAME, or @UID",
                )),
            },
            (Some(_), Some(name)) => Err(Failure::new(
                ExitCode::Usage,
                format!("{volume} names a snapshot, and {name} another"),
                "name one: VOLUME NAME, or @UID",
            )),
        }
    }

    fn text(&self) -> String {
        format!("{}@{}{}", self.volume_name, self.name, self.snapshot_uid)
    }
}

async fn create(server: &ServerAddress, volumes: Vec<String>, name: String) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let request = v1::CreateSnapshotRequest { volume_names: volumes, name, ..Default::default() };
    let request = identified(request);
    let create =
        |mut client: ManagementClient<Channel>, request| async move { client.create_snapshot(request).await };
    let mut answer = once(&client, request.clone(), create).await?;
    if let Some(operation) = answer.operation.take() {
        finish(&mut client, operation).await?;
        // They are there, and are told as they are now.
        answer = once(&client, request, create).await?;
    }
    Ok(created(&answer.snapshots))
}

/// What is told of new snapshots.
pub(crate) fn created(snapshots: &[v1::Snapshot]) -> Report {
    let line = |snapshot: &v1::Snapshot| {
        let (name, size) = (export_name(snapshot), human_size(disk_bytes_of(snapshot)));
        format!("snapshot {name} of {size}{}\n", if snapshot.frozen { ", frozen" } else { "" })
    };
    let text: String = snapshots.iter().map(line).collect();
    Report::new(text, snapshots.iter().map(snapshot_json).collect())
}

async fn list(server: &ServerAddress, volume_name: String) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let mut snapshots: Vec<v1::Snapshot> = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListSnapshotsRequest {
            volume_name: volume_name.clone(),
            page_size: PAGE_SIZE,
            page_token,
            ..Default::default()
        };
        let page = call(client.list_snapshots(request)).await?;
        snapshots.extend(page.snapshots);
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    let rows = snapshots.iter().map(|snapshot| {
        let row = [
            or_dash(&snapshot.volume_name),
            snapshot.name.clone(),
            human_size(disk_bytes_of(snapshot)),
            human_size(snapshot.allocated_bytes),
            state_word(snapshot.state()).to_owned(),
            utc(snapshot.created_at_ms),
            nodes_of(&snapshot.attachments),
            snapshot.snapshot_uid.clone(),
        ];
        let further = [
            snapshot.block_size_bytes.to_string(),
            content_word(snapshot.content()).replace('_', "-"),
            if snapshot.frozen { "yes" } else { "no" }.to_owned(),
            snapshot.volume_uid.clone(),
            snapshot.group_uid.clone(),
        ];
        (row, further)
    });
    let tables = tables(
        ["VOLUME", "NAME", "SIZE", "USED", "STATE", "CREATED", "ATTACHED-TO", "UID"],
        ["BLOCK", "CONTENT", "FROZEN", "VOLUME-UID", "GROUP-UID"],
        rows,
    );
    Ok(Report::of_tables(tables, snapshots.iter().map(snapshot_json).collect()))
}

async fn show(server: &ServerAddress, named: Named) -> Result<Report, Failure> {
    let Named { volume_name, name, snapshot_uid } = named;
    let request = v1::GetSnapshotRequest { volume_name, name, snapshot_uid, with_exclusive_bytes: true };
    let snapshot = call(connect::server(server).await?.get_snapshot(request)).await?;
    let mut rows = vec![
        ("name", snapshot.name.clone()),
        ("volume", or_dash(&snapshot.volume_name)),
        ("snapshot uid", snapshot.snapshot_uid.clone()),
        ("volume uid", snapshot.volume_uid.clone()),
        ("group uid", snapshot.group_uid.clone()),
        ("size", format!("{} ({} bytes)", human_size(disk_bytes_of(&snapshot)), disk_bytes_of(&snapshot))),
        ("used", human_size(snapshot.allocated_bytes)),
        ("exclusive", snapshot.exclusive_bytes.map_or_else(|| "-".to_owned(), human_size)),
        ("block size", snapshot.block_size_bytes.to_string()),
        ("state", state_word(snapshot.state()).to_owned()),
        ("frozen", if snapshot.frozen { "yes" } else { "no" }.to_owned()),
        ("encrypted", if snapshot.is_encrypted { "yes" } else { "no" }.to_owned()),
        ("created", utc(snapshot.created_at_ms)),
    ];
    let mut text = properties(rows.clone());
    rows.push(("content", content_word(snapshot.content()).replace('_', "-")));
    let mut wide = properties(rows);
    if !snapshot.attachments.is_empty() {
        let attachments = attachment_tables(&snapshot.attachments);
        text += &format!("\n{}", attachments.text);
        wide += &format!("\n{}", attachments.wide);
    }
    let mut json = snapshot_json(&snapshot);
    json["exclusive_bytes"] = snapshot.exclusive_bytes.into();
    Ok(Report::new(text, json).with_wide(wide))
}

async fn delete(server: &ServerAddress, named: Named) -> Result<Report, Failure> {
    let name = named.text();
    let Named { volume_name, name: snapshot_name, snapshot_uid } = named;
    let request =
        v1::DeleteSnapshotRequest { volume_name, name: snapshot_name, snapshot_uid, ..Default::default() };
    let client = connect::server(server).await?;
    let deleted =
        once(&client, request, |mut client, request| async move { client.delete_snapshot(request).await })
            .await?;
    let existed = deleted.existed;
    let text = if existed { format!("deleted {name}\n") } else { format!("there is no snapshot {name}\n") };
    Ok(Report::new(text, json!({ "name": name, "existed": existed })))
}

async fn restore(server: &ServerAddress, volume: String, name: String) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let request = v1::RestoreVolumeRequest {
        volume_name: volume.clone(),
        snapshot_name: name.clone(),
        ..Default::default()
    };
    let answer = call(client.restore_volume(identified(request))).await?;
    let mut restored = answer.volume.ok_or_else(|| Failure::incomplete_answer("volume"))?;
    if let Some(operation) = answer.operation {
        finish(&mut client, operation).await?;
        restored =
            call(client.get_volume(v1::GetVolumeRequest { name: volume, ..Default::default() })).await?;
    }
    Ok(Report::new(format!("restored {} from {name}\n", restored.name), volume_json(&restored)))
}

pub(crate) async fn clone(server: &ServerAddress, args: CloneArgs) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let source = Named::of_source(args.source)?
        .unwrap_or_else(|volume_name| Named { volume_name, ..Named::default() });
    let size = match args.size {
        Some(size) => size.saturating_add(header_bytes(is_encrypted(&mut client, &source).await?)),
        // The source's.
        None => 0,
    };
    let request = v1::CloneVolumeRequest {
        name: args.name,
        source_volume_name: source.volume_name,
        source_snapshot_name: source.name,
        source_snapshot_uid: source.snapshot_uid,
        capacity_bytes: size,
        ..Default::default()
    };
    let volume = clone_to_its_end(&mut client, request).await?;
    let text = format!("volume {} of {}\n", volume.name, human_size(disk_bytes(&volume)));
    Ok(Report::new(text, volume_json(&volume)))
}

/// How large a snapshot's disk is: of an encrypted one without the header.
fn disk_bytes_of(snapshot: &v1::Snapshot) -> u64 {
    snapshot.capacity_bytes.saturating_sub(header_bytes(snapshot.is_encrypted))
}

/// Whether what is to be cloned is encrypted, and so is its clone.
async fn is_encrypted(client: &mut ManagementClient<Channel>, source: &Named) -> Result<bool, Failure> {
    let Named { volume_name, name, snapshot_uid } = source.clone();
    if name.is_empty() && snapshot_uid.is_empty() {
        let volume =
            call(client.get_volume(v1::GetVolumeRequest { name: volume_name, ..Default::default() })).await?;
        return Ok(volume.is_encrypted);
    }
    let request = v1::GetSnapshotRequest { volume_name, name, snapshot_uid, ..Default::default() };
    Ok(call(client.get_snapshot(request)).await?.is_encrypted)
}

/// The clone, when it is there.
pub(crate) async fn clone_to_its_end(
    client: &mut ManagementClient<Channel>,
    request: v1::CloneVolumeRequest,
) -> Result<v1::Volume, Failure> {
    let name = request.name.clone();
    let answer =
        once(client, request, |mut client, request| async move { client.clone_volume(request).await })
            .await?;
    match (answer.volume, answer.operation) {
        (_, Some(operation)) => {
            finish(client, operation).await?;
            call(client.get_volume(v1::GetVolumeRequest { name, ..Default::default() })).await
        }
        (Some(volume), None) => Ok(volume),
        (None, None) => Err(Failure::incomplete_answer("volume")),
    }
}

/// A snapshot, `VOLUME@NAME` or `@UID`.
pub(crate) async fn find(
    client: &mut ManagementClient<Channel>,
    snapshot: &str,
) -> Result<v1::Snapshot, Failure> {
    let Named { volume_name, name, snapshot_uid } = Named::of(snapshot.to_owned(), None)?;
    let request = v1::GetSnapshotRequest { volume_name, name, snapshot_uid, ..Default::default() };
    call(client.get_snapshot(request)).await
}

/// A volume with the bytes of a snapshot, `VOLUME@NAME` or `@UID`; the same each time, until it is deleted.
pub(crate) async fn temporary_clone(
    client: &mut ManagementClient<Channel>,
    snapshot: &str,
) -> Result<v1::Volume, Failure> {
    let snapshot = find(client, snapshot).await?;
    let name = format!("{EXPORT_PREFIX}{}", snapshot.snapshot_uid);
    let request = v1::CloneVolumeRequest {
        name: name.clone(),
        source_snapshot_uid: snapshot.snapshot_uid.clone(),
        description: format!("for an export of snapshot {}", export_name(&snapshot)),
        ..Default::default()
    };
    let answer =
        once(client, request, |mut client, request| async move { client.clone_volume(request).await })
            .await?;
    if let Some(operation) = answer.operation {
        finish(client, operation).await?;
    }
    call(client.get_volume(v1::GetVolumeRequest { name, ..Default::default() })).await
}

/// Whether it is what [`temporary_clone`] makes, and not one that somebody has named like that.
pub(crate) fn is_temporary_clone(volume: &v1::Volume) -> bool {
    let source_uid = volume.name.strip_prefix(EXPORT_PREFIX);
    source_uid.is_some_and(|source_uid| !source_uid.is_empty() && source_uid == volume.source_uid)
}

/// Waits for the end of an operation, with a bar on a terminal. A volctl that is interrupted leaves it going on.
pub(crate) async fn finish(
    client: &mut ManagementClient<Channel>,
    mut operation: v1::Operation,
) -> Result<(), Failure> {
    let bar = progress_bar(&operation);
    let ended = loop {
        bar.set_length(operation.total_bytes);
        bar.set_position(operation.done_bytes);
        if operation.state() != v1::OperationState::Running {
            break Ok(operation);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
        let request = v1::GetOperationRequest { operation_id: operation.operation_id.clone() };
        match call(client.get_operation(request)).await {
            Ok(told) => operation = told,
            Err(failure) => break Err(failure),
        }
    };
    bar.finish_and_clear();
    match ended {
        Ok(operation) => outcome(operation),
        Err(failure) if failure.reason == reason::OPERATION_NOT_FOUND => Err(Failure::new(
            ExitCode::Unreachable,
            "the server was restarted meanwhile, and has undone what was not finished",
            "repeat the command",
        )),
        Err(failure) => Err(failure),
    }
}

fn outcome(operation: v1::Operation) -> Result<(), Failure> {
    let (what, next, code) = match operation.state() {
        v1::OperationState::Succeeded => return Ok(()),
        v1::OperationState::Cancelled => (
            format!("the {} operation was cancelled", operation.kind),
            "repeat the command to begin it anew".to_owned(),
            Code::Aborted,
        ),
        _ => {
            let code = match operation.error_reason.as_str() {
                reason::NO_SPACE | reason::SNAPSHOT_RESERVE => Code::ResourceExhausted,
                reason::SNAPSHOTS_UNSUPPORTED | reason::STORAGE_NOT_READY => Code::FailedPrecondition,
                reason::SOURCE_LOST_WRITES => Code::Aborted,
                reason::COPY_BUSY | reason::CATALOG_HELD => Code::Unavailable,
                _ => Code::Internal,
            };
            let what = format!("the {} operation failed: {}", operation.kind, operation.error_message);
            let advice = match operation.next.as_str() {
                "" => "mend what it says, then repeat the command",
                next => next,
            };
            (what, format!("nothing is left of it; {advice}"), code)
        }
    };
    Err(Failure {
        reason: operation.error_reason.clone(),
        ..Failure::new(ExitCode::of(code, &operation.error_reason), what, next)
    })
}

/// Shown on stderr while a copy goes on, if that is a terminal.
fn progress_bar(operation: &v1::Operation) -> ProgressBar {
    let message = format!("{} {}", operation.kind, operation.targets.join(", "));
    let bar = ProgressBar::new(operation.total_bytes).with_message(message);
    match ProgressStyle::with_template("{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// `VOLUME@NAME`; of one that was kept `@UID`.
pub(crate) fn export_name(snapshot: &v1::Snapshot) -> String {
    match snapshot.volume_name.as_str() {
        "" => format!("@{}", snapshot.snapshot_uid),
        volume_name => format!("{volume_name}@{}", snapshot.name),
    }
}

/// A snapshot, as JSON.
fn snapshot_json(snapshot: &v1::Snapshot) -> Value {
    json!({
        "name": snapshot.name,
        "snapshot_uid": snapshot.snapshot_uid,
        "volume_name": snapshot.volume_name,
        "volume_uid": snapshot.volume_uid,
        "capacity_bytes": snapshot.capacity_bytes,
        "block_size_bytes": snapshot.block_size_bytes,
        "state": state_word(snapshot.state()),
        "created_at_ms": snapshot.created_at_ms,
        "group_uid": snapshot.group_uid,
        "allocated_bytes": snapshot.allocated_bytes,
        "frozen": snapshot.frozen,
        "is_encrypted": snapshot.is_encrypted,
        "attachments": snapshot.attachments.iter().map(attachment_json).collect::<Vec<_>>(),
    })
}

/// `creating` or `ready`.
fn state_word(state: v1::SnapshotState) -> &'static str {
    match state {
        v1::SnapshotState::Unspecified => "unknown",
        v1::SnapshotState::Creating => "creating",
        v1::SnapshotState::Ready => "ready",
    }
}

/// `2026-03-01T12:00:00Z`, of milliseconds since the Unix epoch (days to a date: Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms").
pub(crate) fn utc(since_epoch_ms: i64) -> String {
    let seconds = since_epoch_ms.div_euclid(1000);
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_named_in_one_way_at_a_time() {
        let named = |volume: &str, name: Option<&str>| {
            Named::of(volume.to_owned(), name.map(str::to_owned)).map(|named| named.text())
        };
        assert_eq!(named("v", Some("s")).unwrap(), "v@s");
        assert_eq!(named("v@s", None).unwrap(), "v@s");
        let uid = Named::of("@7".to_owned(), None).unwrap();
        assert_eq!((uid.snapshot_uid.as_str(), uid.text().as_str()), ("7", "@7"));
        assert_eq!(named("v", None).unwrap_err().exit_code, ExitCode::Usage);
        assert_eq!(named("@7", Some("s")).unwrap_err().exit_code, ExitCode::Usage);
    }

    #[test]
    fn a_clone_for_an_export_is_known_by_its_source_too() {
        let is_clone = |name: &str, source_uid: &str| {
            let (name, source_uid) = (name.to_owned(), source_uid.to_owned());
            is_temporary_clone(&v1::Volume { name, source_uid, ..Default::default() })
        };
        assert!(is_clone("volctl-export-7", "7"));
        assert!(!is_clone("volctl-export-7", ""), "a volume of that name");
        assert!(!is_clone("volctl-export-7", "8") && !is_clone("volctl-export-", "") && !is_clone("v", "7"));
    }

    #[test]
    fn times_are_told_in_utc() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400_000), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_772_366_399_999), "2026-03-01T11:59:59Z");
        assert_eq!(utc(-1), "1969-12-31T23:59:59Z");
    }

    #[test]
    fn an_operation_that_failed_ends_with_the_code_of_its_reason() {
        let failed = |state: v1::OperationState, reason: &str| {
            let error_reason = reason.to_owned();
            let operation = v1::Operation { state: state.into(), error_reason, ..Default::default() };
            outcome(operation).unwrap_err().exit_code
        };
        assert_eq!(failed(v1::OperationState::Failed, reason::NO_SPACE), ExitCode::NoSpace);
        assert_eq!(failed(v1::OperationState::Failed, reason::SERVER_FAILED), ExitCode::Other);
        assert_eq!(failed(v1::OperationState::Cancelled, reason::COPY_CANCELLED), ExitCode::Precondition);
        let done = v1::Operation { state: v1::OperationState::Succeeded.into(), ..Default::default() };
        assert!(outcome(done).is_ok());
    }
}
