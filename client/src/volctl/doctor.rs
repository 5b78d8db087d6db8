//! `doctor` and `version`: what is there, and what stands in the way of an attachment.
//!
//! Every check is made, whatever the others found; the exit code is that of the first that failed. The checks are in
//! the order in which one would mend things: this machine, then the node daemon, then the storage server.

use std::path::Path;

use client::causes::with_sources;
use client::mapper;
use client::node::target::Target;
use proto::v1;
use serde_json::{Value, json};
use ublk_core::data_path::Rung;
use ublk_core::{ControlDevice, ControlError, DataPath};

use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::{Report, properties};
use crate::size::human_size;

/// One line of the doctor: what was looked at, and what was found.
#[derive(Debug)]
struct Check {
    name: &'static str,
    outcome: Result<String, Failure>,
    /// Lines below it: every data path, best first.
    data_paths: Vec<DataPathFound>,
    /// Of the storage server: why it has no snapshots; empty if it has.
    why_no_snapshots: Option<String>,
    /// Of the storage server: how full its volumes' file system is.
    space: Option<v1::StorageSpace>,
}

/// A data path, and why it cannot be used; empty if it can.
#[derive(Debug)]
struct DataPathFound {
    data_path: DataPath,
    why_not: String,
}

pub(crate) async fn doctor(server: &ServerAddress, socket: &Path) -> Report {
    let control = ControlDevice::open();
    let checks = [
        Check::new("root", check_root()),
        Check::new("ublk driver", check_driver(&control)),
        check_data_paths(&control),
        Check::new("node daemon", check_node(socket).await),
        Check::new("encrypted disks", check_clear_disks(socket).await),
        check_server(server).await,
    ];
    let exit_code =
        checks.iter().find_map(|check| check.outcome.as_ref().err()).map(|failure| failure.exit_code);
    let text: String = checks.iter().map(Check::text).collect();
    let exit_code = exit_code.unwrap_or(ExitCode::Done);
    Report { exit_code, ..Report::new(text, checks.iter().map(Check::json).collect()) }
}

impl Check {
    fn new(name: &'static str, outcome: Result<String, Failure>) -> Self {
        Self { name, outcome, data_paths: Vec::new(), why_no_snapshots: None, space: None }
    }

    fn text(&self) -> String {
        let Self { name, outcome, data_paths, why_no_snapshots, space } = self;
        let mut text = match outcome {
            Ok(found) => format!("ok    {name}: {found}\n"),
            Err(Failure { what, next, .. }) if next.is_empty() => format!("FAIL  {name}: {what}\n"),
            Err(Failure { what, next, .. }) => format!("FAIL  {name}: {what}\n      next: {next}\n"),
        };
        let below = data_paths.iter().map(|found| (found.data_path.as_str(), &found.why_not));
        for (what, why_not) in below.chain(why_no_snapshots.iter().map(|why_not| ("snapshots", why_not))) {
            let found = if why_not.is_empty() { "yes".to_owned() } else { format!("no: {why_not}") };
            text.push_str(&format!("      {what:<10}  {found}\n"));
        }
        if let Some(space) = space {
            text.push_str(&format!("      {:<10}  {}\n", "space", space_text(space)));
        }
        text
    }

    fn json(&self) -> Value {
        let (detail, next) = match &self.outcome {
            Ok(found) => (found, ""),
            Err(failure) => (&failure.what, failure.next.as_str()),
        };
        let mut told =
            json!({ "check": self.name, "ok": self.outcome.is_ok(), "detail": detail, "next": next });
        if !self.data_paths.is_empty() {
            told["data_paths"] = self.data_paths.iter().map(DataPathFound::json).collect();
        }
        if let Some(why_not) = &self.why_no_snapshots {
            told["snapshots"] = json!({ "supported": why_not.is_empty(), "reason": why_not });
        }
        if let Some(space) = &self.space {
            told["storage_space"] = json!({
                "free_bytes": space.free_bytes,
                "total_bytes": space.total_bytes,
                "reserve_bytes": space.reserve_bytes,
                "level": space_word(space.level()),
            });
        }
        told
    }
}

