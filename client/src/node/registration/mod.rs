//! This node at its storage server: it registers, and says how it and its disks are.
//!
//! Owns: the calls RegisterNode and Heartbeat, what is looked at for them, and the lines in the log. Never: holds up anything else of
//! the daemon, or decides when what is said (`core.rs`) and what of it (`told.rs`, and `asked.rs` of freezes that the server wants). Called by: `serve`, once.
//! The connection is the node API's, unless the server refused: it takes a caller's rights from the certificate of its connection,
//! so that another certificate needs another connection.

mod asked;
mod core;
mod freezing;
mod told;
pub(super) mod volume_limit;

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::v1;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use self::core::{Answer, Call, News, Refusal, Registration};
use self::freezing::Freezing;
use super::attachment_record::AttachmentRecord;
use super::error::NodeError;
use super::freeze::Freezes;
use super::management_client::ManagementClient;
use super::supervisor::{Supervisor, blocking, probe_data_paths};
use crate::causes::with_sources;
use crate::contract;

/// Between two looks at the state of the disks, while the server hears of changes: with it and the least pause between heartbeats, a
/// change is told within a second.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// For an answer, beside what the server was told to keep it waiting; neither call waits for a disk of the server.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Between two examinations of this machine: drivers are loaded, and programs restarted, by people.
const EXAMINE_INTERVAL: Duration = Duration::from_secs(300);
/// What is to be done where the server does not take the caller for this node.
const NEXT_OF_CERTIFICATE: &str = "issue the node daemon a certificate with the name volnode:node/NODE_ID";

/// What a node is told to say of itself.
#[derive(Debug, Clone, Default)]
pub(super) struct NodeProfile {
    /// What it is and where.
    pub(super) labels: BTreeMap<String, String>,
    /// How many volumes it can have; 0: no limit.
    pub(super) max_volumes: u32,
}

/// Says who this node is and how it is, for as long as the daemon lives.
pub(super) async fn keep_registered(
    supervisor: Arc<Supervisor>,
    freezes: Arc<Freezes>,
    profile: NodeProfile,
) {
    let (found, conditions) = watch::channel(Vec::new());
    let client = supervisor.management.clone();
    let reporter = Reporter {
        supervisor,
        client,
        profile,
        // As for an attach: where it cannot be read, all boots are one.
        boot_id: contract::boot_id().unwrap_or_default(),
        daemon_id: Uuid::new_v4().to_string(),
        freezing: Freezing::new(freezes),
        conditions,
        told_disks: Vec::new(),
        told_conditions: Vec::new(),
        has_begun: false,
    };
    tokio::join!(keep_examined(found), reporter.run());
}

/// Opens the driver, and moves bytes over a pair of sockets as each data path would; nothing of that is left.
async fn keep_examined(found: watch::Sender<Vec<v1::NodeCondition>>) {
    let is_root = rustix::process::geteuid().is_root();
    loop {
        let data_paths = probe_data_paths().await.and_then(|report| match report.best() {
            Some(_) => Ok(()),
            None => {
                let what = "no data path can be used".to_owned();
                let source = std::io::Error::other(
                    "allow io_uring (kernel.io_uring_disabled, a container's seccomp profile)",
                );
                Err(NodeError::Io { what, source })
            }
        });
        found.send_replace(told::conditions(is_root, data_paths));
        tokio::time::sleep(EXAMINE_INTERVAL).await;
    }
}

struct Reporter {
    supervisor: Arc<Supervisor>,
    client: ManagementClient,
    profile: NodeProfile,
    boot_id: String,
    /// Of this start of the daemon: what an earlier one has frozen is thawed.
    daemon_id: String,
    freezing: Freezing,
    /// What is wrong with this machine, as it was found last; nothing before somebody has looked.
    conditions: watch::Receiver<Vec<v1::NodeCondition>>,
    /// By the last heartbeat that was sent.
    told_disks: Vec<v1::NodeDisk>,
    told_conditions: Vec<v1::NodeCondition>,
    /// By the answer of the last heartbeat.
    has_begun: bool,
}

