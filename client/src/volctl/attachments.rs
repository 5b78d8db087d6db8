//! `attach`, `detach`, `attachments`: the disks of this machine.

use std::path::Path;
use std::time::{Duration, Instant};

use client::node::target::Target;
use futures_util::future::join_all;
use indicatif::ProgressBar;
use proto::error_reason as reason;
use proto::v1;
use proto::v1::node_client::NodeClient;
use serde_json::json;
use tonic::transport::Channel;

use crate::cli::{Access, AttachArgs, OnStall, SendZcArg, StallArgs};
use crate::connect::{self, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::{Report, Tables, node_attachment_json, or_dash, stall_word, state_word, tables};
use crate::size::human_size;

/// Between two tries to attach.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// A frame of the spinner.
const SPINNER_INTERVAL: Duration = Duration::from_millis(100);
/// Of `--on-stall fail`; long enough for a server to be restarted.
const FAIL_AFTER_DEFAULT: Duration = Duration::from_secs(30);

/// Prints the device path and nothing else on stdout, so that a script can use it.
pub(crate) async fn attach(socket: &Path, args: AttachArgs) -> Result<Report, Failure> {
    let is_snapshot = matches!(Target::parse(&args.target), Ok(Target::Snapshot(_)));
    if is_snapshot && matches!(args.access, Some(Access::Writer | Access::MultiWriter)) {
        return Err(Failure::new(
            ExitCode::Usage,
            format!("{} is a snapshot, which nobody writes to", args.target),
            "leave --access away; or clone it and attach the clone (volctl clone)",
        ));
    }
    let passphrase = args.passphrase.read()?;
    let is_encrypted = passphrase.is_some();
    let mut client = connect::node(socket).await?;
    let spinner = spinner(format!("attaching {}", args.target));
    let request = v1::AttachRequest {
        target: args.target.clone(),
        data_path: args.data_path.as_str().to_owned(),
        read_only: args.is_read_only(),
        shared: matches!(args.access, Some(Access::MultiReader | Access::MultiWriter)),
        nr_hw_queues: args.queues.unwrap_or_default(),
        nr_connections: args.connections.unwrap_or_default(),
        queue_depth: args.queue_depth.unwrap_or_default(),
        busy_poll_us: args.busy_poll,
        // For a node daemon that knows no modes.
        send_zc: args.send_zc == SendZcArg::On,
        send_zc_mode: send_zc_mode(args.send_zc).into(),
        force: args.force,
        on_stall: stall_action(args.stall).into(),
        stall_fail_after_ms: stall_fail_after_ms(args.stall),
        only_if_granted: args.only_if_granted,
        passphrase,
        keep_initialising: false,
    };
    let give_up = Instant::now() + args.retry_for.unwrap_or_default();
    let answer = loop {
        match call(client.attach(request.clone())).await {
            // After a power cut the server may take this machine's former boot for alive, until its connections time out.
            Err(failure)
                if (failure.exit_code == ExitCode::Unreachable || failure.reason == reason::OTHER_BOOT)
                    && Instant::now() < give_up =>
            {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            answer => break answer,
        }
    };
    spinner.finish_and_clear();
    let attachment = answer?.attachment.ok_or_else(|| Failure::incomplete_answer("attachment"))?;
    if args.only_if_granted && !attachment.only_if_granted {
        return Err(Failure::new(
            ExitCode::Other,
            format!(
                "{} is attached, but no grant was asked for: the node daemon is of a version that knows none",
                args.target
            ),
            "detach it, upgrade volclient, and attach it again",
        ));
    }
    if is_encrypted && attachment.clear_device_path.is_empty() {
        return Err(Failure::new(
            ExitCode::Other,
            format!(
                "{} is attached, and not encrypted: the node daemon or the storage server is of a version that knows no encryption",
                args.target
            ),
            "detach it, upgrade volclient and volserver, and attach it again",
        ));
    }
    let report = Report::new(format!("{}\n", used_path(&attachment)), node_attachment_json(&attachment));
    Ok(report.with_note(tail_note(&attachment)))
}

/// The disk that is used: of an encrypted volume the clear one.
fn used_path(attachment: &v1::NodeAttachment) -> &str {
    match attachment.clear_device_path.as_str() {
        "" => &attachment.device_path,
        clear => clear,
    }
}

/// What of the export the disk has not, if anything.
fn tail_note(attachment: &v1::NodeAttachment) -> String {
    match attachment.tail_bytes {
        0 => String::new(),
        tail_bytes => format!(
            "volctl: the last {tail_bytes} bytes of {} are no whole block of {} bytes, and not on the disk\n  next: make the export \
             larger by {} bytes, or have its server allow smaller blocks\n",
            attachment.target,
            attachment.block_size_bytes,
            u64::from(attachment.block_size_bytes).saturating_sub(tail_bytes)
        ),
    }
}

/// One disk, or all of them.
pub(crate) async fn detach(socket: &Path, target: Option<String>, force: bool) -> Result<Report, Failure> {
    let client = connect::node(socket).await?;
    for_each(client, target, "detaching", async move |mut client, target| {
        let answer = call(client.detach(v1::DetachRequest { target: target.clone(), force })).await?;
        let existed = answer.existed;
        let text =
            if existed { format!("detached {target}\n") } else { format!("{target} is not attached\n") };
        Ok(Report::new(text, json!({ "target": target, "existed": existed })))
    })
    .await
}

/// Of one disk, or of all of them.
pub(crate) async fn set_policy(
    socket: &Path,
    target: Option<String>,
    stall: StallArgs,
) -> Result<Report, Failure> {
    let client = connect::node(socket).await?;
    for_each(client, target, "telling", async move |mut client, target| {
        let request = v1::SetStallPolicyRequest {
            target: target.clone(),
            on_stall: stall_action(stall).into(),
            stall_fail_after_ms: stall_fail_after_ms(stall),
        };
        let answer = call(client.set_stall_policy(request)).await?;
        let attachment = answer.attachment.ok_or_else(|| Failure::incomplete_answer("attachment"))?;
        let text = match attachment.on_stall() {
            v1::StallAction::Fail => {
                let after = Duration::from_millis(attachment.stall_fail_after_ms);
                format!("{target}: I/O fails once an outage has lasted {after:?}\n")
            }
            _ => format!("{target}: I/O waits while the server cannot be reached\n"),
        };
        Ok(Report::new(text, node_attachment_json(&attachment)))
    })
    .await
}

/// Does the same to one disk, or to all of them at once, so that one that does not answer holds up no other.
async fn for_each(
    mut client: NodeClient<Channel>,
    target: Option<String>,
    doing: &str,
    work: impl AsyncFn(NodeClient<Channel>, String) -> Result<Report, Failure>,
) -> Result<Report, Failure> {
    if let Some(target) = target {
        let spinner = spinner(format!("{doing} {target}"));
        let outcome = work(client, target).await;
        spinner.finish_and_clear();
        return outcome;
    }
    let targets = all_targets(&mut client).await?;
    let spinner = spinner(format!("{doing} {} disks", targets.len()));
    let outcomes = join_all(targets.into_iter().map(|target| work(client.clone(), target))).await;
    spinner.finish_and_clear();
    let (mut text, mut json, mut failures) = (String::new(), Vec::new(), Vec::new());
    for outcome in outcomes {
        match outcome {
            Ok(report) => {
                text += &report.text;
                json.push(report.json);
            }
            Err(failure) => failures.push(failure),
        }
    }
    match failures.split_first() {
        None => Ok(Report::new(text, json.into())),
        Some((first, others)) => {
            let what =
                others.iter().fold(first.what.clone(), |what, other| format!("{what}; {}", other.what));
            Err(Failure::new(first.exit_code, what, first.next.clone()))
        }
    }
}

async fn all_targets(client: &mut NodeClient<Channel>) -> Result<Vec<String>, Failure> {
    let listed = call(client.list_node_attachments(v1::ListNodeAttachmentsRequest {})).await?;
    Ok(listed.attachments.into_iter().map(|attachment| attachment.target).collect())
}

/// One disk, or all of them.
pub(crate) async fn upgrade(socket: &Path, target: Option<String>) -> Result<Report, Failure> {
    let mut client = connect::node(socket).await?;
    let targets = match target {
        Some(target) => vec![target],
        None => all_targets(&mut client).await?,
    };
    let (mut text, mut json) = (String::new(), Vec::new());
    for target in targets {
        let spinner = spinner(format!("upgrading {target}"));
        let answer = call(client.upgrade(v1::UpgradeRequest { target: target.clone() })).await;
        spinner.finish_and_clear();
        let answer = answer?;
        let attachment = answer.attachment.ok_or_else(|| Failure::incomplete_answer("attachment"))?;
        let (from, to) = (&answer.from_version, &attachment.program_version);
        text +=
            &format!("upgraded {target} from {from} to {to}: I/O stood still for {} ms\n", answer.stall_ms);
        json.push(
            json!({ "target": target, "from_version": from, "to_version": to, "stall_ms": answer.stall_ms }),
        );
    }
    Ok(Report::new(text, json.into()))
}

fn send_zc_mode(send_zc: SendZcArg) -> v1::SendZcMode {
    match send_zc {
        SendZcArg::Auto => v1::SendZcMode::Auto,
        SendZcArg::On => v1::SendZcMode::On,
        SendZcArg::Off => v1::SendZcMode::Off,
    }
}

fn stall_action(stall: StallArgs) -> v1::StallAction {
    match stall.on_stall {
        None => v1::StallAction::Unspecified,
        Some(OnStall::Wait) => v1::StallAction::Wait,
        Some(OnStall::Fail) => v1::StallAction::Fail,
    }
}

fn stall_fail_after_ms(stall: StallArgs) -> u64 {
    match stall.on_stall {
        Some(OnStall::Fail) => {
            let after = stall.after.unwrap_or(FAIL_AFTER_DEFAULT);
            u64::try_from(after.as_millis()).unwrap_or(u64::MAX)
        }
        Some(OnStall::Wait) | None => 0,
    }
}

pub(crate) async fn list(socket: &Path) -> Result<Report, Failure> {
    let request = v1::ListNodeAttachmentsRequest {};
    let attachments = call(connect::node(socket).await?.list_node_attachments(request)).await?.attachments;
    let tables = node_attachment_tables(&attachments);
    Ok(Report::of_tables(tables, attachments.iter().map(node_attachment_json).collect()))
}

fn node_attachment_tables(attachments: &[v1::NodeAttachment]) -> Tables {
    let rows = attachments.iter().map(|attachment| {
        let state = match attachment.state_reason.as_str() {
            "" => state_word(attachment.state()).to_owned(),
            reason => format!("{} ({reason})", state_word(attachment.state())),
        };
        let row = [
            attachment.target.clone(),
            or_dash(used_path(attachment)),
            human_size(attachment.capacity_bytes),
            if attachment.read_only { "ro" } else { "rw" }.to_owned(),
            or_dash(&attachment.data_path),
            attachment.nr_hw_queues.to_string(),
            attachment.nr_connections.to_string(),
            attachment.queue_depth.to_string(),
            or_dash(&attachment.server_address),
            state,
        ];
        let on_stall = match attachment.on_stall() {
            v1::StallAction::Fail => {
                format!("fail after {:?}", Duration::from_millis(attachment.stall_fail_after_ms))
            }
            action => stall_word(action).to_owned(),
        };
        let further = [
            or_dash(&attachment.attachment_id),
            or_dash(&attachment.device_link),
            attachment.block_size_bytes.to_string(),
            or_dash(&attachment.encryption),
            attachment.pid.to_string(),
            on_stall,
            attachment.reconnects.to_string(),
            or_dash(&attachment.program_version),
        ];
        (row, further)
    });
    tables(
        [
            "TARGET",
            "DEVICE",
            "SIZE",
            "MODE",
            "DATA-PATH",
            "QUEUES",
            "CONNECTIONS",
            "DEPTH",
            "SERVER",
            "STATE",
        ],
        ["ID", "LINK", "BLOCK", "ENCRYPTION", "PID", "ON-STALL", "RECONNECTS", "VERSION"],
        rows,
    )
}

/// Shown on stderr while something takes its time, if that is a terminal.
fn spinner(message: String) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(SPINNER_INTERVAL);
    spinner
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_that_is_not_on_the_disk_is_told_with_its_size_and_what_to_do() {
        let whole =
            v1::NodeAttachment { target: "nbd://h/iso".into(), block_size_bytes: 4096, ..Default::default() };
        assert_eq!(tail_note(&whole), "");
        let told = tail_note(&v1::NodeAttachment { tail_bytes: 2000, ..whole });
        assert!(
            told.contains("last 2000 bytes of nbd://h/iso") && told.contains("larger by 2096 bytes"),
            "{told}"
        );
    }
}
