//! What a completion of a queue's ring belongs to, and how an entry's `user_data` says so.

/// In the user data of a send by reference: what its notification says is sure (`ByReference::is_sure_of`).
pub(super) const IS_SURE: u64 = 1 << 48;

/// What a completion belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// FETCH or COMMIT of a tag.
    Tag(u16),
    /// RECV into a connection's inbox.
    ReceiveInbox(u16),
    /// RECV of a tag's payload on a connection.
    ReceivePayload(u16, u16),
    /// SEND from a connection's outbox.
    SendOutbox(u16),
    /// SEND of a tag's payload on a connection.
    SendPayload(u16, u16),
    /// REGISTER_IO_BUF of a tag, where the driver does not do it by itself.
    Register(u16),
    /// UNREGISTER_IO_BUF of a tag.
    Unregister(u16),
    /// POLL for room in a connection's socket.
    RoomToSend(u16),
    /// POLL of the eventfd: the main thread has a command.
    Command,
    /// TIMEOUT: time to see whether replies still come.
    Tick,
}

impl Operation {
    pub(super) const fn to_user_data(self) -> u64 {
        let (kind, connection, tag) = match self {
            Self::Tag(tag) => (0, 0, tag),
            Self::ReceiveInbox(connection) => (1, connection, 0),
            Self::ReceivePayload(connection, tag) => (2, connection, tag),
            Self::SendOutbox(connection) => (3, connection, 0),
            Self::SendPayload(connection, tag) => (4, connection, tag),
            Self::Register(tag) => (5, 0, tag),
            Self::Unregister(tag) => (6, 0, tag),
            Self::RoomToSend(connection) => (7, connection, 0),
            Self::Command => (8, 0, 0),
            Self::Tick => (9, 0, 0),
        };
        (kind as u64) << 32 | (connection as u64) << 16 | tag as u64
    }

    /// Whether memory or sockets of ours have to outlive it. The kernel itself holds on to the pages of a request until no socket
    /// refers to them, and gives the request back only then.
    pub(super) const fn names_memory(self) -> bool {
        !matches!(self, Self::Command | Self::Tick)
    }

    pub(super) fn from_user_data(user_data: u64) -> Self {
        let (connection, tag) = ((user_data >> 16) as u16, user_data as u16);
        match (user_data & !IS_SURE) >> 32 {
            0 => Self::Tag(tag),
            1 => Self::ReceiveInbox(connection),
            2 => Self::ReceivePayload(connection, tag),
            3 => Self::SendOutbox(connection),
            4 => Self::SendPayload(connection, tag),
            5 => Self::Register(tag),
            6 => Self::Unregister(tag),
            7 => Self::RoomToSend(connection),
            8 => Self::Command,
            9 => Self::Tick,
            kind => unreachable!("completion of kind {kind}, which is never submitted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_survives_a_round_trip() {
        let operations = [
            Operation::Tag(4095),
            Operation::ReceiveInbox(255),
            Operation::ReceivePayload(3, 1),
            Operation::SendOutbox(u16::MAX),
            Operation::SendPayload(u16::MAX, 2),
            Operation::Register(3),
            Operation::Unregister(u16::MAX),
            Operation::RoomToSend(7),
            Operation::Command,
            Operation::Tick,
        ];
        for operation in operations {
            assert_eq!(Operation::from_user_data(operation.to_user_data()), operation);
        }
    }
}
