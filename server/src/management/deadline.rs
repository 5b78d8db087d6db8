//! Deadlines that callers set with their calls (`grpc-timeout`, by gRPC's PROTOCOL-HTTP2).
//!
//! Owns when a call is given up, and what its caller hears then. A call that is given up while it waits does nothing; what has begun is
//! finished all the same (`mod.rs`). Used by `audited.rs` for every call.

use std::future::Future;
use std::time::Duration;

use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::status;

const HEADER: &str = "grpc-timeout";
/// Digits of a timeout at most.
const DIGITS_MAX: usize = 8;
/// So much earlier than the caller: tonic has a limit of its own, and answers CANCELLED.
const HEAD_START: Duration = Duration::from_millis(2);

/// How long the caller waits; `None`: as long as it takes, or it said nothing that can be read.
pub(super) fn limit(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get(HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > DIGITS_MAX || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// The call, which is given up when the limit has passed.
pub(super) async fn within<T>(
    limit: Option<Duration>,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match limit {
        None => call.await,
        // Nothing is begun for which there is no time.
        Some(limit) if limit <= HEAD_START => Err(status::deadline_passed()),
        Some(limit) => {
            let ended = tokio::time::timeout(limit - HEAD_START, call).await;
            ended.unwrap_or_else(|_| Err(status::deadline_passed()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<Duration> {
        let mut metadata = MetadataMap::new();
        metadata.insert(HEADER, text.parse().unwrap());
        limit(&metadata)
    }

    #[tokio::test]
    async fn what_has_no_time_is_not_begun() {
        let begun = std::cell::Cell::new(false);
        let call = || async {
            begun.set(true);
            Ok(())
        };
        let late = within(Some(Duration::ZERO), call()).await.unwrap_err();
        assert_eq!((late.code(), begun.get()), (tonic::Code::DeadlineExceeded, false));
        within(None, call()).await.unwrap();
        assert!(begun.get());
    }

    #[test]
    fn a_timeout_is_read_as_grpc_has_it() {
        assert_eq!(of("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(of("2M"), Some(Duration::from_secs(120)));
        assert_eq!(of("3S"), Some(Duration::from_secs(3)));
        assert_eq!(of("99999999m"), Some(Duration::from_millis(99_999_999)));
        assert_eq!((of("5u"), of("0n")), (Some(Duration::from_micros(5)), Some(Duration::ZERO)));
        for odd in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", "123456789S", "1 S"] {
            assert_eq!(of(odd), None, "{odd:?}");
        }
        assert_eq!(limit(&MetadataMap::new()), None);
    }
}
