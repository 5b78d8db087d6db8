//! The call that tells what happens to volumes, attachments, snapshots, nodes and grants, whose answer is a stream.
//!
//! Owns how a watch begins: its fields, its token, its place among those that there may be; and how its stream ends. What has
//! happened is in the catalog (`catalog/changes/`), written by the change itself. Never: keeps the catalog from others for longer
//! than a page takes, or waits for a caller with anything but the caller's own task. Called by the service, which has looked at the
//! caller's rights.

mod covered;
mod events;
mod recent;
mod run;
mod token;

use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use futures_util::stream::unfold;
use proto::v1;
use tokio::sync::mpsc::{self, Receiver};
use tokio::sync::{Mutex, Semaphore, oneshot, watch};
use tokio::time::Instant;
use tonic::Status;

use super::ManagementService;
use super::fields::Fields;
use super::named::{UID_PREFIX, volume_within};
use crate::catalog::{ChangePoint, WatchedKind};
use crate::lifecycle::DataSide;
use crate::scope::Scope;
use crate::status;
use events::Wanted;
use recent::Recent;
use run::Watcher;
use token::{Token, TooOld};

/// Watches at once: each is a task with some events that wait.
const WATCHES_MAX: usize = 64;
/// Events that wait to be sent.
const EVENTS_WAITING: usize = 8;

/// The answer of Watch.
pub(super) type EventStream = Pin<Box<dyn Stream<Item = Result<v1::WatchEvent, Status>> + Send>>;

/// What all watches have in common.
#[derive(Debug, Clone)]
pub(super) struct Watches {
    places: Arc<Semaphore>,
    recent: Arc<Mutex<Recent>>,
    is_stopping: watch::Sender<bool>,
}

impl Default for Watches {
    fn default() -> Self {
        let places = Arc::new(Semaphore::new(WATCHES_MAX));
        Self { places, recent: Arc::default(), is_stopping: watch::Sender::new(false) }
    }
}

impl Watches {
    /// Has all of them end, and no other begin.
    pub(super) fn stop(&self) {
        self.places.close();
        self.is_stopping.send_replace(true);
    }
}

impl<D: DataSide> ManagementService<D> {
    pub(super) async fn begin_watch(
        &self,
        scope: Scope,
        request: v1::WatchRequest,
    ) -> Result<EventStream, Status> {
        let (kinds, volume, token) = wanted(request)?;
        let from = match token {
            Some(token) => Some(self.point_of(token).await?),
            None => None,
        };
        let volume_uid = match volume {
            Some(volume) => Some(self.uid_of_watched(scope.clone(), volume).await?),
            None => None,
        };
        let watches = &self.calls.watches;
        let place = Arc::clone(&watches.places).try_acquire_owned().map_err(|error| match error {
            tokio::sync::TryAcquireError::Closed => status::stopping(),
            tokio::sync::TryAcquireError::NoPermits => status::too_many_watches(WATCHES_MAX),
        })?;
        let (events, received) = mpsc::channel(EVENTS_WAITING);
        let (ended, end) = oneshot::channel();
        let watcher = Watcher {
            lifecycle: Arc::clone(&self.lifecycle),
            looks: Arc::clone(&self.calls.looks),
            recent: Arc::clone(&watches.recent),
            wanted: Wanted { scope, kinds, volume_uid },
            events,
            count: self.lifecycle.catalog().changes_count(),
            is_stopping: watches.is_stopping.subscribe(),
            told_at: Instant::now(),
            _place: place,
        };
        tokio::spawn(async move {
            if let Some(status) = watcher.run(from).await {
                // The caller may have gone just now.
                let _ = ended.send(status);
            }
        });
        Ok(answer(received, end))
    }

    /// The change that a token is of, if all that is behind it is there.
    async fn point_of(&self, token: Token) -> Result<ChangePoint, Status> {
        let too_old = |TooOld| status::watch_token_too_old();
        let point = token.of_server(self.lifecycle.catalog().server_id()).map_err(too_old)?;
        let seq = point.seq;
        let mark =
            self.looking(move |lifecycle| Ok(lifecycle.catalog().change_mark(seq)?)).await?.into_inner();
        token::check(point, mark.as_deref()).map_err(too_old)
    }

    /// The uid of a volume that is named; one that is given as such may be gone.
    async fn uid_of_watched(&self, scope: Scope, volume: String) -> Result<String, Status> {
        if let Some(uid) = volume.strip_prefix(UID_PREFIX) {
            return Ok(uid.to_owned());
        }
        let found = self.looking(move |lifecycle| volume_within(lifecycle, &scope, &volume));
        Ok(found.await?.into_inner().volume_uid.to_string())
    }
}

/// What a request asks for: kinds, volume and token.
type Asked = (Vec<WatchedKind>, Option<String>, Option<Token>);