/// `enough`, `low`, `below_reserve` or `full`.
fn space_word(level: v1::SpaceLevel) -> &'static str {
    match level {
        v1::SpaceLevel::Unspecified => "unknown",
        v1::SpaceLevel::Enough => "enough",
        v1::SpaceLevel::Low => "low",
        v1::SpaceLevel::BelowReserve => "below_reserve",
        v1::SpaceLevel::Full => "full",
    }
}

/// What is free, and where that is little, what it means and what to do.
fn space_text(space: &v1::StorageSpace) -> String {
    let (free, total) = (human_size(space.free_bytes), human_size(space.total_bytes));
    let next = "delete snapshots or volumes, or make the server's file system larger";
    match space.level() {
        v1::SpaceLevel::Unspecified | v1::SpaceLevel::Enough => format!("{free} free of {total}"),
        v1::SpaceLevel::Low => format!("{free} free of {total}: nearly full; {next}"),
        v1::SpaceLevel::BelowReserve => format!(
            "{free} free of {total}: less than the reserve of {}, new snapshots and clones are refused; {next}",
            human_size(space.reserve_bytes)
        ),
        v1::SpaceLevel::Full => format!("{free} free of {total}: full, writes to volumes fail; {next}"),
    }
}

impl DataPathFound {
    /// The names are those of the node API's `DataPathSupport`.
    fn json(&self) -> Value {
        let is_supported = self.why_not.is_empty();
        json!({ "data_path": self.data_path.as_str(), "supported": is_supported, "reason": self.why_not })
    }
}

fn check_root() -> Result<String, Failure> {
    let user_id = rustix::process::geteuid();
    if user_id.is_root() {
        return Ok("yes".to_owned());
    }
    let what = format!("running as user {}", user_id.as_raw());
    Err(Failure::new(ExitCode::MachineCannot, what, "run it as root (sudo volctl doctor)"))
}

fn check_driver(control: &Result<ControlDevice, ControlError>) -> Result<String, Failure> {
    let control = control.as_ref().map_err(driver_failure)?;
    match control.get_features() {
        Ok(features) => Ok(format!("features {features}")),
        Err(ControlError::Unsupported { .. }) => Ok("older than its feature query (Linux 6.5)".to_owned()),
        Err(error) => Err(driver_failure(&error)),
    }
}

fn driver_failure(error: &ControlError) -> Failure {
    match error {
        ControlError::NoDriver => Failure::new(
            ExitCode::MachineCannot,
            "/dev/ublk-control is missing",
            "load the driver with `modprobe ublk_drv`; it needs Linux 6.0 or later with CONFIG_BLK_DEV_UBLK \
             (Ubuntu: package linux-modules-extra)",
        ),
        ControlError::PermissionDenied { .. } => {
            Failure::new(ExitCode::MachineCannot, error.to_string(), "run it as root")
        }
        _ => Failure::new(ExitCode::MachineCannot, error.to_string(), "see the kernel's log (dmesg)"),
    }
}

fn check_data_paths(control: &Result<ControlDevice, ControlError>) -> Check {
    let name = "data paths";
    let report = match control.as_ref().map(ublk_core::probe_driver) {
        Ok(Ok(report)) => report,
        Ok(Err(error)) => return Check::new(name, Err(driver_failure(&error))),
        Err(_) => {
            let what = "none without the ublk driver";
            return Check::new(name, Err(Failure::new(ExitCode::MachineCannot, what, "see the line above")));
        }
    };
    let outcome = match report.best() {
        Some(best) => Ok(format!("an attachment gets {best} unless another is asked for")),
        None => {
            let next = "allow io_uring (kernel.io_uring_disabled, a container's seccomp profile)";
            Err(Failure::new(ExitCode::MachineCannot, "none can be used", next))
        }
    };
    let found = |rung: &Rung| {
        let why_not = rung.usable.as_ref().err().map_or_else(String::new, |error| with_sources(error));
        DataPathFound { data_path: rung.data_path, why_not }
    };
    Check { data_paths: report.rungs.iter().map(found).collect(), ..Check::new(name, outcome) }
}

