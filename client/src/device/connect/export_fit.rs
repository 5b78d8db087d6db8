//! Whether an export, as a server tells it now, can go on serving a disk that was made for it as it was told before.
//!
//! A decision over plain values, called by `redial.rs`. A disk cannot change under its users but grow: what it uses has to be there, and
//! what it does not know of must not be needed. All else is taken as it comes: a server that was upgraded, moved to another disk, or
//! started with other options is the same server.

use proto::nbd::{ExportInfo, PAYLOAD_BYTES_MAX_DEFAULT, TransmissionFlags};

use crate::contract::SessionRecord;

/// What a disk may use of an export, and what it is for people.
const USED: [(TransmissionFlags, &str); 4] = [
    (TransmissionFlags::SEND_FLUSH, "FLUSH"),
    (TransmissionFlags::SEND_FUA, "FUA"),
    (TransmissionFlags::SEND_TRIM, "TRIM"),
    (TransmissionFlags::SEND_WRITE_ZEROES, "WRITE_ZEROES"),
];

/// Takes the export for a disk of this session that has come to be `export_bytes` large, with so many connections.
///
/// # Errors
/// Why it cannot be taken, and what to do about it, for the disk's state.
pub fn fits(
    session: &SessionRecord,
    export_bytes: u64,
    nr_connections: u16,
    is: &ExportInfo,
) -> Result<(), String> {
    let was = TransmissionFlags(session.export_flags);
    let sizes = is.block_sizes;
    let maximum_bytes = sizes.map_or(PAYLOAD_BYTES_MAX_DEFAULT, |sizes| sizes.maximum_bytes);
    let minimum_bytes = sizes.map_or(1, |sizes| sizes.minimum_bytes);
    let missing = USED.iter().find(|(flag, _)| was.contains(*flag) && !is.flags.contains(*flag));
    let mismatch = if is.size_bytes < export_bytes {
        format!("the export has shrunk from {export_bytes} to {} bytes", is.size_bytes)
    } else if is.flags.contains(TransmissionFlags::READ_ONLY) && !session.read_only {
        "the export has become read-only".to_owned()
    } else if let Some((_, name)) = missing {
        format!("the export cannot {name} any more, which the disk offers")
    } else if nr_connections > 1 && !is.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
        format!("the export allows one connection now, and the disk has {nr_connections}")
    } else if is.flags.contains(TransmissionFlags::SEND_FLUSH)
        && !session.volatile_cache
        && !session.read_only
    {
        "the export has a write cache now, which the disk does not know to flush".to_owned()
    } else if maximum_bytes < session.max_io_bytes {
        format!(
            "the maximum block size is {maximum_bytes} bytes now, and the disk sends up to {} in one request (volserver's \
             --request-max)",
            session.max_io_bytes
        )
    } else if minimum_bytes > session.block_size_bytes {
        format!(
            "the minimum block size is {minimum_bytes} bytes now, and the disk has sectors of {}",
            session.block_size_bytes
        )
    } else {
        return Ok(());
    };
    Err(format!("{mismatch}: change the server back, or detach the disk and attach it anew"))
}

#[cfg(test)]
mod tests {
    use proto::nbd::BlockSizes;

    use super::*;
    use crate::contract::Encryption;

    const ALL: TransmissionFlags = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::SEND_FLUSH)
        .with(TransmissionFlags::SEND_FUA)
        .with(TransmissionFlags::SEND_TRIM)
        .with(TransmissionFlags::SEND_WRITE_ZEROES)
        .with(TransmissionFlags::CAN_MULTI_CONN);

    fn session() -> SessionRecord {
        SessionRecord {
            incarnation: String::new(),
            encryption: Encryption::None,
            export_bytes: 1 << 30,
            export_flags: ALL.0,
            export_block_bytes: Some([512, 4096, 32 << 20]),
            capacity_bytes: 1 << 30,
            block_size_bytes: 4096,
            max_io_bytes: 1 << 20,
            volatile_cache: true,
            read_only: false,
        }
    }

    fn export(change: impl FnOnce(&mut ExportInfo)) -> ExportInfo {
        let sizes = BlockSizes { minimum_bytes: 512, preferred_bytes: 4096, maximum_bytes: 32 << 20 };
        let mut export =
            ExportInfo { size_bytes: 1 << 30, flags: ALL, block_sizes: Some(sizes), description: None };
        change(&mut export);
        export
    }

    fn sizes(minimum_bytes: u32, preferred_bytes: u32, maximum_bytes: u32) -> Option<BlockSizes> {
        Some(BlockSizes { minimum_bytes, preferred_bytes, maximum_bytes })
    }

    #[test]
    fn what_the_disk_does_not_use_may_change() {
        let taken =
            |change: fn(&mut ExportInfo)| assert_eq!(fits(&session(), 1 << 30, 4, &export(change)), Ok(()));
        taken(|_| {});
        taken(|export| export.size_bytes = 2 << 30);
        taken(|export| export.flags = export.flags.with(TransmissionFlags::ROTATIONAL));
        taken(|export| export.flags = export.flags.with(TransmissionFlags::SEND_CACHE));
        taken(|export| export.block_sizes = sizes(1, 512, 1 << 20));
        taken(|export| export.block_sizes = sizes(4096, 65536, 1 << 20));
        taken(|export| export.block_sizes = None);
    }

    #[test]
    fn what_the_disk_needs_has_to_be_there_and_the_refusal_says_what_to_do() {
        let refused = |session: &SessionRecord, change: &dyn Fn(&mut ExportInfo), word: &str| {
            let error = fits(session, 1 << 30, 4, &export(change)).unwrap_err();
            assert!(error.contains(word) && error.contains("attach it anew"), "{error}");
        };
        let disk = session();
        refused(&disk, &|export| export.size_bytes -= 512, "shrunk");
        refused(&disk, &|export| export.flags = export.flags.with(TransmissionFlags::READ_ONLY), "read-only");
        for (flag, name) in USED {
            refused(&disk, &|export| export.flags.0 &= !flag.0, name);
        }
        let multi_conn = TransmissionFlags::CAN_MULTI_CONN;
        refused(&disk, &|export| export.flags.0 &= !multi_conn.0, "one connection");
        refused(&disk, &|export| export.block_sizes = sizes(512, 4096, 512 << 10), "524288 bytes now");
        refused(&disk, &|export| export.block_sizes = sizes(8192, 8192, 32 << 20), "8192 bytes now");
        let flushes = TransmissionFlags::SEND_FLUSH;
        let write_through =
            SessionRecord { export_flags: ALL.0 & !flushes.0, volatile_cache: false, ..session() };
        refused(&write_through, &|_| {}, "write cache");
        let one = export(|export| export.flags.0 &= !multi_conn.0);
        assert_eq!(fits(&disk, 1 << 30, 1, &one), Ok(()), "one connection needs no more");
        let reader = SessionRecord { read_only: true, ..session() };
        let read_only = export(|export| export.flags = export.flags.with(TransmissionFlags::READ_ONLY));
        assert_eq!(fits(&reader, 1 << 30, 4, &read_only), Ok(()));
    }
}
