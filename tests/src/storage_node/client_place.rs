//! Where the node daemon runs, and to where it logs.

use anyhow::{Context as _, Result};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::StorageNode;
use crate::pod::Pod;

impl StorageNode {
    /// From its next start on the node daemon, and with it its device processes, log to a pipe that nobody reads.
    ///
    /// # Errors
    /// There is no pipe to be had.
    pub fn take_no_log_of_the_client(&mut self) -> Result<()> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setfl(&writer, OFlags::WRONLY | OFlags::NONBLOCK)?;
        while rustix::io::write(&writer, &[b'x'; 4096]) != Err(Errno::AGAIN) {}
        fcntl_setfl(&writer, OFlags::WRONLY)?;
        self.full_pipe = Some((reader, writer));
        Ok(())
    }

    /// Starts the node daemon in a pod.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start_client_in(&mut self, pod: Pod) -> Result<()> {
        self.pod = Some(pod);
        self.start_client()
    }

    /// Ends the node daemon's pod as kubelet does when its time is over: everything in it is killed.
    ///
    /// # Errors
    /// There is none, or it does not end.
    pub fn kill_pod(&mut self) -> Result<()> {
        self.pod.take().context("the node daemon is in no pod")?.kill()?;
        self.kill_client()
    }

    /// From its next start on the node daemon has these options, too.
    pub fn add_client_options(&mut self, options: &[&str]) {
        self.client_options.extend(options.iter().map(|&option| option.to_owned()));
    }
}