impl Reporter {
    async fn run(mut self) {
        let (began, mut registration) = (Instant::now(), Registration::new());
        loop {
            let now = began.elapsed();
            let (call, due) = registration.next();
            if due > now {
                let pause = due - now;
                let may_look = registration.is_heard();
                tokio::time::sleep(if may_look { pause.min(LOOK_INTERVAL) } else { pause }).await;
                if may_look && self.has_changed(registration.server_id().unwrap_or_default()).await {
                    registration.changed(began.elapsed());
                }
                continue;
            }
            let answer = match call {
                Call::Register => self.register().await,
                Call::Heartbeat => {
                    let may_replace = || registration.may_replace(now, began.elapsed());
                    let wait = registration.wait(fastrand::f64());
                    let server_id = registration.server_id().unwrap_or_default();
                    match self.heartbeat(server_id, wait, may_replace).await {
                        Some(answer) => answer,
                        None => {
                            registration.replaced(now, began.elapsed());
                            continue;
                        }
                    }
                }
            };
            let is_refused = matches!(answer, Answer::Refused(_));
            let news = registration.answered(call, answer, now, began.elapsed(), fastrand::f64());
            if std::mem::take(&mut self.has_begun) {
                registration.has_begun(began.elapsed());
            }
            if is_refused {
                self.connect_anew();
            }
            if let Some(news) = news {
                self.log(news);
            }
        }
    }

    async fn register(&self) -> Answer {
        let request = v1::RegisterNodeRequest {
            node_id: self.supervisor.config().node_id.clone(),
            boot_id: self.boot_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            labels: self.profile.labels.clone().into_iter().collect(),
            max_volumes: self.profile.max_volumes,
        };
        let registered = async {
            // First, so that a server that comes in between is noticed by the first heartbeat.
            let info = self.client.server_info().await?;
            self.client.register_node(request).await?;
            Ok(info.server_id)
        };
        answer_of(timeout(CALL_DEADLINE, registered).await.ok())
    }

    /// `None`: something is to be told in its place.
    async fn heartbeat(
        &mut self,
        server_id: &str,
        wait: Duration,
        may_replace: impl Fn() -> bool,
    ) -> Option<Answer> {
        let disks = match self.disks(server_id).await {
            Ok(disks) => disks,
            Err(error) => {
                tracing::debug!(error = with_sources(&error), "cannot read the attachments");
                self.told_disks.clone()
            }
        };
        self.told_disks.clone_from(&disks);
        self.told_conditions = self.conditions.borrow().clone();
        let (freezes, mut changed) = self.freezing.report();
        let request = v1::HeartbeatRequest {
            node_id: self.supervisor.config().node_id.clone(),
            boot_id: self.boot_id.clone(),
            disks,
            conditions: self.told_conditions.clone(),
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            daemon_id: self.daemon_id.clone(),
            freezes: freezes.clone(),
        };
        let client = self.client.clone();
        let mut call = pin!(timeout(wait + CALL_DEADLINE, client.heartbeat(request)));
        let outcome = loop {
            tokio::select! {
                outcome = &mut call => break outcome.ok(),
                Ok(()) = changed.changed() => return None,
                () = tokio::time::sleep(LOOK_INTERVAL) => {
                    if may_replace() && self.has_changed(server_id).await {
                        return None;
                    }
                }
            }
        };
        Some(answer_of(outcome.map(|answer| {
            answer.map(|heard| {
                self.has_begun = self.freezing.heard(&freezes, heard.freezes);
                heard.server_id
            })
        })))
    }

    async fn has_changed(&self, server_id: &str) -> bool {
        let disks = self.disks(server_id).await;
        disks.is_ok_and(|disks| told::differ(&self.told_disks, &disks))
            || *self.conditions.borrow() != self.told_conditions
    }

    /// State files are read on a thread for such work.
    async fn disks(&self, server_id: &str) -> Result<Vec<v1::NodeDisk>, NodeError> {
        let (run_dir, server_id) = (self.supervisor.config().run_dir.clone(), server_id.to_owned());
        blocking(move || Ok(told::disks(&AttachmentRecord::read_all_quietly(&run_dir)?, &server_id))).await
    }

    fn connect_anew(&mut self) {
        let files = self.supervisor.config().tls_files.as_ref();
        // The URI and the files were taken before.
        if let Ok(client) = ManagementClient::new(self.supervisor.server(), files) {
            self.client = client;
        }
    }

