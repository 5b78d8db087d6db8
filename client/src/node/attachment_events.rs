//! What happens to the attachments of this node, for whoever watches.
//!
//! Owns: what a watcher was told last, and so what is new to it. Never: keeps anything while nobody watches; state files are the
//! only truth, and a watcher has them looked at several times a second. What comes and goes in between two looks shows in
//! counters. Called by: `node_service`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use proto::v1::{AttachmentEvent, AttachmentEventKind as Kind, NodeAttachment};
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::attachment_record::AttachmentRecord;
use crate::contract::now_ms;

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Events that may wait for a watcher that does not read; then nothing is looked at until it does.
const WAITING_EVENTS: usize = 64;

/// A watcher's stream.
pub(super) type Events = mpsc::Receiver<Result<AttachmentEvent, Status>>;

/// Watches until the stream is dropped, or the daemon ends: a watcher must not hold that up, and is told.
pub(super) fn watch(run_dir: PathBuf, mut ended: watch::Receiver<bool>) -> Events {
    let (sender, events) = mpsc::channel(WAITING_EVENTS);
    tokio::spawn(async move {
        let mut told = Told::default();
        loop {
            let news = match AttachmentRecord::read_all(&run_dir) {
                Ok(records) => told.news(records.iter().map(AttachmentRecord::to_proto).collect()),
                Err(error) => return drop(sender.send(Err(error.into())).await),
            };
            for (kind, attachment) in news {
                let event = AttachmentEvent { time_ms: now_ms(), kind: kind.into(), attachment };
                tokio::select! {
                    sent = sender.send(Ok(event)) => if sent.is_err() { return },
                    // For one that does not read, there is no room to be told.
                    _ = ended.wait_for(|is_ending| *is_ending) => return,
                }
            }
            tokio::select! {
                () = sender.closed() => return,
                _ = ended.wait_for(|is_ending| *is_ending) => {
                    return drop(sender.try_send(Err(Status::unavailable("the node daemon ends"))));
                }
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
        }
    });
    events
}

/// What a watcher knows.
#[derive(Debug, Default)]
struct Told {
    /// By attachment id.
    attachments: BTreeMap<String, NodeAttachment>,
    is_synced: bool,
}

impl Told {
    /// What is new to it if this is how things are.
    fn news(&mut self, now: Vec<NodeAttachment>) -> Vec<(Kind, Option<NodeAttachment>)> {
        let mut news = Vec::new();
        let now: BTreeMap<String, NodeAttachment> =
            now.into_iter().map(|attachment| (attachment.attachment_id.clone(), attachment)).collect();
        for (id, before) in &self.attachments {
            if !now.contains_key(id) {
                news.push((Kind::Detached, Some(before.clone())));
            }
        }
        for (id, attachment) in &now {
            let kinds = match self.attachments.get(id) {
                None if self.is_synced => vec![Kind::Attached],
                None => vec![Kind::Present],
                Some(before) => differences(before, attachment),
            };
            news.extend(kinds.into_iter().map(|kind| (kind, Some(attachment.clone()))));
        }
        if !self.is_synced {
            self.is_synced = true;
            news.push((Kind::Synced, None));
        }
        self.attachments = now;
        news
    }
}

fn differences(before: &NodeAttachment, now: &NodeAttachment) -> Vec<Kind> {
    let mut kinds = Vec::new();
    if before.pid != now.pid && before.pid != 0 && now.pid != 0 {
        kinds.push(Kind::ProcessReplaced);
    }
    if before.pid == now.pid && before.reconnects < now.reconnects {
        kinds.push(Kind::Reconnected);
    }
    if (before.state, &before.state_reason) != (now.state, &now.state_reason) {
        kinds.push(Kind::State);
    }
    kinds
}

#[cfg(test)]
mod tests {
    use proto::v1::DeviceState;

    use super::*;

    fn attachment(id: &str, change: impl FnOnce(&mut NodeAttachment)) -> NodeAttachment {
        let mut attachment = NodeAttachment {
            attachment_id: id.to_owned(),
            state: DeviceState::Live.into(),
            pid: 7,
            ..Default::default()
        };
        change(&mut attachment);
        attachment
    }

    fn kinds(news: Vec<(Kind, Option<NodeAttachment>)>) -> Vec<(Kind, String)> {
        let id = |attachment: Option<NodeAttachment>| attachment.map(|a| a.attachment_id).unwrap_or_default();
        news.into_iter().map(|(kind, attachment)| (kind, id(attachment))).collect()
    }

    #[test]
    fn a_watch_begins_with_what_is_there() {
        let mut told = Told::default();
        let first = kinds(told.news(vec![attachment("a", |_| {})]));
        assert_eq!(first, [(Kind::Present, "a".into()), (Kind::Synced, String::new())]);
        assert_eq!(kinds(told.news(vec![attachment("a", |_| {})])), []);
        let both = vec![attachment("a", |_| {}), attachment("b", |_| {})];
        assert_eq!(kinds(told.news(both)), [(Kind::Attached, "b".into())]);
        assert_eq!(kinds(told.news(vec![attachment("b", |_| {})])), [(Kind::Detached, "a".into())]);
    }

    #[test]
    fn every_change_is_told_once() {
        let mut told = Told::default();
        told.news(vec![attachment("a", |_| {})]);
        let stalled = || attachment("a", |a| a.set_state(DeviceState::Stalled));
        assert_eq!(kinds(told.news(vec![stalled()])), [(Kind::State, "a".into())]);
        assert_eq!(kinds(told.news(vec![stalled()])), []);
        let back = attachment("a", |a| a.reconnects = 1);
        assert_eq!(
            kinds(told.news(vec![back])),
            [(Kind::Reconnected, "a".into()), (Kind::State, "a".into())]
        );
        let replaced = attachment("a", |a| a.pid = 8);
        assert_eq!(kinds(told.news(vec![replaced])), [(Kind::ProcessReplaced, "a".into())]);
    }
}
