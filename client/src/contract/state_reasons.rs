//! How a disk's reason for its state begins, for programs that go by it: kept, as states are.

/// Stalled: requests wait.
pub const IO_WAITS: &str = "I/O waits";
/// Stalled: requests fail, as the policy wants.
pub const IO_FAILS: &str = "I/O fails until the server is back";
/// Failed: acknowledged writes are lost, and not only the attachment.
pub const WRITES_LOST: &str = "the storage server came back without writes that it had acknowledged";

/// Failed: whether the server itself said that the attachment is no more. The words are those of `SlotError::Ended`.
pub fn is_the_servers(reason: &str) -> bool {
    reason.starts_with("the server at ") && reason.contains(" says: ")
}
