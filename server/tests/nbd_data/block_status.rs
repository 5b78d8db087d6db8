//! `base:allocation`: what is told of holes, to foreign clients and to a client of our own that looks at every byte.

use proto::nbd::block_status::ExtentState;
use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use proto::nbd::{HeaderStyle, TransmissionFlags};
use server::backend::file::CacheMode;
use server::catalog::BackendKind;

use super::chunks::{ChunkClient, Offer};
use super::foreign::have;
use super::support::{Server, run};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const HOLE: u64 = ExtentState::HOLE.0 as u64;
pub(crate) const DATA: u64 = ExtentState::DATA.0 as u64;

/// Starts a server with a volume of 16 MiB on the backend: data at 1 MiB (64 KiB) and at 8 MiB (1 MiB), the rest a hole.
fn with_holes(backend: BackendKind, cache: CacheMode) -> (Server, String) {
    let server = Server::start_with(|config| {
        config.export_by_name = true;
        config.cache = cache;
    });
    server.create_with("vol", 16 * MIB, |new| new.backend = backend);
    let mut client = super::client::Client::open(server.address(), "vol").unwrap();
    client.write(MIB, &[1; 64 << 10]).unwrap();
    client.write(8 * MIB, &[2; MIB as usize]).unwrap();
    let uri = format!("nbd://{}/vol", server.address());
    (server, uri)
}

/// What a volume's data may be rounded up to: memory comes in huge pages where the kernel has them.
fn granularity(backend: BackendKind) -> u64 {
    match backend {
        BackendKind::File | BackendKind::Device | BackendKind::Lvm => 4096,
        BackendKind::Memory => 2 * MIB,
    }
}

const BACKENDS: [(BackendKind, CacheMode); 3] = [
    (BackendKind::File, CacheMode::Auto),
    (BackendKind::File, CacheMode::Buffered),
    (BackendKind::Memory, CacheMode::Auto),
];

/// Looks whether the extents are those of [`with_holes`].
fn check(extents: &[(u64, u64, bool)], backend: BackendKind) {
    let (mut end, unit) = (0, granularity(backend));
    for &(start, length, is_hole) in extents {
        assert_eq!(start, end, "{extents:?}");
        end += length;
        let touches = |from: u64, to: u64| start < to && from < end;
        let has_data = touches(MIB, MIB + (64 << 10)) || touches(8 * MIB, 9 * MIB);
        assert!(!(is_hole && has_data), "a hole with data: {extents:?}");
        let near = |from: u64, to: u64| start >= from / unit * unit && end <= to.next_multiple_of(unit);
        let is_near_data = near(MIB, MIB + (64 << 10)) || near(8 * MIB, 9 * MIB);
        assert!(is_hole || is_near_data, "data where there is none: {extents:?}");
    }
    assert_eq!(end, 16 * MIB, "{extents:?}");
    assert!(extents.iter().any(|extent| extent.2), "no hole: {extents:?}");
}

fn number(text: &str, key: &str) -> u64 {
    let rest = text.split(&format!("\"{key}\":")).nth(1).unwrap().trim_start();
    rest.split([',', '}', ' ']).next().unwrap().trim().parse().unwrap()
}

#[test]
fn nbdinfo_maps_the_holes() {
    if !have(&["nbdinfo"]) {
        return;
    }
    for (backend, cache) in BACKENDS {
        let (_server, uri) = with_holes(backend, cache);
        let map = run("nbdinfo", &["--map", "--json", &uri]);
        let extents: Vec<_> = map
            .split('{')
            .skip(1)
            .map(|extent| {
                (number(extent, "offset"), number(extent, "length"), number(extent, "type") == HOLE)
            })
            .collect();
        check(&extents, backend);
    }
}

#[test]
fn qemu_img_maps_the_holes() {
    if !have(&["qemu-img"]) {
        return;
    }
    for (backend, cache) in BACKENDS {
        let (_server, uri) = with_holes(backend, cache);
        let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
        let extents: Vec<_> = map
            .split('{')
            .skip(1)
            .map(|extent| {
                let is_hole = extent.contains("\"zero\": true");
                assert_eq!(is_hole, extent.contains("\"data\": false"), "{extent}");
                (number(extent, "start"), number(extent, "length"), is_hole)
            })
            .collect();
        check(&extents, backend);
    }
}

pub(crate) fn offers() -> [Offer; 2] {
    let structured = Offer { headers: HeaderStyle::Structured, allocation_context: true };
    [structured, Offer { headers: HeaderStyle::Extended, ..structured }]
}

