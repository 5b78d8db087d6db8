//! A queue's thread: one ublk hardware queue, one ring, one or more connections.
//!
//! Each pass: **reap** what completed, and tell the rules (`core.rs`) → have them give back, receive and send → **one submit**, which
//! also waits. No lock, no allocation, no log above `trace` while nothing goes wrong. What needs no page of a request is sent without
//! the ring: it has left when the call returns, and the ring is entered only to wait.
//!
//! With SEND_ZC, WRITEs from a size on are sent from their own pages by a path that would stage them; the pages are the kernel's to keep until
//! the socket does not refer to them any more, whatever the queue does with the tag meanwhile.
//!
//! What moves a payload, and what has to be done before and after it, differs by data path (`payload.rs`); the thread is
//! the same for all.
//!
//! Called by `attachment.rs`, which starts one thread for each queue.

use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use io_uring::types::Timespec;
use proto::nbd::transmission::{Command, CommandFlags, Request};
use ublk_core::abi::{UBLK_IO_RES_ABORT, UBLK_IO_RES_OK};

use super::block_request;
use super::core::{QueueCore, QueueSpec};
use super::operation::Operation;
use super::parts::{QueueCommand, QueueCommands, QueueError, QueueEvent, QueueParts};
use super::payload::Payloads;
use super::ring::{Completed, QueueRing};

/// How long the last FLUSH may take when the device goes away.
const FINAL_FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a socket that was shut down may take to give its operations back.
const REAP_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a queue until its device is gone. To be called on the queue's own thread, as `on_event` is then; that happens
/// never while requests are served without an error.
pub fn run(parts: QueueParts, on_event: &dyn Fn(QueueEvent)) {
    let queue_id = parts.queue.q_id();
    let outcome = QueueThread::new(parts, on_event).and_then(QueueThread::run);
    on_event(QueueEvent::Ended { queue_id, outcome });
}

struct QueueThread<'a> {
    queue_id: u16,
    core: QueueCore,
    ring: QueueRing,
    busy_poll: Duration,
    commands: QueueCommands,
    is_tick_out: bool,
    on_event: &'a dyn Fn(QueueEvent),
}

impl<'a> QueueThread<'a> {
    fn new(parts: QueueParts, on_event: &'a dyn Fn(QueueEvent)) -> Result<Self, QueueError> {
        let (queue_id, queue_depth) = (parts.queue.q_id(), parts.queue.queue_depth());
        let QueueParts { data_path, transfer, has_user_copy, max_io_bytes, unflushed, .. } = parts;
        let payloads = Payloads::new(data_path, transfer, has_user_copy, queue_depth, max_io_bytes)?;
        let nr_connections = parts.sockets.len() as u16;
        let ring = QueueRing::new(
            parts.queue,
            payloads,
            parts.sockets,
            parts.send_zc_bytes_min,
            parts.key_bytes_max,
        )?;
        let spec = QueueSpec {
            queue_id,
            queue_depth,
            nr_connections,
            small_bytes_max: ring.small_bytes_max(),
            volatile_cache: parts.volatile_cache,
            resend: parts.resend,
            reply_timeout: parts.reply_timeout,
            unflushed,
        };
        Ok(Self {
            queue_id,
            core: QueueCore::new(spec, Instant::now()),
            ring,
            busy_poll: parts.busy_poll,
            commands: parts.commands,
            is_tick_out: false,
            on_event,
        })
    }

    fn run(mut self) -> Result<(), QueueError> {
        self.core.start(&mut self.ring);
        self.ring.wait_for_command(self.commands.eventfd.as_fd());
        (self.on_event)(QueueEvent::Ready);
        while !self.core.is_finished() {
            self.pass(None)?;
        }
        self.finish()
    }

    /// One pass: submit and wait, reap, have the rules go on.
    fn pass(&mut self, timeout: Option<Timespec>) -> Result<(), QueueError> {
        match self.core.looks_again() {
            true => self.ring.submit_and_look()?,
            false => self.wait(timeout)?,
        }
        while let Some(completed) = self.ring.reap() {
            self.core.completion_came();
            self.advance(completed)?;
        }
        self.core.end_of_pass(&mut self.ring, Instant::now);
        while let Some(event) = self.core.take_event() {
            (self.on_event)(QueueEvent::Link { queue_id: self.queue_id, event });
        }
        if !self.is_tick_out && self.core.awaits_replies() {
            self.is_tick_out = true;
            self.ring.start_tick();
        }
        Ok(())
    }

