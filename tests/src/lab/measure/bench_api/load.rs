//! One kind of call, made many times by so many callers at once, and what each took.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use proto::v1::management_client::ManagementClient;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::lab::interrupt;

/// The server takes 32 calls of a connection at once.
const CALLS_OF_CONNECTION: usize = 25;
/// What takes longer fails the run.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// As generated.
pub(super) type Client = ManagementClient<Channel>;

/// The callers.
#[derive(Debug)]
pub(super) struct Load {
    clients: Vec<Client>,
    at_once: usize,
}

/// What calls of one kind took.
#[derive(Debug)]
pub(super) struct Row {
    /// Of which kind.
    pub(super) name: String,
    /// By how many callers.
    pub(super) at_once: usize,
    /// Of each call, in order.
    took_us: Vec<u64>,
    /// All of them together.
    elapsed: Duration,
}

impl Row {
    pub(super) fn new(name: &str, at_once: usize, mut took_us: Vec<u64>, elapsed: Duration) -> Self {
        took_us.sort_unstable();
        Self { name: name.to_owned(), at_once, took_us, elapsed }
    }

    /// So many hundredths of the calls took no longer.
    pub(super) fn percentile_us(&self, percent: usize) -> u64 {
        let rank = (self.took_us.len() * percent).div_ceil(100).max(1);
        self.took_us.get(rank - 1).copied().unwrap_or_default()
    }

    pub(super) fn per_second(&self) -> f64 {
        self.took_us.len() as f64 / self.elapsed.as_secs_f64()
    }
}

impl Load {
    /// Connections for so many calls at once.
    ///
    /// # Errors
    /// The server cannot be reached.
    pub(super) async fn connect(uri: &str, at_once: usize) -> Result<Self> {
        let mut clients = Vec::new();
        for _ in 0..at_once.div_ceil(CALLS_OF_CONNECTION) {
            let endpoint = Endpoint::from_shared(uri.to_owned())?.timeout(CALL_DEADLINE);
            clients.push(Client::new(endpoint.connect().await.with_context(|| uri.to_owned())?));
        }
        Ok(Self { clients, at_once })
    }

    pub(super) fn connections(&self) -> usize {
        self.clients.len()
    }

    /// A client for calls that are not measured.
    pub(super) fn client(&self) -> Client {
        self.clients[0].clone()
    }

    /// Makes calls of a kind, numbered from 0, by all callers.
    ///
    /// # Errors
    /// One fails.
    pub(super) async fn calls<F>(
        &self,
        name: &str,
        count: usize,
        call: impl Fn(Client, usize) -> F + Send + Sync + 'static,
    ) -> Result<Row>
    where
        F: Future<Output = Result<(), Status>> + Send,
    {
        self.calls_by(name, self.at_once, count, call).await
    }

    /// The same by so many callers.
    ///
    /// # Errors
    /// The same.
    pub(super) async fn calls_by<F>(
        &self,
        name: &str,
        at_once: usize,
        count: usize,
        call: impl Fn(Client, usize) -> F + Send + Sync + 'static,
    ) -> Result<Row>
    where
        F: Future<Output = Result<(), Status>> + Send,
    {
        interrupt::check()?;
        let (call, next) = (Arc::new(call), Arc::new(AtomicUsize::new(0)));
        let mut callers = tokio::task::JoinSet::new();
        let began = Instant::now();
        for caller in 0..at_once {
            let client = self.clients[caller % self.clients.len()].clone();
            let (call, next) = (Arc::clone(&call), Arc::clone(&next));
            callers.spawn(async move {
                let mut took_us = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return Ok::<_, Status>(took_us);
                    }
                    let began = Instant::now();
                    call(client.clone(), number).await?;
                    took_us.push(began.elapsed().as_micros() as u64);
                }
            });
        }
        let mut took_us = Vec::with_capacity(count);
        while let Some(caller) = callers.join_next().await {
            took_us.extend(caller?.with_context(|| name.to_owned())?);
        }
        let row = Row::new(name, at_once, took_us, began.elapsed());
        eprintln!("{name}: p50 {} µs, p99 {} µs", row.percentile_us(50), row.percentile_us(99));
        Ok(row)
    }
}
