//! kubectl, as a person would use it: the only way in which the lab speaks with the cluster.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::lab::{interrupt, tool};

/// One call; the longest wait for an API server that is slow.
const CALL_DEADLINE: Duration = Duration::from_secs(120);

/// Between two looks at something that is waited for.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Events shown of something that did not come.
const EVENTS_SHOWN: usize = 25;

/// How often a call is made that the API server could not pass on to a kubelet in time, and what it says then.
const TRIES: u32 = 10;
const SLOW: [&str; 2] = ["TLS handshake timeout", "i/o timeout"];

/// kubectl with a kubeconfig, and a namespace.
#[derive(Clone)]
pub(super) struct Kubectl {
    program: PathBuf,
    /// For a person: `KUBECONFIG`.
    pub(super) kubeconfig: PathBuf,
    /// Where objects are that do not say it.
    pub(super) namespace: String,
}

impl Kubectl {
    pub(super) fn new(program: PathBuf, kubeconfig: PathBuf) -> Self {
        Self { program, kubeconfig, namespace: "default".to_owned() }
    }

    /// The same, in another namespace.
    pub(super) fn within(&self, namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..self.clone() }
    }

    /// Runs it, and gives what it printed. What an emulated machine did not answer in time is asked once more.
    ///
    /// # Errors
    /// It fails: with its own words.
    pub(super) fn run(&self, words: &[&str]) -> Result<String> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.run_once(words) {
                Err(error)
                    if tries < TRIES && SLOW.iter().any(|slow| format!("{error:#}").contains(slow)) =>
                {
                    interrupt::check()?;
                }
                done => return done,
            }
        }
    }

    fn run_once(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(["--namespace", &self.namespace]).args(words);
        let finished = tool::finish(&mut command, CALL_DEADLINE)?;
        let said = String::from_utf8_lossy(&finished.stdout).into_owned();
        if !finished.status.success() {
            bail!("kubectl {}: {}\n{said}{}", words.join(" "), finished.status, finished.stderr.trim_end());
        }
        Ok(said)
    }

    /// An object, or a list of them.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub(super) fn get(&self, words: &[&str]) -> Result<Value> {
        let said = self.run(&[&["get"], words, &["--output", "json"]].concat())?;
        serde_json::from_str(&said).context("what kubectl printed")
    }

    /// Creates or changes an object.
    ///
    /// # Errors
    /// The API server's word.
    pub(super) fn apply(&self, object: &Value) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new()?;
        std::io::Write::write_all(&mut file, object.to_string().as_bytes())?;
        self.run(&["apply", "--filename", &file.path().display().to_string()]).map(drop)
    }

    /// Looks until it is there.
    ///
    /// # Errors
    /// It is not in time: with the last events of the namespace.
    pub(super) fn wait<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut look: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let began = Instant::now();
        loop {
            interrupt::check()?;
            let seen = look(self);
            if let Ok(Some(found)) = seen {
                return Ok(found);
            }
            if began.elapsed() > deadline {
                let error = seen.err().map(|error| format!(" ({error:#})")).unwrap_or_default();
                let waited = deadline.as_secs();
                bail!("waited {waited} s in vain for {what}{error}\n{}", self.state());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// What the namespace's pods and events say, for errors.
    fn state(&self) -> String {
        let pods = self.run(&["get", "pods,pvc", "--output", "wide"]).unwrap_or_default();
        let events = self.run(&["get", "events", "--sort-by=.lastTimestamp"]).unwrap_or_default();
        let lines: Vec<&str> = events.lines().collect();
        format!("{pods}\n{}", lines[lines.len().saturating_sub(EVENTS_SHOWN)..].join("\n"))
    }
}
