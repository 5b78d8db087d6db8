//! Kills the real volserver in the middle of creations, deletions, attachments and detachments, again and again: what was
//! answered is there afterwards, and nothing half-made is.
//!
//! Each worker has one volume name and makes one call at a time, so after a kill its volume is as the last answer left it
//! or, where a call was cut off, as that call would have left it. The seed is printed; `VOLNODE_TEST_SEED=<seed>` plays the
//! same choices again (the kernel's timing is not replayed).
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod choices;
mod unit_filter;
mod volserver;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use choices::Choices;
use proto::v1::{self, management_client::ManagementClient};
use tonic::Code;
use tonic::transport::Channel;
use volserver::{Volserver, attach_request};

const ROUNDS: u32 = 24;
const WORKERS: u32 = 6;
/// A round is cut off at a random moment before this.
const ROUND_MS_MAX: u64 = 250;
const NODES: [&str; 2] = ["node-a", "node-b"];

/// What a node was given.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    node_id: String,
    attachment_id: String,
    secret: String,
}

/// What a worker knows of its volume from answers.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Known {
    Absent,
    Present { volume_uid: String, capacity_bytes: u64, holder: Option<Holder> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Create { capacity_bytes: u64 },
    Delete,
    Attach { node_id: &'static str, force: bool },
    Detach,
}

impl Call {
    fn choose(choices: &mut Choices) -> Self {
        match choices.below(10) {
            0..=2 => Self::Create { capacity_bytes: (1 + choices.below(8)) << 20 },
            3 | 4 => Self::Delete,
            5..=7 => {
                let node_id = NODES[choices.below(2) as usize];
                Self::Attach { node_id, force: choices.below(2) == 0 }
            }
            _ => Self::Detach,
        }
    }
}

/// One volume name with its answers, and the call that was cut off, if one was.
struct Worker {
    name: String,
    choices: Choices,
    known: Known,
    cut_off: Option<Call>,
    answered: u32,
}

impl Worker {
    /// Makes calls until one is cut off or the round is over.
    async fn work(mut self, mut client: ManagementClient<Channel>, is_over: Arc<AtomicBool>) -> Self {
        while !is_over.load(Ordering::Relaxed) {
            let call = Call::choose(&mut self.choices);
            match self.make(&mut client, &call).await {
                Ok(known) => {
                    self.known = known;
                    self.answered += 1;
                }
                Err(status)
                    if matches!(
                        status.code(),
                        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
                    ) =>
                {
                    self.cut_off = Some(call);
                    break;
                }
                // A refusal changes nothing.
                Err(status) => {
                    let expected = [Code::AlreadyExists, Code::NotFound, Code::FailedPrecondition];
                    assert!(expected.contains(&status.code()), "{}: {call:?}: {status}", self.name);
                }
            }
        }
        self
    }

    async fn make(
        &self,
        client: &mut ManagementClient<Channel>,
        call: &Call,
    ) -> Result<Known, tonic::Status> {
        let name = self.name.clone();
        match call.clone() {
            Call::Create { capacity_bytes } => {
                let request = v1::CreateVolumeRequest { name, capacity_bytes, ..Default::default() };
                let volume = client.create_volume(request).await?.into_inner();
                match &self.known {
                    Known::Absent => {
                        Ok(Known::Present { volume_uid: volume.volume_uid, capacity_bytes, holder: None })
                    }
                    known => Ok(known.clone()),
                }
            }
            Call::Delete => {
                client.delete_volume(v1::DeleteVolumeRequest { name, ..Default::default() }).await?;
                Ok(Known::Absent)
            }
            Call::Attach { node_id, force } => {
                let answer = client.attach_volume(attach_request(&name, node_id, force)).await?.into_inner();
                let Known::Present { volume_uid, capacity_bytes, .. } = self.known.clone() else {
                    panic!("{name} was attached, but does not exist");
                };
                let attachment_id = answer.attachment.unwrap().attachment_id;
                let holder = Holder { node_id: node_id.to_owned(), attachment_id, secret: answer.secret };
                Ok(Known::Present { volume_uid, capacity_bytes, holder: Some(holder) })
            }
            Call::Detach => {
                client
                    .detach_volume(v1::DetachVolumeRequest { volume_name: name, ..Default::default() })
                    .await?;
                match self.known.clone() {
                    Known::Present { volume_uid, capacity_bytes, .. } => {
                        Ok(Known::Present { volume_uid, capacity_bytes, holder: None })
                    }
                    Known::Absent => Ok(Known::Absent),
                }
            }
        }
    }

    /// Asks a server that has come back how the volume is, and checks that it may be so.
    async fn check(&mut self, client: &mut ManagementClient<Channel>) {
        let found = self.look(client).await;
        let before = std::mem::replace(&mut self.known, found.clone());
        let cut_off = self.cut_off.take();
        if found == before {
            return;
        }
        let Some(call) = &cut_off else {
            panic!("{}: {before:?} was answered, but {found:?} is there, and no call was cut off", self.name);
        };
        let may_be = match (call, &before, &found) {
            (
                Call::Create { capacity_bytes },
                Known::Absent,
                Known::Present { capacity_bytes: now, holder: None, .. },
            ) => capacity_bytes == now,
            (Call::Delete, Known::Present { holder: None, .. }, Known::Absent) => true,
            (
                Call::Detach,
                Known::Present { volume_uid: was, holder: Some(_), .. },
                Known::Present { volume_uid: is, holder: None, .. },
            ) => was == is,
            (
                Call::Attach { node_id, force },
                Known::Present { volume_uid: was, holder: former, .. },
                Known::Present { volume_uid: is, holder: now, .. },
            ) => {
                // By force, the former holder may have ended and the new one not begun.
                let taken = *force && former.is_some();
                let given = now.as_ref().is_some_and(|now| now.node_id == *node_id);
                was == is && if now.is_none() { taken } else { given && (former.is_none() || taken) }
            }
            _ => false,
        };
        assert!(may_be, "{}: {before:?} was answered, {call:?} cut off, and {found:?} is there", self.name);
    }

    async fn look(&self, client: &mut ManagementClient<Channel>) -> Known {
        let volume = match client
            .get_volume(v1::GetVolumeRequest { name: self.name.clone(), ..Default::default() })
            .await
        {
            Ok(volume) => volume.into_inner(),
            Err(status) if status.code() == Code::NotFound => return Known::Absent,
            Err(status) => panic!("{}: {status}", self.name),
        };
        let mut holder = None;
        if let [attachment] = &volume.attachments[..] {
            // Attaching again from the node that holds it tells the secret, and changes nothing.
            let request = attach_request(&self.name, &attachment.node_id, false);
            let answer = client.attach_volume(request).await.unwrap().into_inner();
            assert!(answer.existed);
            assert_eq!(answer.attachment.unwrap().attachment_id, attachment.attachment_id);
            holder = Some(Holder {
                node_id: attachment.node_id.clone(),
                attachment_id: attachment.attachment_id.clone(),
                secret: answer.secret,
            });
        }
        Known::Present { volume_uid: volume.volume_uid, capacity_bytes: volume.capacity_bytes, holder }
    }
}

/// The files are those of the volumes that are there, each as long as its volume; no row is half-way.
fn check_storage(data_dir: &Path, workers: &[Worker]) {
    let expected: BTreeSet<(String, u64)> = workers
        .iter()
        .filter_map(|worker| match &worker.known {
            Known::Present { volume_uid, capacity_bytes, .. } => Some((volume_uid.clone(), *capacity_bytes)),
            Known::Absent => None,
        })
        .collect();
    let files: BTreeSet<(String, u64)> = std::fs::read_dir(data_dir.join("volumes"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()))
        .collect();
    assert_eq!(files, expected);
    let db = rusqlite::Connection::open(data_dir.join("catalog.sqlite")).unwrap();
    let count = |sql: &str| -> u32 { db.query_row(sql, [], |row| row.get(0)).unwrap() };
    assert_eq!(count("SELECT count(*) FROM volumes WHERE state <> 'ready'"), 0);
    assert_eq!(count("SELECT count(*) FROM attachments WHERE state <> 'active'"), 0);
    assert_eq!(count("SELECT count(*) FROM volumes"), u32::try_from(expected.len()).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_at_any_moment_loses_nothing_answered_and_leaves_nothing_half_made() {
    let seed = match std::env::var("VOLNODE_TEST_SEED") {
        Ok(text) => text.parse().expect("VOLNODE_TEST_SEED is a number"),
        Err(_) => uuid::Uuid::new_v4().as_u64_pair().0,
    };
    println!("VOLNODE_TEST_SEED={seed}");
    let mut choices = Choices(seed);
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let mut workers: Vec<Worker> = (0..WORKERS)
        .map(|index| Worker {
            name: format!("vol-{index}"),
            choices: Choices(choices.below(u64::MAX)),
            known: Known::Absent,
            cut_off: None,
            answered: 0,
        })
        .collect();
    let mut cut_off = 0;
    for _ in 0..ROUNDS {
        let server = Volserver::start(&data_dir);
        let mut client = server.client().await;
        for worker in &mut workers {
            worker.check(&mut client).await;
        }
        check_storage(&data_dir, &workers);
        let is_over = Arc::new(AtomicBool::new(false));
        let round: Vec<_> = workers
            .drain(..)
            .map(|worker| tokio::spawn(worker.work(client.clone(), Arc::clone(&is_over))))
            .collect();
        tokio::time::sleep(Duration::from_millis(choices.below(ROUND_MS_MAX))).await;
        server.kill();
        is_over.store(true, Ordering::Relaxed);
        for worker in round {
            workers.push(worker.await.unwrap());
        }
        cut_off += workers.iter().filter(|worker| worker.cut_off.is_some()).count();
    }
    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    for worker in &mut workers {
        worker.check(&mut client).await;
    }
    check_storage(&data_dir, &workers);
    let answered: u32 = workers.iter().map(|worker| worker.answered).sum();
    println!("{answered} calls answered, {cut_off} cut off in {ROUNDS} kills");
    assert!(answered > ROUNDS && cut_off > 0, "the kills hit nothing");
}