#[test]
fn extents_cover_the_request_and_nothing_else() {
    for (backend, cache) in BACKENDS {
        let (server, _) = with_holes(backend, cache);
        for offer in offers() {
            let mut client = ChunkClient::open(server.address(), "vol", offer);
            assert_eq!(client.size_bytes, 16 * MIB);
            let extents = client.extents(CommandFlags::NONE, 0, 16 * MIB).unwrap();
            let mut at = 0;
            let placed: Vec<_> = extents
                .iter()
                .map(|&(length, state)| {
                    at += length;
                    (at - length, length, state == HOLE)
                })
                .collect();
            check(&placed, backend);
            assert!(extents.windows(2).all(|pair| pair[0].1 != pair[1].1), "neighbours differ: {extents:?}");
            let inside = client.extents(CommandFlags::NONE, MIB + 4096, 8192).unwrap();
            assert_eq!(inside, [(8192, DATA)]);
            let one = client.extents(CommandFlags::REQ_ONE, 8 * MIB, 8 * MIB).unwrap();
            assert!(one.len() == 1 && one[0].1 == DATA && one[0].0 >= MIB, "{one:?}");
            let end = client.extents(CommandFlags::REQ_ONE, 15 * MIB, MIB).unwrap();
            assert_eq!(end, [(MIB, HOLE)]);
        }
    }
}

#[test]
fn what_was_written_or_zeroed_before_is_in_the_map() {
    for (backend, cache) in BACKENDS {
        let (server, _) = with_holes(backend, cache);
        for offer in offers() {
            let mut client = ChunkClient::open(server.address(), "vol", offer);
            for block in (0..64u64).map(|number| 12 * MIB + number * 32768) {
                client.write(block, &[7; 4096]).unwrap();
                let written = client.extents(CommandFlags::NONE, block, 4096).unwrap();
                assert_eq!(written, [(4096, DATA)], "{backend:?} {cache:?}");
            }
            client.call(Command::WriteZeroes, CommandFlags::NONE, 12 * MIB, 2 * MIB, &[]).unwrap();
            let zeroed = client.extents(CommandFlags::NONE, 12 * MIB, 2 * MIB).unwrap();
            assert_eq!(zeroed, [(2 * MIB, HOLE)], "{backend:?} {cache:?}");
        }
    }
}

#[test]
fn block_status_without_a_context_for_this_export_is_invalid() {
    let (server, _) = with_holes(BackendKind::File, CacheMode::Auto);
    server.create("other", MIB);
    let einval = Err(NbdError::Einval as u32);
    for offer in offers() {
        let none = Offer { allocation_context: false, ..offer };
        let mut client = ChunkClient::open(server.address(), "vol", none);
        assert_eq!(client.extents(CommandFlags::NONE, 0, MIB), einval);
        assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]), "the connection lives");
        let mut of_other = ChunkClient::open_after_selecting(server.address(), "other", "vol", offer);
        assert_eq!(of_other.extents(CommandFlags::NONE, 0, MIB), einval);
    }
}

#[test]
fn block_status_outside_the_export_is_invalid() {
    let (server, _) = with_holes(BackendKind::File, CacheMode::Auto);
    let einval = Err(NbdError::Einval as u32);
    for offer in offers() {
        let mut client = ChunkClient::open(server.address(), "vol", offer);
        assert_eq!(client.extents(CommandFlags::NONE, 16 * MIB, 4096), einval);
        assert_eq!(client.extents(CommandFlags::NONE, 16 * MIB - 4096, 8192), einval);
        assert_eq!(client.extents(CommandFlags::NONE, 0, 0), einval);
        assert_eq!(client.extents(CommandFlags::DF, 0, 4096), einval);
    }
}

#[test]
fn status_payloads_select_the_context_and_others_are_consumed() {
    let (server, _) = with_holes(BackendKind::Memory, CacheMode::Auto);
    let [structured, extended] = offers();
    let mut client = ChunkClient::open(server.address(), "vol", extended);
    assert!(client.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
    let id = client.context_id;
    let payload = |effect: u64, ids: &[u32]| {
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_be_bytes()).collect();
        [&effect.to_be_bytes()[..], &ids].concat()
    };
    let flags = CommandFlags::PAYLOAD_LEN;
    let found = client.extents_by(flags, 14 * MIB, &payload(MIB, &[id])).unwrap();
    assert_eq!(found, [(MIB, HOLE)]);
    let one = client.extents_by(flags.with(CommandFlags::REQ_ONE), 14 * MIB, &payload(4096, &[id])).unwrap();
    assert_eq!(one, [(4096, HOLE)]);
    let einval = Err(NbdError::Einval as u32);
    for odd in [
        payload(MIB, &[id ^ 1]),
        payload(MIB, &[id, id]),
        payload(MIB, &[]),
        payload(17 * MIB, &[id]),
        payload(MIB, &[id])[..11].to_vec(),
        vec![0],
        vec![9; 100_000],
    ] {
        assert_eq!(client.extents_by(flags, 0, &odd), einval, "{} bytes", odd.len());
    }
    assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]), "the stream is still in step");
    let without = ChunkClient::open(server.address(), "vol", structured);
    assert!(!without.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
}
