//! The reasons that `google.rpc.ErrorInfo` carries beside a gRPC status code, and its domain.
//!
//! Stable words of the API: programs decide by code and reason, people read the message. A reason may be added, never
//! renamed. The server's management API and the client's node API take theirs from here; `volctl` maps code and reason
//! to its exit codes.

/// `ErrorInfo.domain` of every error of ours.
pub const DOMAIN: &str = "volnode";
/// Key in `ErrorInfo.metadata`: what to do next, for people.
pub const METADATA_NEXT: &str = "next";
/// The same: the etag of what the call is about, as it is now.
pub const METADATA_ETAG: &str = "etag";

/// INVALID_ARGUMENT: a field is off (which one: google.rpc.BadRequest or the message).
pub const INVALID_FIELD: &str = "INVALID_FIELD";
/// INVALID_ARGUMENT: the `request_id` was given to another request within the last day.
pub const REQUEST_ID_REUSED: &str = "REQUEST_ID_REUSED";
/// ABORTED: the volume is not as the call's etag says (metadata `etag`: how it is now).
pub const VOLUME_CHANGED: &str = "VOLUME_CHANGED";
/// ABORTED: the node is not as the call's etag says (metadata `etag`: how it is now).
pub const NODE_CHANGED: &str = "NODE_CHANGED";
/// DEADLINE_EXCEEDED: the call's deadline has passed; it has done nothing, or is finished all the same.
pub const CALL_TIMED_OUT: &str = "CALL_TIMED_OUT";
/// NOT_FOUND: no volume of that name.
pub const VOLUME_NOT_FOUND: &str = "VOLUME_NOT_FOUND";
/// ALREADY_EXISTS: a volume of that name has other properties.
pub const VOLUME_DIFFERS: &str = "VOLUME_DIFFERS";
/// ALREADY_EXISTS: another volume has the name.
pub const VOLUME_NAME_TAKEN: &str = "VOLUME_NAME_TAKEN";
/// UNAVAILABLE: the volume was renamed while the call waited for it; repeating the call finds it.
pub const VOLUME_RENAMED: &str = "VOLUME_RENAMED";
/// FAILED_PRECONDITION: a volume of this backend keeps its name.
pub const NAME_FIXED: &str = "NAME_FIXED";
/// FAILED_PRECONDITION: the volume is attached (metadata `node_id`: where).
pub const VOLUME_ATTACHED: &str = "VOLUME_ATTACHED";
/// FAILED_PRECONDITION: the attach was to be under a grant, and the node has none of the volume, or one to read only.
pub const VOLUME_NOT_GRANTED: &str = "VOLUME_NOT_GRANTED";
/// FAILED_PRECONDITION: the volume is granted to a node (metadata `node_id`: which; several with commas between them).
pub const VOLUME_GRANTED: &str = "VOLUME_GRANTED";
/// ALREADY_EXISTS: the node has a grant of the volume, to read only or not, which is the other way round than was asked for.
pub const GRANTED_DIFFERENTLY: &str = "GRANTED_DIFFERENTLY";
/// FAILED_PRECONDITION: another machine of the same node id has the volume, or this machine before its reboot, and is connected.
pub const OTHER_BOOT: &str = "OTHER_BOOT";
/// UNAVAILABLE: another boot of the node has the volume, and had no time yet to come back; repeating the call goes on waiting.
pub const OTHER_BOOT_MAY_RETURN: &str = "OTHER_BOOT_MAY_RETURN";
/// NOT_FOUND: the volume has no such attachment.
pub const ATTACHMENT_NOT_FOUND: &str = "ATTACHMENT_NOT_FOUND";
/// INVALID_ARGUMENT: several nodes have the volume, and the call does not say which of them it is about.
pub const SEVERAL_HOLDERS: &str = "SEVERAL_HOLDERS";
/// FAILED_PRECONDITION: the volume is protected against deletion and restore.
pub const VOLUME_PROTECTED: &str = "VOLUME_PROTECTED";
/// FAILED_PRECONDITION: the volume is read-only, and a writer wants it.
pub const VOLUME_READ_ONLY: &str = "VOLUME_READ_ONLY";
/// FAILED_PRECONDITION: the volume is to be read-only, and somebody writes to it.
pub const VOLUME_HAS_WRITER: &str = "VOLUME_HAS_WRITER";
/// FAILED_PRECONDITION: several are to write to a volume that is not shared.
pub const VOLUME_NOT_SHARED: &str = "VOLUME_NOT_SHARED";
/// FAILED_PRECONDITION: it is not done with a volume that several write to at once.
pub const VOLUME_SHARED: &str = "VOLUME_SHARED";
/// FAILED_PRECONDITION: the volume's content cannot become that, or another attachment has to say so.
pub const CONTENT_REFUSED: &str = "CONTENT_REFUSED";
/// FAILED_PRECONDITION: a client has the volume open.
pub const VOLUME_OPEN: &str = "VOLUME_OPEN";
/// FAILED_PRECONDITION: a volume of this backend keeps its size.
pub const SIZE_FIXED: &str = "SIZE_FIXED";
/// PERMISSION_DENIED: the server's `--adopt-allow` does not name what is to be adopted.
pub const ADOPT_NOT_ALLOWED: &str = "ADOPT_NOT_ALLOWED";
/// FAILED_PRECONDITION: what is to be adopted cannot be served: no device or file, a link, of an odd size, one of our own.
pub const ADOPT_UNSUITABLE: &str = "ADOPT_UNSUITABLE";
/// FAILED_PRECONDITION: what is adopted, or is to be, is in use by something else.
pub const ADOPTED_IN_USE: &str = "ADOPTED_IN_USE";
/// FAILED_PRECONDITION: what was adopted is not there, or something else is in its place.
pub const ADOPTED_MISSING: &str = "ADOPTED_MISSING";
/// FAILED_PRECONDITION: an adopted volume has its device's size, which is another one.
pub const ADOPTED_SIZE: &str = "ADOPTED_SIZE";
/// RESOURCE_EXHAUSTED: no space left on the server.
pub const NO_SPACE: &str = "NO_SPACE";
/// NOT_FOUND: no snapshot of that name or uid.
pub const SNAPSHOT_NOT_FOUND: &str = "SNAPSHOT_NOT_FOUND";
/// ALREADY_EXISTS: there is a snapshot of that name, which is not the one that was asked for.
pub const SNAPSHOT_EXISTS: &str = "SNAPSHOT_EXISTS";
/// FAILED_PRECONDITION: the volume's storage has no snapshots.
pub const SNAPSHOTS_UNSUPPORTED: &str = "SNAPSHOTS_UNSUPPORTED";
/// FAILED_PRECONDITION: the volume is to be in a thin pool, and the server has none.
pub const NO_THIN_POOL: &str = "NO_THIN_POOL";
/// RESOURCE_EXHAUSTED: less is free than the server keeps for volumes that have snapshots.
pub const SNAPSHOT_RESERVE: &str = "SNAPSHOT_RESERVE";
/// The storage is in a state in which nothing can be copied: a thin pool that needs a check, for example.
pub const STORAGE_NOT_READY: &str = "STORAGE_NOT_READY";
/// FAILED_PRECONDITION: a client has the snapshot open.
pub const SNAPSHOT_OPEN: &str = "SNAPSHOT_OPEN";
/// FAILED_PRECONDITION: the snapshot is attached (metadata `node_id`: where; several with commas between them).
pub const SNAPSHOT_ATTACHED: &str = "SNAPSHOT_ATTACHED";
/// FAILED_PRECONDITION: the volume has snapshots, and they were not to be kept.
pub const VOLUME_HAS_SNAPSHOTS: &str = "VOLUME_HAS_SNAPSHOTS";
/// FAILED_PRECONDITION: the volume or snapshot is being copied or made (metadata `operation_id`: by what).
pub const COPY_IN_PROGRESS: &str = "COPY_IN_PROGRESS";
/// UNAVAILABLE: too many copies go on, or the volume did not stand still in time; nothing was done.
pub const COPY_BUSY: &str = "COPY_BUSY";
/// ABORTED: the operation was cancelled; nothing is left of it.
pub const COPY_CANCELLED: &str = "COPY_CANCELLED";
/// ABORTED: writes to the source were lost while it was copied; nothing is left of the copy.
pub const SOURCE_LOST_WRITES: &str = "SOURCE_LOST_WRITES";
/// NOT_FOUND: no operation of that id, or it ended long ago.
pub const OPERATION_NOT_FOUND: &str = "OPERATION_NOT_FOUND";
/// OUT_OF_RANGE: what is behind the token of a watch is not all kept any more, or the token is of another server or history.
pub const WATCH_TOKEN_TOO_OLD: &str = "WATCH_TOKEN_TOO_OLD";
/// ABORTED: whoever watches took nothing for too long.
pub const WATCH_TOO_SLOW: &str = "WATCH_TOO_SLOW";
/// RESOURCE_EXHAUSTED: as many watches go on as there may be.
pub const TOO_MANY_WATCHES: &str = "TOO_MANY_WATCHES";
/// NOT_FOUND: no node of that id has registered.
pub const NODE_NOT_FOUND: &str = "NODE_NOT_FOUND";
/// RESOURCE_EXHAUSTED: the server knows as many nodes as it may.
pub const TOO_MANY_NODES: &str = "TOO_MANY_NODES";
/// FAILED_PRECONDITION: something is attached to the node.
pub const NODE_ATTACHED: &str = "NODE_ATTACHED";
/// FAILED_PRECONDITION: something is granted to the node.
pub const NODE_GRANTED: &str = "NODE_GRANTED";
/// RESOURCE_EXHAUSTED: the node has as many volumes as it can have.
pub const NODE_FULL: &str = "NODE_FULL";
/// UNAVAILABLE: former connections are closed, but their I/O has not finished; repeating the call goes on from there.
pub const FENCE_UNFINISHED: &str = "FENCE_UNFINISHED";
/// UNAVAILABLE: another program has the lock of the server's catalog; repeating the call goes on where this one stopped.
pub const CATALOG_HELD: &str = "CATALOG_HELD";
/// UNAVAILABLE: the server is stopping; nothing was done.
pub const SERVER_STOPPING: &str = "SERVER_STOPPING";
/// NOT_FOUND: the tenant has no quota, and nothing is in its name space.
pub const TENANT_NOT_FOUND: &str = "TENANT_NOT_FOUND";
/// FAILED_PRECONDITION: something is in the tenant's name space.
pub const TENANT_NOT_EMPTY: &str = "TENANT_NOT_EMPTY";
/// FAILED_PRECONDITION: a volume stays in the name space that it was made in.
pub const TENANT_FIXED: &str = "TENANT_FIXED";
/// RESOURCE_EXHAUSTED: the tenant has as much as it may (metadata `tenant`, `quota`: which limit, `used`, `limit`).
pub const TENANT_QUOTA: &str = "TENANT_QUOTA";
/// PERMISSION_DENIED: the caller's certificate does not name what the call is about.
pub const NOT_AUTHORIZED: &str = "NOT_AUTHORIZED";
/// INTERNAL: the server failed; its log says why.
pub const SERVER_FAILED: &str = "SERVER_FAILED";

