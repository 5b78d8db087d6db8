//! How much of the kernel's memory a connection's socket may come to hold.
//!
//! Owns the bounds and how a socket gets them: narrow, which every connection has from its first byte, and the [`WIDTHS`], of
//! which those get one that are worth it. Never: decides who is; `admission.rs` counts, `limits.rs` adds up.
//! Called by: `data/address.rs` (accept) and `admission.rs`.
//!
//! The kernel lets a socket's buffers grow with the connection's speed, up to `net.ipv4.tcp_wmem` and `tcp_rmem`: a thousand
//! clients that read no replies would hold 4 GiB, as many that send what nobody takes 32. A size that is set ends the growing
//! (`SO_SNDBUF`, `SO_RCVBUF`; socket(7)), and `SO_BUF_LOCK` (Linux 5.14, `include/uapi/linux/net.h`) lets it begin again.
#![allow(unsafe_code)] // One call of setsockopt, for options that no library of ours has.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use socket2::Socket;

use crate::limits::{NARROW_BUFFER_BYTES, NARROW_BYTES, PACKET_BYTES};

/// The sending buffer of a Unix socket, in bytes as above: the kernel's default, which goes with packets of 32 KiB.
const UNIX_BUFFER_BYTES: u64 = 208 << 10;
const _: () = assert!(UNIX_BUFFER_BYTES + PACKET_BYTES / 2 <= NARROW_BYTES);

/// How wide a socket may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Width {
    /// Each direction's buffer is no larger than this, whatever the kernel's own maximum is, in bytes as above.
    buffer_bytes_max: u64,
}

/// From the widest on: enough for 25 Gbit/s over 1 ms; for several requests of the usual sizes at once; for one of them.
pub const WIDTHS: [Width; 3] = [
    Width { buffer_bytes_max: 8 << 20 },
    Width { buffer_bytes_max: 1 << 20 },
    Width { buffer_bytes_max: 256 << 10 },
];

/// `SO_BUF_LOCK`, with the directions in which a size that was set holds.
const SO_BUF_LOCK: libc::c_int = 72;
const SOCK_SNDBUF_LOCK: libc::c_int = 1;
const SOCK_RCVBUF_LOCK: libc::c_int = 2;

/// The kernel's own maximum of each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WideSockets {
    send_bytes_max: u64,
    receive_bytes_max: u64,
}

impl WideSockets {
    /// As this machine's kernel is set, `net.ipv4.tcp_wmem` and `net.ipv4.tcp_rmem` (for IPv6, too).
    pub fn of_this_machine() -> Self {
        let maximum = |name: &str, otherwise: u64| {
            let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok();
            text.and_then(|text| text.split_whitespace().nth(2)?.parse().ok()).unwrap_or(otherwise)
        };
        // Where they cannot be read: what current kernels have.
        Self {
            send_bytes_max: maximum("tcp_wmem", 4 << 20),
            receive_bytes_max: maximum("tcp_rmem", 32 << 20),
        }
    }

    /// Of a kernel with these maxima, whatever this machine's are.
    #[cfg(test)]
    pub(crate) fn with_maxima(send_bytes_max: u64, receive_bytes_max: u64) -> Self {
        Self { send_bytes_max, receive_bytes_max }
    }

    /// The kernel memory of a socket of this width beyond that of a narrow one, in bytes; never 0.
    pub fn more_bytes(&self, width: Width) -> u64 {
        let buffer_bytes = |kernel_bytes_max: u64| {
            kernel_bytes_max.min(width.buffer_bytes_max).max(NARROW_BUFFER_BYTES) + PACKET_BYTES
        };
        let bytes = buffer_bytes(self.send_bytes_max) + buffer_bytes(self.receive_bytes_max);
        bytes.saturating_sub(NARROW_BYTES).max(1)
    }

