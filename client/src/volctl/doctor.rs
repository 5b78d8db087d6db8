//! `doctor` and `version`: what is there, and what stands in the way of an attachment.
//!
//! Every check is made, whatever the others found; the exit code is that of the first that failed. The checks are in
//! the order in which one would mend things: this machine, then the node daemon, then the storage server.

use std::path::Path;

use client::causes::with_sources;
use proto::v1;
use serde_json::{Value, json};
use ublk_core::data_path::Rung;
use ublk_core::{ControlDevice, ControlError, DataPath};

use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::{Report, properties};

/// One line of the doctor: what was looked at, and what was found.
#[derive(Debug)]
struct Check {
    name: &'static str,
    outcome: Result<String, Failure>,
    /// Lines below it: every data path, best first.
    data_paths: Vec<DataPathFound>,
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
        Check::new("storage server", check_server(server).await),
    ];
    let exit_code =
        checks.iter().find_map(|check| check.outcome.as_ref().err()).map(|failure| failure.exit_code);
    Report {
        text: checks.iter().map(Check::text).collect(),
        json: checks.iter().map(Check::json).collect(),
        exit_code: exit_code.unwrap_or(ExitCode::Done),
        note: String::new(),
        is_printed: false,
    }
}

impl Check {
    fn new(name: &'static str, outcome: Result<String, Failure>) -> Self {
        Self { name, outcome, data_paths: Vec::new() }
    }

    fn text(&self) -> String {
        let Self { name, outcome, data_paths } = self;
        let mut text = match outcome {
            Ok(found) => format!("ok    {name}: {found}\n"),
            Err(Failure { what, next, .. }) if next.is_empty() => format!("FAIL  {name}: {what}\n"),
            Err(Failure { what, next, .. }) => format!("FAIL  {name}: {what}\n      next: {next}\n"),
        };
        for DataPathFound { data_path, why_not } in data_paths {
            let found = if why_not.is_empty() { "yes".to_owned() } else { format!("no: {why_not}") };
            text.push_str(&format!("      {:<10}  {found}\n", data_path.as_str()));
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
        told
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
    Check { name, outcome, data_paths: report.rungs.iter().map(found).collect() }
}

async fn check_node(socket: &Path) -> Result<String, Failure> {
    let info = node_info(socket).await?;
    Ok(format!(
        "version {} at {}, node {}, server {}",
        info.version,
        socket.display(),
        info.node_id,
        info.server
    ))
}

async fn check_server(server: &ServerAddress) -> Result<String, Failure> {
    let info = server_info(server).await?;
    Ok(format!("version {} at {}, data at {}", info.version, server.uri, info.data_addresses.join(", ")))
}

async fn node_info(socket: &Path) -> Result<v1::GetNodeInfoResponse, Failure> {
    call(connect::node(socket).await?.get_node_info(v1::GetNodeInfoRequest {})).await
}

async fn server_info(server: &ServerAddress) -> Result<v1::GetServerInfoResponse, Failure> {
    call(connect::server(server).await?.get_server_info(v1::GetServerInfoRequest {})).await
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