    fn log(&self, news: News) {
        let (server, node_id) = (self.supervisor.server(), &self.supervisor.config().node_id);
        match news {
            News::Registered => {
                tracing::info!(
                    server,
                    node_id,
                    "this node is registered at the storage server, which hears of its disks"
                );
            }
            News::Forgotten => tracing::warn!(
                server,
                node_id,
                "the storage server does not know this node, or this boot of it, any more: it registers again. If that goes on, \
                 another machine has the same node id: give one of them another (--node-id)"
            ),
            News::OtherServer => {
                tracing::warn!(
                    server,
                    node_id,
                    "another storage server answers at this address: this node registers there"
                );
            }
            News::Unsupported => tracing::info!(
                server,
                "the storage server is of a version that knows no nodes: this one is not registered there, and asks again \
                 every minute; volumes are attached all the same"
            ),
            News::Refused(Refusal { why, next }) => tracing::warn!(
                server,
                node_id,
                why,
                next,
                "the storage server does not let this node register: it asks again every minute; what is attached stays so"
            ),
            News::Away(why) => {
                tracing::warn!(
                    server,
                    why,
                    "the storage server cannot be told of this node; it is tried again"
                );
            }
        }
    }
}

/// What a call came to; `None`: nothing, in time.
fn answer_of(outcome: Option<Result<String, NodeError>>) -> Answer {
    match outcome {
        None => Answer::Away(format!("no answer within {} s", CALL_DEADLINE.as_secs())),
        Some(Ok(server_id)) => Answer::Heard(server_id),
        Some(Err(NodeError::Refused(status))) => match status.code() {
            Code::NotFound => Answer::NotKnown,
            Code::Unimplemented => Answer::Unsupported,
            Code::PermissionDenied | Code::Unauthenticated => {
                let (why, next) = (status.message().to_owned(), NEXT_OF_CERTIFICATE.to_owned());
                Answer::Refused(Refusal { why, next })
            }
            // The same call has the same answer until somebody changes something.
            Code::InvalidArgument | Code::FailedPrecondition => {
                let (why, next) = (status.message().to_owned(), next_of(&status));
                Answer::Refused(Refusal { why, next })
            }
            // It says so itself, and will be there.
            Code::Unavailable | Code::DeadlineExceeded => Answer::Away(status.message().to_owned()),
            // A status that the server did not make (it would say what to do) is the channel's.
            _ => match next_of(&status) {
                next if next.is_empty() => Answer::Away(status.message().to_owned()),
                next => Answer::Failed(format!("{}; {next}", status.message())),
            },
        },
        Some(Err(NodeError::ServerUnreachable { cause, .. })) => Answer::Away(cause),
        Some(Err(error)) => Answer::Away(with_sources(&error)),
    }
}

/// What the server says is to be done; empty where it does not.
fn next_of(status: &Status) -> String {
    let info = status.get_details_error_info();
    info.and_then(|mut info| info.metadata.remove(reason::METADATA_NEXT)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn with_next(code: Code) -> Status {
        let metadata = HashMap::from([(reason::METADATA_NEXT.to_owned(), "do y".to_owned())]);
        let details = ErrorDetails::with_error_info("REASON", reason::DOMAIN, metadata);
        Status::with_error_details(code, "x", details)
    }

    #[test]
    fn what_the_server_says_decides() {
        let of = |status: Status| answer_of(Some(Err(NodeError::Refused(Box::new(status)))));
        assert_eq!(of(Status::not_found("x")), Answer::NotKnown);
        assert_eq!(of(Status::unimplemented("")), Answer::Unsupported);
        for certificate in [Code::PermissionDenied, Code::Unauthenticated] {
            let refused = Refusal { why: "x".to_owned(), next: NEXT_OF_CERTIFICATE.to_owned() };
            assert_eq!(of(with_next(certificate)), Answer::Refused(refused));
        }
        for state in [Code::InvalidArgument, Code::FailedPrecondition] {
            let refused = Refusal { why: "x".to_owned(), next: "do y".to_owned() };
            assert_eq!(of(with_next(state)), Answer::Refused(refused));
        }
        for own in [Code::Internal, Code::ResourceExhausted, Code::Aborted, Code::DataLoss, Code::Unknown] {
            assert_eq!(of(with_next(own)), Answer::Failed("x; do y".to_owned()));
        }
        assert_eq!(of(Status::internal("x")), Answer::Away("x".to_owned()));
        assert_eq!(of(Status::unavailable("it stops")), Answer::Away("it stops".to_owned()));
        assert_eq!(answer_of(Some(Ok("s".to_owned()))), Answer::Heard("s".to_owned()));
        assert!(matches!(answer_of(None), Answer::Away(_)));
        let unreachable = NodeError::ServerUnreachable { server: "s".to_owned(), cause: "c".to_owned() };
        assert_eq!(answer_of(Some(Err(unreachable))), Answer::Away("c".to_owned()));
    }
}