async fn check_node(socket: &Path) -> Result<String, Failure> {
    let info = node_info(socket).await?;
    let request = v1::ListNodeAttachmentsRequest {};
    let disks = call(connect::node(socket).await?.list_node_attachments(request)).await?.attachments;
    let is_snapshot =
        |disk: &&v1::NodeAttachment| matches!(Target::parse(&disk.target), Ok(Target::Snapshot(_)));
    Ok(format!(
        "version {} at {}, node {}, server {}, {} disks, {} of them of snapshots",
        info.version,
        socket.display(),
        info.node_id,
        info.server,
        disks.len(),
        disks.iter().filter(is_snapshot).count()
    ))
}

/// A server without snapshots, or with little space, is as good for attachments.
async fn check_server(server: &ServerAddress) -> Check {
    let info = match server_info(server).await {
        Ok(info) => info,
        Err(failure) => return Check::new("storage server", Err(failure)),
    };
    let found =
        format!("version {} at {}, data at {}", info.version, server.uri, info.data_addresses.join(", "));
    let why_no_snapshots = Some(info.snapshots_unsupported_reason);
    Check { why_no_snapshots, space: info.storage_space, ..Check::new("storage server", Ok(found)) }
}

async fn node_info(socket: &Path) -> Result<v1::GetNodeInfoResponse, Failure> {
    call(connect::node(socket).await?.get_node_info(v1::GetNodeInfoRequest {})).await
}

async fn server_info(server: &ServerAddress) -> Result<v1::GetServerInfoResponse, Failure> {
    call(connect::server(server).await?.get_server_info(v1::GetServerInfoRequest {})).await
}

/// Whether every clear disk that is open is an attachment's. Without the node daemon nobody knows.
async fn check_clear_disks(socket: &Path) -> Result<String, Failure> {
    let open = mapper::all();
    if open.is_empty() {
        return Ok("none is open".to_owned());
    }
    let request = v1::ListNodeAttachmentsRequest {};
    let known = call(connect::node(socket).await?.list_node_attachments(request)).await?.attachments;
    let is_forgotten = |mapper: &&mapper::Mapper| {
        let id = mapper.attachment_id.to_string();
        known.iter().all(|attachment| attachment.attachment_id != id)
    };
    match open.iter().find(is_forgotten) {
        None => Ok(format!("{} open, each an attachment's", open.len())),
        Some(mapper) => Err(Failure::new(
            ExitCode::Precondition,
            format!("{} is open, and no attachment has it", mapper::path_of(mapper.attachment_id).display()),
            format!("close it: volctl detach {}", mapper.attachment_id),
        )),
    }
}

/// Prints what answers; a program that does not is told as such, and is no failure.
pub(crate) async fn version(server: &ServerAddress, socket: &Path) -> Report {
    let volctl = env!("CARGO_PKG_VERSION");
    let (volserver, volclient) = (server_info(server).await.ok(), node_info(socket).await.ok());
    let (volserver, volclient) = (volserver.map(|info| info.version), volclient.map(|info| info.version));
    let or_not = |version: &Option<String>, place: String| match version {
        Some(version) => format!("{version} ({place})"),
        None => format!("not reachable ({place})"),
    };
    let text = properties([
        ("volctl", volctl.to_owned()),
        ("volserver", or_not(&volserver, server.uri.clone())),
        ("volclient", or_not(&volclient, socket.display().to_string())),
    ]);
    Report::new(text, json!({ "volctl": volctl, "volserver": volserver, "volclient": volclient }))
}