    /// Makes a narrow TCP socket one of this width.
    ///
    /// # Errors
    /// The system's own; the socket is as it was, or wider in one direction.
    pub fn widen(&self, socket: BorrowedFd<'_>, width: Width) -> io::Result<()> {
        let bytes_max = width.buffer_bytes_max;
        let mut locked = 0;
        if self.send_bytes_max > bytes_max {
            set_buffer(socket, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, bytes_max)?;
            locked |= SOCK_SNDBUF_LOCK;
        }
        if self.receive_bytes_max > bytes_max {
            set_buffer(socket, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, bytes_max)?;
            // The window of a connection that is there already may not open for it by itself.
            set_option(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, bytes_max as libc::c_int)?;
            locked |= SOCK_RCVBUF_LOCK;
        }
        // What is not locked may grow by itself again.
        set_option(socket, libc::SOL_SOCKET, SO_BUF_LOCK, locked)
    }
}

/// Makes a TCP socket a narrow one.
///
/// # Errors
/// The system's own.
pub fn narrow(socket: &Socket) -> io::Result<()> {
    // The kernel doubles what it is given, for its own structures.
    let bytes = NARROW_BUFFER_BYTES as usize / 2;
    socket.set_send_buffer_size(bytes)?;
    socket.set_recv_buffer_size(bytes)
}

/// Bounds a Unix socket, whose buffer does not grow: what it may hold is about that of a narrow one. What comes in is the peer's
/// memory.
///
/// # Errors
/// The system's own.
pub fn bound_unix(socket: &Socket) -> io::Result<()> {
    socket.set_send_buffer_size(UNIX_BUFFER_BYTES as usize / 2)
}

/// Beyond `net.core.wmem_max` and `rmem_max` with CAP_NET_ADMIN, as far as they go without.
fn set_buffer(
    socket: BorrowedFd<'_>,
    privileged: libc::c_int,
    plain: libc::c_int,
    bytes: u64,
) -> io::Result<()> {
    let bytes = (bytes / 2) as libc::c_int;
    let set = |name| set_option(socket, libc::SOL_SOCKET, name, bytes);
    set(privileged).or_else(|_| set(plain))
}

fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let (address, length) = (std::ptr::from_ref(&value).cast(), size_of_val(&value) as libc::socklen_t);
    // SAFETY: the value is an integer of this length, borrowed for the call; the kernel copies it.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, address, length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    /// A server's socket and its client's, which takes and sends as much as it can.
    fn connect() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = Socket::from(listener.accept().unwrap().0);
        server.set_nonblocking(true).unwrap();
        client.set_nonblocking(true).unwrap();
        (server, client)
    }

    /// What the kernel holds for the socket, in bytes: `SO_MEMINFO` (55), of which 0, 4 and 5 are what was received, what is
    /// reserved and what is to be sent (`include/uapi/linux/sock_diag.h`).
    fn kernel_bytes(socket: &Socket) -> u64 {
        let mut numbers = [0u32; 9];
        let mut length = size_of_val(&numbers) as libc::socklen_t;
        let address = numbers.as_mut_ptr().cast();
        // SAFETY: the array is of the length that is given, and borrowed for the call.
        let result =
            unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, 55, address, &mut length) };
        assert_eq!(result, 0);
        [0, 4, 5].iter().map(|index| u64::from(numbers[*index])).sum()
    }

    /// Writes in pieces until nobody takes any more for a while; of the smallest there is always room for another.
    fn stuff(mut stream: impl io::Write, piece_bytes: usize) {
        let (began, mut last) = (Instant::now(), Instant::now());
        while last.elapsed() < Duration::from_millis(300) && began.elapsed() < Duration::from_secs(3) {
            match stream.write(&vec![1; piece_bytes]) {
                Ok(_) => last = Instant::now(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(5))
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Both directions move for a while, as fast as they can, so that the kernel lets the buffers grow.
    fn exercise(server: &Socket, client: &TcpStream, duration: Duration) {
        let until = Instant::now() + duration;
        let (mut server, mut client) = (server, client);
        let mut piece = vec![0; 256 << 10];
        while Instant::now() < until {
            let _ = server.write(&piece);
            let _ = client.write(&piece);
            let _ = server.read(&mut piece);
            let _ = client.read(&mut piece);
        }
    }

    /// What this machine lets this user have, in bytes as the kernel counts them.
    struct MachineLimits {
        /// Of sizes that are set: `net.core.wmem_max` and `rmem_max`, doubled as the kernel does; none for CAP_NET_ADMIN.
        set_bytes_max: Option<[u64; 2]>,
        /// Of buffers that grow: `net.ipv4.tcp_wmem` and `tcp_rmem`, and what they begin with where they may not grow.
        grown_bytes_max: [u64; 2],
    }

    impl MachineLimits {
        fn read() -> Self {
            let numbers = |name: &str| -> Vec<u64> {
                let text = fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap_or_default();
                text.split_whitespace().map(|number| number.parse().unwrap()).collect()
            };
            let socket = connect().0;
            let forced = set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 8 << 20);
            let limits = [numbers("core/wmem_max"), numbers("core/rmem_max")];
            let set_bytes_max =
                forced.err().map(|_| limits.map(|limit| limit.first().map_or(0, |bytes| 2 * bytes)));
            let may_grow = numbers("ipv4/tcp_moderate_rcvbuf") != [0];
            let at = |numbers: Vec<u64>, index: usize| numbers.get(index).copied().unwrap_or(0);
            let receive_bytes = at(numbers("ipv4/tcp_rmem"), if may_grow { 2 } else { 1 });
            Self { set_bytes_max, grown_bytes_max: [at(numbers("ipv4/tcp_wmem"), 2), receive_bytes] }
        }

        /// Of a socket of this width.
        fn allowed_bytes(&self, wide: &WideSockets, width: Width) -> u64 {
            let maxima = [wide.send_bytes_max, wide.receive_bytes_max];
            let of_direction = |direction: usize| {
                let is_set = maxima[direction] > width.buffer_bytes_max;
                let set_bytes_max = self.set_bytes_max.map_or(u64::MAX, |limits| limits[direction]);
                let allowed = if is_set { set_bytes_max } else { self.grown_bytes_max[direction] };
                allowed.min(width.buffer_bytes_max)
            };
            of_direction(0) + of_direction(1)
        }
    }

    #[test]
    fn a_narrow_socket_holds_no_more_than_it_is_counted_for_whatever_it_is_stuffed_with() {
        for piece_bytes in [1, 100, 4096, 1 << 20] {
            let (server, client) = connect();
            narrow(&server).unwrap();
            server.set_tcp_nodelay(true).unwrap();
            client.set_nodelay(true).unwrap();
            exercise(&server, &client, Duration::from_millis(500));
            stuff(&server, piece_bytes);
            stuff(&client, piece_bytes);
            let bytes = kernel_bytes(&server);
            println!("in pieces of {piece_bytes}: {bytes} of {NARROW_BYTES}");
            assert!((NARROW_BUFFER_BYTES..=NARROW_BYTES).contains(&bytes), "{piece_bytes}: {bytes}");
        }
    }

    #[test]
    fn a_wide_socket_grows_and_no_further_than_it_is_counted_for() {
        let machine = MachineLimits::read();
        let without_maximum = WideSockets { send_bytes_max: 1 << 40, receive_bytes_max: 1 << 40 };
        for wide in [WideSockets::of_this_machine(), without_maximum] {
            for width in WIDTHS {
                let (server, client) = connect();
                narrow(&server).unwrap();
                wide.widen(server.as_fd(), width).unwrap();
                let bytes_max = NARROW_BYTES + wide.more_bytes(width);
                let bytes_min = bytes_max.min(machine.allowed_bytes(&wide, width)) / 2;
                // How fast it grows is the machine's to say.
                for number in 0..20 {
                    exercise(&server, &client, Duration::from_millis(200));
                    stuff(&server, 1 << 20);
                    stuff(&client, 1 << 20);
                    let bytes = kernel_bytes(&server);
                    println!("{width:?}: {bytes} of {bytes_max}");
                    assert!(bytes <= bytes_max, "{width:?}: {bytes} of {bytes_max}");
                    if bytes >= bytes_min {
                        break;
                    }
                    assert!(number < 19, "{width:?}: {bytes}, and it was to grow to {bytes_min}");
                }
            }
        }
    }
}
