//! `attach`, `detach`, `attachments`: the disks of this machine.

use std::path::Path;
use std::time::Duration;

use indicatif::ProgressBar;
use proto::v1;
use serde_json::json;

use crate::cli::AttachArgs;
use crate::connect::{self, call};
use crate::failure::Failure;
use crate::report::{Report, node_attachment_json, state_word, table};
use crate::size::human_size;

/// A frame of the spinner.
const SPINNER_INTERVAL: Duration = Duration::from_millis(100);

/// Prints the device path and nothing else, so that a script can use it.
pub(crate) async fn attach(socket: &Path, args: AttachArgs) -> Result<Report, Failure> {
    let mut client = connect::node(socket).await?;
    let spinner = spinner(format!("attaching {}", args.target));
    let request = v1::AttachRequest {
        target: args.target,
        data_path: args.data_path.as_str().to_owned(),
        read_only: args.read_only,
        nr_hw_queues: args.queues.unwrap_or_default(),
        nr_connections: args.connections.unwrap_or_default(),
        queue_depth: args.queue_depth.unwrap_or_default(),
        force: args.force,
    };
    let answer = call(client.attach(request)).await;
    spinner.finish_and_clear();
    let attachment = answer?.attachment.ok_or_else(|| Failure::incomplete_answer("attachment"))?;
    Ok(Report::new(format!("{}\n", attachment.device_path), node_attachment_json(&attachment)))
}

pub(crate) async fn detach(socket: &Path, target: String) -> Result<Report, Failure> {
    let mut client = connect::node(socket).await?;
    let spinner = spinner(format!("detaching {target}"));
    let answer = call(client.detach(v1::DetachRequest { target: target.clone() })).await;
    spinner.finish_and_clear();
    let existed = answer?.existed;
    let text = if existed { format!("detached {target}\n") } else { format!("{target} is not attached\n") };
    Ok(Report::new(text, json!({ "target": target, "existed": existed })))
}

pub(crate) async fn list(socket: &Path) -> Result<Report, Failure> {
    let request = v1::ListNodeAttachmentsRequest {};
    let attachments = call(connect::node(socket).await?.list_node_attachments(request)).await?.attachments;
    let rows = attachments.iter().map(|attachment| {
        let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let state = match attachment.state_reason.as_str() {
            "" => state_word(attachment.state()).to_owned(),
            reason => format!("{} ({reason})", state_word(attachment.state())),
        };
        [
            attachment.target.clone(),
            or_dash(&attachment.device_path),
            human_size(attachment.capacity_bytes),
            if attachment.read_only { "ro" } else { "rw" }.to_owned(),
            or_dash(&attachment.data_path),
            attachment.nr_hw_queues.to_string(),
            attachment.nr_connections.to_string(),
            attachment.queue_depth.to_string(),
            or_dash(&attachment.server_address),
            state,
        ]
    });
    let text = table(
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
        rows,
    );
    Ok(Report::new(text, attachments.iter().map(node_attachment_json).collect()))
}

/// Shown on stderr while something takes its time, if that is a terminal.
fn spinner(message: String) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(SPINNER_INTERVAL);
    spinner
}
