//! The reasons that `google.rpc.ErrorInfo` carries beside a gRPC status code, and its domain.
//!
//! Stable words of the API: programs decide by code and reason, people read the message. A reason may be added, never
//! renamed. The server's management API and the client's node API take theirs from here; `volctl` maps code and reason
//! to its exit codes.

/// `ErrorInfo.domain` of every error of ours.
pub const DOMAIN: &str = "volnode";
/// Key in `ErrorInfo.metadata`: what to do next, for people.
pub const METADATA_NEXT: &str = "next";

/// INVALID_ARGUMENT: a field is off (which one: google.rpc.BadRequest or the message).
pub const INVALID_FIELD: &str = "INVALID_FIELD";
/// NOT_FOUND: no volume of that name.
pub const VOLUME_NOT_FOUND: &str = "VOLUME_NOT_FOUND";
/// ALREADY_EXISTS: a volume of that name has other properties.
pub const VOLUME_DIFFERS: &str = "VOLUME_DIFFERS";
/// FAILED_PRECONDITION: the volume is attached (metadata `node_id`: where).
pub const VOLUME_ATTACHED: &str = "VOLUME_ATTACHED";
/// FAILED_PRECONDITION: another machine of the same node id has the volume, or this machine before its reboot, and is connected.
pub const OTHER_BOOT: &str = "OTHER_BOOT";
/// UNAVAILABLE: another boot of the node has the volume, and had no time yet to come back; repeating the call goes on waiting.
pub const OTHER_BOOT_MAY_RETURN: &str = "OTHER_BOOT_MAY_RETURN";
/// FAILED_PRECONDITION: a client has the volume open.
pub const VOLUME_OPEN: &str = "VOLUME_OPEN";
/// FAILED_PRECONDITION: a volume of this backend keeps its size.
pub const SIZE_FIXED: &str = "SIZE_FIXED";
/// RESOURCE_EXHAUSTED: no space left on the server.
pub const NO_SPACE: &str = "NO_SPACE";
/// UNAVAILABLE: former connections are closed, but their I/O has not finished; repeating the call goes on from there.
pub const FENCE_UNFINISHED: &str = "FENCE_UNFINISHED";
/// UNAVAILABLE: another program has the lock of the server's catalog; repeating the call goes on where this one stopped.
pub const CATALOG_HELD: &str = "CATALOG_HELD";
/// UNAVAILABLE: the server is stopping; nothing was done.
pub const SERVER_STOPPING: &str = "SERVER_STOPPING";
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
/// ALREADY_EXISTS: the target is attached here with other properties.
pub const ATTACHED_DIFFERENTLY: &str = "ATTACHED_DIFFERENTLY";
/// FAILED_PRECONDITION: a partition of another disk of this machine has the stable name that the disk would have.
pub const NAME_TAKEN: &str = "NAME_TAKEN";
/// UNAVAILABLE: the storage server cannot be reached.
pub const SERVER_UNREACHABLE: &str = "SERVER_UNREACHABLE";
/// UNAVAILABLE: the device is gone, but the server could not be told; repeating the detach finishes it.
pub const DETACH_UNFINISHED: &str = "DETACH_UNFINISHED";
/// FAILED_PRECONDITION: a state file was written by a newer program.
pub const NEWER_FORMAT: &str = "NEWER_FORMAT";
/// INTERNAL: the node daemon failed; its log says why.
pub const NODE_FAILED: &str = "NODE_FAILED";
