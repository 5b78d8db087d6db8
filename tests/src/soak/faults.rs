//! What is done to an attachment, and how one sees that it got over it.

use std::fmt;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use fastrand::Rng;
use rustix::process::{Pid, Signal, kill_process};

use crate::fault_proxy::{Cut, FaultProxy};
use crate::shell::wait_for;
use crate::storage_node::StorageNode;

/// Whatever happens is over by then, on a slow machine.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(90);
/// Longest pause before a fault, and between the halves of one.
const PAUSE_MS_MAX: u64 = 800;
/// How long each piece is held back by a delay.
const DELAY: Duration = Duration::from_millis(50);
/// One black hole in so many faults of the network: it takes a reply's time-out to notice.
const BLACK_HOLE_ONE_IN: u32 = 12;

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Fault {
    /// kill -9 of the device process.
    KillDeviceProcess,
    /// kill -9 of the server.
    KillServer,
    /// kill -9 of the node daemon and the device process.
    KillBothDaemons,
    /// `volctl upgrade`.
    Upgrade,
    /// Connections end with RST.
    Reset,
    /// Connections end with FIN.
    Close,
    /// The server's half of the connections ends.
    HalfClose,
    /// Nothing gets through any more.
    BlackHole,
    /// Connections end somewhere in a reply.
    CutInsideReplies,
    /// Every piece is held back for a while, for some time.
    Delay,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KillDeviceProcess => "kill -9 of the device process",
            Self::KillServer => "kill -9 of the server",
            Self::KillBothDaemons => "kill -9 of the node daemon and the device process",
            Self::Upgrade => "live upgrade",
            Self::Reset => "connections cut by RST",
            Self::Close => "connections cut by FIN",
            Self::HalfClose => "connections half closed",
            Self::BlackHole => "connections into a black hole",
            Self::CutInsideReplies => "connections cut inside replies",
            Self::Delay => "pieces held back for 50 ms",
        })
    }
}

/// An attachment behind a proxy, and what breaks it.
pub(super) struct Rig {
    node: StorageNode,
    proxy: FaultProxy,
    volume: &'static str,
    rng: Rng,
    /// The only one that happens, where there is such.
    only: Option<Fault>,
}

impl Rig {
    pub(super) fn new(
        node: StorageNode,
        proxy: FaultProxy,
        volume: &'static str,
        seed: u64,
        only: Option<Fault>,
    ) -> Self {
        Self { node, proxy, volume, rng: Rng::with_seed(seed), only }
    }

    pub(super) fn choose(&mut self) -> Fault {
        if let Some(only) = self.only {
            return only;
        }
        match self.rng.u32(..9) {
            0 => Fault::KillServer,
            1 => Fault::KillDeviceProcess,
            2 => Fault::Upgrade,
            3 => Fault::Reset,
            4 => Fault::Close,
            5 => Fault::HalfClose,
            6 => Fault::CutInsideReplies,
            7 if self.rng.u32(..2) == 0 => Fault::KillBothDaemons,
            8 if self.rng.u32(..BLACK_HOLE_ONE_IN / 2) == 0 => Fault::BlackHole,
            8 if self.rng.bool() => Fault::Delay,
            _ => Fault::Reset,
        }
    }

    pub(super) fn pause(&mut self) {
        thread::sleep(Duration::from_millis(self.rng.u64(..PAUSE_MS_MAX)));
    }

    /// Does it, and what has to be done by somebody for it to be over.
    pub(super) fn inflict(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::KillServer => {
                self.node.kill_server()?;
                self.pause();
                self.node.start_server()?;
            }
            Fault::KillDeviceProcess => self.kill_device_process().map(drop)?,
            Fault::KillBothDaemons => {
                self.node.kill_client()?;
                // Nobody is there to replace it at once.
                self.kill_pid(self.pid_in_status()?)?;
                self.pause();
                self.node.start_client()?;
            }
            Fault::Upgrade => self.node.volctl(&["upgrade", self.volume])?.succeeded().map(drop)?,
            Fault::Reset => self.proxy.cut(Cut::Reset),
            Fault::Close => self.proxy.cut(Cut::Close),
            Fault::HalfClose => self.proxy.cut(Cut::HalfClose),
            Fault::BlackHole => self.proxy.cut(Cut::BlackHole),
            Fault::Delay => {
                self.proxy.delay(DELAY);
                self.pause();
                self.proxy.delay(Duration::ZERO);
            }
            Fault::CutInsideReplies => {
                self.proxy.cut_replies_after(Some(self.rng.u64(300..60_000)));
                self.proxy.cut(Cut::Reset);
                self.pause();
                self.proxy.cut_replies_after(None);
                self.proxy.cut(Cut::Reset);
            }
        }
        wait_for("the disk to be live", RECOVERY_DEADLINE, || {
            Ok((self.node.attachment(self.volume)?["state"] == "live").then_some(()))
        })
    }

    /// The attachment ends as it should.
    pub(super) fn end(self) -> Result<()> {
        self.node.detach(self.volume)
    }

    fn kill_device_process(&self) -> Result<u64> {
        let pid = self.node.attachment(self.volume)?["pid"].as_u64().context("pid")?;
        self.kill_pid(pid)?;
        wait_for("another device process", RECOVERY_DEADLINE, || {
            let now = self.node.attachment(self.volume)?["pid"].as_u64();
            Ok(now.filter(|now| *now != pid && *now != 0))
        })
    }

    fn kill_pid(&self, pid: u64) -> Result<()> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("pid")?;
        kill_process(pid, Signal::KILL).context("SIGKILL")
    }

    /// Without the node daemon there is nobody else to ask.
    fn pid_in_status(&self) -> Result<u64> {
        let folders = std::fs::read_dir(self.node.run_dir.join("attachments"))?;
        let folder = folders.flatten().next().context("no attachment")?.path();
        let status: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("status.json"))?)?;
        status["pid"].as_u64().context("pid")
    }
}
