//! `events`: what happens to the disks of this machine, printed as it happens.

use std::io::{self, Write as _};
use std::path::Path;

use proto::v1;
use proto::v1::AttachmentEventKind as Kind;
use serde_json::json;

use crate::connect::{self, call};
use crate::failure::Failure;
use crate::output::OutputFormat;
use crate::report::{Report, node_attachment_json, state_word};

/// One line for each event, for people or one JSON object; or a document of YAML.
pub(crate) async fn events(socket: &Path, follow: bool, output: OutputFormat) -> Result<Report, Failure> {
    let mut client = connect::node(socket).await?;
    let mut stream = call(client.watch_attachments(v1::WatchAttachmentsRequest {})).await?;
    while let Some(event) = stream.message().await? {
        if event.kind() == Kind::Synced {
            if follow {
                continue;
            }
            break;
        }
        if !print(&line(&event, output)?)? {
            break;
        }
    }
    Ok(Report::new("", json!([])).printed())
}

fn line(event: &v1::AttachmentEvent, output: OutputFormat) -> Result<String, Failure> {
    let attachment = event.attachment.clone().unwrap_or_default();
    if !output.is_for_people() {
        return output.piece(&json!({
            "time_ms": event.time_ms,
            "kind": kind_word(event.kind()),
            "attachment": node_attachment_json(&attachment),
        }));
    }
    let reason = match attachment.state_reason.as_str() {
        "" => String::new(),
        reason => format!(" ({reason})"),
    };
    let (kind, state) = (kind_word(event.kind()), state_word(attachment.state()));
    Ok(format!("{} {} {kind}: {state}{reason}", event.time_ms, attachment.target))
}

/// Whether anybody reads it.
pub(crate) fn print(line: &str) -> Result<bool, Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::other(format!("cannot write an event: {error}"))),
    }
}

fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::Unspecified => "unknown",
        Kind::Present => "present",
        Kind::Synced => "synced",
        Kind::Attached => "attached",
        Kind::Detached => "detached",
        Kind::State => "state",
        Kind::Reconnected => "reconnected",
        Kind::ProcessReplaced => "process_replaced",
    }
}