/// FAILED_PRECONDITION: this machine has no ublk driver.
pub const NO_UBLK_DRIVER: &str = "NO_UBLK_DRIVER";
/// FAILED_PRECONDITION: the node daemon lacks the right to make block devices.
pub const NOT_PERMITTED: &str = "NOT_PERMITTED";
/// FAILED_PRECONDITION: this kernel cannot do the data path that was asked for.
pub const DATA_PATH_UNSUPPORTED: &str = "DATA_PATH_UNSUPPORTED";
/// FAILED_PRECONDITION: somebody has the device open.
pub const DEVICE_OPEN: &str = "DEVICE_OPEN";
/// NOT_FOUND: nothing of that name is attached to this machine.
pub const NOT_ATTACHED: &str = "NOT_ATTACHED";
/// FAILED_PRECONDITION: the device is dead or answers EIO for good; detach it first.
pub const DEVICE_FAILED: &str = "DEVICE_FAILED";
/// FAILED_PRECONDITION: the device cannot change hands, or not now.
pub const UPGRADE_REFUSED: &str = "UPGRADE_REFUSED";
/// FAILED_PRECONDITION: the device process could not make the device.
pub const DEVICE_START_FAILED: &str = "DEVICE_START_FAILED";
/// DEADLINE_EXCEEDED: the device process did not get ready, or did not answer, in time.
pub const DEVICE_TIMED_OUT: &str = "DEVICE_TIMED_OUT";
/// FAILED_PRECONDITION: the volume has no file system that is mounted on this machine.
pub const NOT_MOUNTED: &str = "NOT_MOUNTED";
/// FAILED_PRECONDITION: a file system cannot be frozen, or not in time.
pub const FREEZE_FAILED: &str = "FREEZE_FAILED";
/// ALREADY_EXISTS: the target is attached here with other properties.
pub const ATTACHED_DIFFERENTLY: &str = "ATTACHED_DIFFERENTLY";
/// FAILED_PRECONDITION: a partition of another disk of this machine has the stable name that the disk would have.
pub const NAME_TAKEN: &str = "NAME_TAKEN";
/// FAILED_PRECONDITION: the volume is encrypted, and no passphrase was given.
pub const PASSPHRASE_MISSING: &str = "PASSPHRASE_MISSING";
/// FAILED_PRECONDITION: the passphrase is not one of the encrypted volume's.
pub const PASSPHRASE_WRONG: &str = "PASSPHRASE_WRONG";
/// FAILED_PRECONDITION: what is on an encrypted volume's disk, or known of it, does not allow that it is made or opened.
pub const ENCRYPTION_REFUSED: &str = "ENCRYPTION_REFUSED";
/// FAILED_PRECONDITION: this machine has no cryptsetup, which opens encrypted volumes.
pub const NO_CRYPTSETUP: &str = "NO_CRYPTSETUP";
/// UNAVAILABLE: the storage server cannot be reached.
pub const SERVER_UNREACHABLE: &str = "SERVER_UNREACHABLE";
/// UNAVAILABLE: the device is gone, but the server could not be told; repeating the detach finishes it.
pub const DETACH_UNFINISHED: &str = "DETACH_UNFINISHED";
/// FAILED_PRECONDITION: a state file was written by a newer program.
pub const NEWER_FORMAT: &str = "NEWER_FORMAT";
/// INTERNAL: the node daemon failed; its log says why.
pub const NODE_FAILED: &str = "NODE_FAILED";