    /// Submits, and waits for a completion: awake at first, where that was asked for.
    fn wait(&mut self, timeout: Option<Timespec>) -> Result<(), QueueError> {
        if !self.busy_poll.is_zero() {
            let until = Instant::now() + self.busy_poll;
            while Instant::now() < until {
                self.ring.submit_and_look()?;
                if self.ring.has_completed() {
                    return Ok(());
                }
            }
        }
        Ok(self.ring.submit_and_wait(timeout)?)
    }

    fn advance(&mut self, completed: Completed) -> Result<(), QueueError> {
        let (operation, result) = match completed {
            Completed::Operation(operation, result) => (operation, result),
            Completed::Notification { connection, was_copied, is_sure } => {
                if self.ring.notified(connection, was_copied, is_sure) {
                    (self.on_event)(QueueEvent::SentByReference { was_copied });
                }
                return Ok(());
            }
        };
        let Self { core, ring, .. } = self;
        match operation {
            Operation::Tag(tag) => match result {
                UBLK_IO_RES_OK => {
                    let request = block_request::from_descriptor(&ring.queue().io_desc(tag));
                    core.handle_request(ring, tag, request);
                }
                UBLK_IO_RES_ABORT => core.handle_abort(tag),
                errno => {
                    return Err(QueueError::Driver { tag, source: io::Error::from_raw_os_error(-errno) });
                }
            },
            Operation::Register(tag) => core.handle_registered(ring, tag, result),
            Operation::Unregister(tag) => assert_eq!(result, 0, "tag {tag} was registered"),
            Operation::ReceiveInbox(connection) => core.handle_inbox(ring, connection, result),
            Operation::ReceivePayload(connection, tag) => core.handle_payload(ring, connection, tag, result),
            Operation::SendOutbox(connection) => core.handle_sent(ring, connection, None, result),
            Operation::SendPayload(connection, tag) => core.handle_sent(ring, connection, Some(tag), result),
            Operation::RoomToSend(connection) => core.handle_room(connection),
            Operation::Command => self.command_came()?,
            Operation::Tick => {
                self.is_tick_out = false;
                core.handle_tick(ring);
            }
        }
        Ok(())
    }

    fn command_came(&mut self) -> Result<(), QueueError> {
        // Cleared before the commands are taken, so that none is slept over.
        let _ = rustix::io::read(&self.commands.eventfd, &mut [0; 8]);
        self.ring.wait_for_command(self.commands.eventfd.as_fd());
        while let Ok(command) = self.commands.commands.try_recv() {
            match command {
                QueueCommand::Connect(sockets) => {
                    self.core.connect(&mut self.ring, sockets, Instant::now())?;
                }
                QueueCommand::Leave => self.core.leave(&mut self.ring),
                QueueCommand::Disconnect(reason) => self.core.disconnect(&mut self.ring, reason),
                QueueCommand::Look => {}
                QueueCommand::GiveUp => self.core.give_up(),
            }
        }
        Ok(())
    }

    /// The device is gone: put everything on stable storage, say goodbye, and reap the rest.
    fn finish(mut self) -> Result<(), QueueError> {
        let outcome = self.flush_finally();
        if self.core.is_up() {
            let goodbye = Request {
                flags: CommandFlags::NONE,
                command: Command::Disconnect,
                cookie: 0,
                offset_bytes: 0,
                length_bytes: 0,
            };
            for socket in self.ring.sockets() {
                // The server needs no goodbye: closing says the same.
                let _ = socket.write_all(&goodbye.encode());
            }
            self.core.close(&mut self.ring);
        }
        let deadline = Instant::now() + REAP_TIMEOUT;
        while self.core.has_operations_out() && Instant::now() < deadline {
            self.pass_for(Duration::from_millis(100))?;
        }
        outcome
    }

    /// Puts what was acknowledged on stable storage, on whichever connections there are by then.
    fn flush_finally(&mut self) -> Result<(), QueueError> {
        match self.core.begin_final_flush() {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(reason) => return Err(QueueError::FinalFlush(reason.to_owned())),
        }
        self.core.end_of_pass(&mut self.ring, Instant::now);
        let deadline = Instant::now() + FINAL_FLUSH_TIMEOUT;
        let outcome = loop {
            self.pass_for(Duration::from_millis(100))?;
            match self.core.take_final_flush() {
                Some(result) => {
                    break result.map_err(|errno| io::Error::from_raw_os_error(errno).to_string());
                }
                None if Instant::now() < deadline => {}
                None => break Err(format!("no answer within {} s", FINAL_FLUSH_TIMEOUT.as_secs())),
            }
        };
        outcome.map_err(QueueError::FinalFlush)
    }

    fn pass_for(&mut self, wait: Duration) -> Result<(), QueueError> {
        match self.pass(Some(Timespec::from(wait))) {
            Err(QueueError::Ring(error)) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            other => other,
        }
    }
}
