//! A TCP relay that passes everything on, unchanged and in order, in the least convenient portions: single bytes, odd
//! pieces, pauses, small socket buffers.
//!
//! Stands between a client of ours and an honest server. It holds little, so both sides feel each other's slowness: a
//! receive finds a part of what it wants, a send finds no room for the rest. The portions come from a seed; how the
//! kernel joins or splits them on the way does not. Knows nothing of NBD. Its threads end with their connections, the one
//! that accepts with the process.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::net::sockopt;

/// Kernel buffer of each of the relay's sockets. The kernel doubles it; much less would leave room for less than one
/// segment of the loopback interface, and stall.
const SOCKET_BUFFER_BYTES: usize = 64 << 10;
/// The sizes of what is passed on at once; any of them cuts an NBD header or a payload somewhere.
const PORTION_BYTES: [usize; 8] = [1, 2, 15, 27, 500, 4097, 30_011, 65_536];
/// One portion in so many is followed by a pause.
const PORTIONS_PER_PAUSE: u32 = 12;
/// Longer than the other side needs to notice what came.
const PAUSE: Duration = Duration::from_millis(1);

/// Starts a relay to `target`; gives the address to connect to instead.
///
/// # Errors
/// No port can be listened on.
pub fn start(target: SocketAddr, seed: u64) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // Sockets that are accepted have the listener's buffers, and the window they announce is made of them.
    shrink_buffers(&listener)?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for (near, number) in listener.incoming().zip(0..) {
            let relayed = near.and_then(|near| relay(near, target, seed.wrapping_add(number)));
            if let Err(error) = relayed {
                println!("relay to {target}: {error}");
            }
        }
    });
    Ok(address)
}

fn shrink_buffers(socket: impl std::os::fd::AsFd) -> io::Result<()> {
    sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
    sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
    Ok(())
}

fn relay(near: TcpStream, target: SocketAddr, seed: u64) -> io::Result<()> {
    let far = TcpStream::connect(target)?;
    shrink_buffers(&far)?;
    for socket in [&near, &far] {
        socket.set_nodelay(true)?;
    }
    let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
    thread::spawn(move || dribble(near, far, Rng::with_seed(seed)));
    thread::spawn(move || dribble(far_too, near_too, Rng::with_seed(!seed)));
    Ok(())
}

/// Passes on what `from` says until it ends, then says so.
fn dribble(mut from: TcpStream, mut to: TcpStream, mut rng: Rng) {
    let mut portion = [0; 65_536];
    loop {
        let wanted_bytes = PORTION_BYTES[rng.usize(..PORTION_BYTES.len())];
        let passed_on = match from.read(&mut portion[..wanted_bytes]) {
            Ok(0) | Err(_) => break,
            Ok(read_bytes) => to.write_all(&portion[..read_bytes]),
        };
        if passed_on.is_err() {
            break;
        }
        if rng.u32(..PORTIONS_PER_PAUSE) == 0 {
            thread::sleep(PAUSE);
        }
    }
    // Either side may be gone already.
    let _ = from.shutdown(Shutdown::Read);
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_arrives_in_order_both_ways() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = start(server.local_addr().unwrap(), 7).unwrap();
        let sent: Vec<u8> = (0..1_000_000_u32).map(|position| (position / 3) as u8).collect();
        let echoed = sent.clone();
        let echo = thread::spawn(move || {
            let (mut peer, _) = server.accept().unwrap();
            let mut seen = vec![0; echoed.len()];
            peer.read_exact(&mut seen).unwrap();
            assert!(seen == echoed, "on the way there");
            peer.write_all(&seen).unwrap();
        });
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(&sent).unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        assert!(back == sent, "on the way back");
        echo.join().unwrap();
    }
}