fn wanted(request: v1::WatchRequest) -> Result<Asked, Status> {
    let mut fields = Fields::default();
    let asked: Vec<Option<WatchedKind>> = request.kinds.iter().map(|kind| kind_of(*kind)).collect();
    fields.require(asked.iter().all(Option::is_some), "kinds", || {
        format!("must be kinds of objects that can be watched, not {:?}", request.kinds)
    });
    let is_asked = |kind: &WatchedKind| asked.is_empty() || asked.contains(&Some(*kind));
    let kinds = WatchedKind::ALL.into_iter().filter(is_asked).collect();
    let volume = match request.volume_name {
        name if name.is_empty() => None,
        name => Some(fields.volume("volume_name", name)),
    };
    let token = Token::parse(&request.resume_token);
    fields.require(token.is_some() || request.resume_token.is_empty(), "resume_token", || {
        "is not a token of a watch".to_owned()
    });
    let volume = volume.map(|volume| as_it_was(volume, token.as_ref()));
    let is_certain = token.is_none() || volume.as_ref().is_none_or(|volume| volume.starts_with(UID_PREFIX));
    fields.require(is_certain, "volume_name", || {
        "may be another volume's since the token, which is of a watch of all: give uid:UUID".to_owned()
    });
    fields.finish()?;
    Ok((kinds, volume, token))
}

/// A volume that is named, by its uid where the token has that: by now the name may be another volume's, or nobody's.
fn as_it_was(volume: String, token: Option<&Token>) -> String {
    match token.and_then(Token::volume_uid) {
        Some(uid) if !volume.starts_with(UID_PREFIX) => format!("{UID_PREFIX}{uid}"),
        _ => volume,
    }
}

fn kind_of(kind: i32) -> Option<WatchedKind> {
    match v1::WatchedKind::try_from(kind) {
        Ok(v1::WatchedKind::Volume) => Some(WatchedKind::Volume),
        Ok(v1::WatchedKind::Attachment) => Some(WatchedKind::Attachment),
        Ok(v1::WatchedKind::Snapshot) => Some(WatchedKind::Snapshot),
        Ok(v1::WatchedKind::Node) => Some(WatchedKind::Node),
        Ok(v1::WatchedKind::Grant) => Some(WatchedKind::Grant),
        Ok(v1::WatchedKind::Unspecified) | Err(_) => None,
    }
}

/// The kinds of a request, as the audit log has them.
pub(super) fn kinds_told(request: &v1::WatchRequest) -> Vec<&'static str> {
    request.kinds.iter().filter_map(|kind| kind_of(*kind)).map(WatchedKind::as_str).collect()
}

/// The events as they come, and in the end why no more do.
fn answer(events: Receiver<v1::WatchEvent>, end: oneshot::Receiver<Status>) -> EventStream {
    Box::pin(unfold(Some((events, end)), |state| async {
        let (mut events, end) = state?;
        match events.recv().await {
            Some(event) => Some((Ok(event), Some((events, end)))),
            // A task that is no more without a word has failed, and its panic is in the log.
            None => Some((Err(end.await.unwrap_or_else(|_| status::failed("a watch ended"))), None)),
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_kinds_a_volume_and_a_token_or_leaves_them_away() {
        let (kinds, volume, token) = wanted(v1::WatchRequest::default()).unwrap();
        assert_eq!((kinds, volume, token), (WatchedKind::ALL.to_vec(), None, None));
        let uid = "A1B9A5C2-54F0-4F6B-8F34-3A8B8A1B0C01";
        let request = v1::WatchRequest {
            kinds: vec![v1::WatchedKind::Snapshot.into(), v1::WatchedKind::Volume.into()],
            volume_name: format!("uid:{uid}"),
            resume_token: format!("1.watch.{uid}.7.00ff00ff00ff00ff"),
        };
        let (kinds, volume, token) = wanted(request.clone()).unwrap();
        assert_eq!(kinds, [WatchedKind::Volume, WatchedKind::Snapshot]);
        assert_eq!(volume, Some(format!("uid:{}", uid.to_lowercase())));
        assert!(token.is_some());
        assert_eq!(kinds_told(&request), ["snapshot", "volume"]);
    }

    #[test]
    fn a_name_with_a_token_is_the_volume_that_was_watched() {
        let (server, watched) =
            ("a1b9a5c2-54f0-4f6b-8f34-3a8b8a1b0c01", "00000000-0000-0000-0000-000000000007");
        let other = "uid:00000000-0000-0000-0000-000000000008";
        let of_all = format!("1.watch.{server}.7.00ff00ff00ff00ff");
        let of_one = format!("{of_all}.{watched}");
        let asked = |volume: &str, token: &str| {
            let (volume_name, resume_token) = (volume.to_owned(), token.to_owned());
            wanted(v1::WatchRequest { volume_name, resume_token, kinds: Vec::new() })
        };
        let volume = |volume, token| asked(volume, token).unwrap().1;
        assert_eq!(volume("v", ""), Some("v".to_owned()));
        assert_eq!(volume("v", &of_one), Some(format!("uid:{watched}")));
        assert_eq!(volume(other, &of_one), Some(other.to_owned()));
        assert_eq!(volume(other, &of_all), Some(other.to_owned()));
        assert_eq!(volume("", &of_one), None);
        let refused = asked("v", &of_all).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert!(refused.message().contains("volume_name") && refused.message().contains("uid:UUID"));
    }

    #[test]
    fn every_field_that_is_off_is_named() {
        let request = v1::WatchRequest {
            kinds: vec![v1::WatchedKind::Volume.into(), 99],
            volume_name: "-x".to_owned(),
            resume_token: "x".to_owned(),
        };
        let refused = wanted(request).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        for field in ["kinds", "volume_name", "resume_token"] {
            assert!(refused.message().contains(field), "{field}: {}", refused.message());
        }
        let unspecified = v1::WatchRequest { kinds: vec![0], ..Default::default() };
        assert!(wanted(unspecified).is_err(), "a kind that is left out is not all of them");
    }
}
