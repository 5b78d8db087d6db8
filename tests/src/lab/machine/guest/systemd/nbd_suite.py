"""What a client does with a volume of the server in the unit: nbd_suite.py suite|write|read|size URI [CERTIFICATES].

suite: every command, and large reads from the page cache; leaves the pattern at the volume's end, flushed.
write: the pattern at the volume's begin, acknowledged and not flushed. read: it has to be there. size: prints it.
"""
import sys

import nbd

MIB = 1 << 20
PATTERN = bytes((i * 7 + 3) % 251 for i in range(65536)) * 16


def check(what, holds):
    if not holds:
        sys.exit(f"nbd_suite: {what}")


def connect(uri, certificates):
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    if certificates:
        h.set_tls(nbd.TLS_REQUIRE)
        h.set_tls_certificates(certificates)
        h.set_export_name(uri.rsplit("/", 1)[1])
        h.connect_tcp("localhost", "10809")
    else:
        h.connect_uri(uri)
    return h


def flush(h):
    # Without a write cache there is nothing to flush, and no such command.
    if h.can_flush():
        h.flush()


def suite(h):
    size = h.get_size()
    h.pwrite(PATTERN, 0)
    flush(h)
    check("what was written is read", h.pread(MIB, 0) == PATTERN)
    h.pwrite(PATTERN[:8192], MIB, nbd.CMD_FLAG_FUA)
    check("FUA", h.pread(8192, MIB) == PATTERN[:8192])
    h.zero(65536, 0)
    h.zero(65536, 65536, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
    h.trim(65536, 131072, nbd.CMD_FLAG_FUA)
    check("zeroes", h.pread(3 * 65536, 0) == bytes(3 * 65536))
    check("the rest stays", h.pread(MIB - 3 * 65536, 3 * 65536) == PATTERN[3 * 65536 :])
    h.cache(MIB, 0)
    extents = []

    def take(context, offset, entries, error):
        extents.extend(entries)

    h.block_status(65536, 0, take)
    check("block status", extents and extents[1] & nbd.STATE_ZERO)
    # Twice: the second time all of it is in the page cache, if there is one.
    for offset in range(2 * MIB, 10 * MIB, MIB):
        h.pwrite(PATTERN, offset)
    flush(h)
    for _ in range(2):
        check("large reads", h.pread(8 * MIB, 2 * MIB) == PATTERN * 8)
        for offset in range(2 * MIB, 10 * MIB, 128 << 10):
            at = offset % MIB
            check("a read", h.pread(128 << 10, offset) == PATTERN[at : at + (128 << 10)])
    h.pwrite(PATTERN, size - MIB, nbd.CMD_FLAG_FUA)
    h.shutdown()


def main(what, uri, certificates=None):
    h = connect(uri, certificates)
    if what == "suite":
        suite(h)
    elif what == "write":
        h.pwrite(PATTERN, 0)
        # Gone without a word, as a client that was killed.
    elif what == "read":
        check("what was acknowledged is there", h.pread(MIB, 0) == PATTERN)
    else:
        print(h.get_size())


main(*sys.argv[1:])
