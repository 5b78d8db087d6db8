//! Resume tokens: where a watch goes on.
//!
//! A token names a change: by the server, by its number, and by its mark, so that the same number in another history (a catalog that was
//! put back from a backup) is not taken for it. With it goes the uid of the volume that the watch was of: whoever goes on by a name means
//! the volume that had it then. Callers must not look into it; nothing secret is in it, and no state is kept for it.

use uuid::Uuid;

use crate::catalog::ChangePoint;

/// What a token of ours begins with.
const PREFIX: &str = "1.watch.";
/// Characters of a mark.
const MARK_LENGTH: usize = 16;

/// What the tokens of one watch have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    /// Whose changes they are.
    pub(super) server_id: Uuid,
    /// The volume that is watched, where it is one.
    pub(super) volume_uid: Option<String>,
}

/// A token that a caller gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    origin: Origin,
    point: ChangePoint,
}

/// What is behind a token cannot be told: it is too old, of another server, or of another history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooOld;

impl Token {
    /// Reads a token; `None`: a text that no watch has given.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix(PREFIX)?.split('.');
        let (server_id, seq, mark) = (parts.next()?, parts.next()?, parts.next()?);
        let is_number = !seq.is_empty() && seq.bytes().all(|byte| byte.is_ascii_digit());
        let is_mark = mark.len() == MARK_LENGTH && mark.bytes().all(|byte| byte.is_ascii_hexdigit());
        let volume_uid = match parts.next() {
            Some(uid) => Some(Uuid::try_parse(uid).ok()?.to_string()),
            None => None,
        };
        if parts.next().is_some() || !is_number || !is_mark {
            return None;
        }
        let point = ChangePoint { seq: seq.parse().ok()?, mark: mark.to_owned() };
        let origin = Origin { server_id: Uuid::try_parse(server_id).ok()?, volume_uid };
        Some(Self { origin, point })
    }

    /// The token of a change.
    pub(super) fn text(origin: &Origin, point: &ChangePoint) -> String {
        let Origin { server_id, volume_uid } = origin;
        let of_volume = volume_uid.as_ref().map_or_else(String::new, |uid| format!(".{uid}"));
        format!("{PREFIX}{server_id}.{}.{}{of_volume}", point.seq, point.mark)
    }

    /// The volume that the watch was of; `None`: of all.
    pub(super) fn volume_uid(&self) -> Option<&str> {
        self.origin.volume_uid.as_deref()
    }

    /// Which change this is the token of, if it is one that the server might know.
    pub(super) fn of_server(self, server_id: Uuid) -> Result<ChangePoint, TooOld> {
        if self.origin.server_id == server_id { Ok(self.point) } else { Err(TooOld) }
    }
}

/// Whether a watch may go on behind a point, of which the catalog has this mark (`None`: no such change, or not any more).
pub(super) fn check(point: ChangePoint, mark: Option<&str>) -> Result<ChangePoint, TooOld> {
    if mark == Some(point.mark.as_str()) { Ok(point) } else { Err(TooOld) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: &str = "00ff00ff00ff00ff";

    fn point(seq: i64) -> ChangePoint {
        ChangePoint { seq, mark: MARK.to_owned() }
    }

    fn of_all(server_id: Uuid) -> Origin {
        Origin { server_id, volume_uid: None }
    }

    #[test]
    fn a_token_says_which_volume_was_watched() {
        let uid = Uuid::from_u128(3).to_string();
        let origin = Origin { volume_uid: Some(uid.clone()), ..of_all(Uuid::from_u128(1)) };
        let text = Token::text(&origin, &point(7));
        let token = Token::parse(&text).unwrap();
        assert_eq!((token.volume_uid(), &token.origin), (Some(uid.as_str()), &origin));
        assert_eq!(token.of_server(origin.server_id), Ok(point(7)));
        for text in [format!("{text}.{uid}"), format!("{text}x"), text.replace(&uid, "")] {
            assert_eq!(Token::parse(&text), None, "{text}");
        }
        let all = Token::parse(&Token::text(&of_all(origin.server_id), &point(7))).unwrap();
        assert_eq!(all.volume_uid(), None);
    }

    #[test]
    fn a_token_is_of_one_change_of_one_server() {
        let (server, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let token = Token::parse(&Token::text(&of_all(server), &point(7))).unwrap();
        assert_eq!(token.clone().of_server(server), Ok(point(7)));
        assert_eq!(token.of_server(other), Err(TooOld));
    }

    #[test]
    fn what_is_no_token_is_told_from_one_that_is_too_old() {
        let good = Token::text(&of_all(Uuid::from_u128(1)), &point(7));
        assert!(Token::parse(&good).is_some());
        for text in [
            String::new(),
            "x".to_owned(),
            good.replace("watch", "volumes"),
            good.replace(".7.", ".."),
            good.replace(".7.", ".-7."),
            good.replace(".7.", ".+7."),
            good.replace(".7.", ".99999999999999999999."),
            good.replace(MARK, "00ff"),
            good.replace(MARK, "00ff00ff00ff00fx"),
            format!("{good}.1"),
            good.replace("1.watch.0", "1.watch.x"),
        ] {
            assert_eq!(Token::parse(&text), None, "{text}");
        }
    }

    #[test]
    fn what_was_pruned_is_to_come_or_is_of_another_history_is_too_old() {
        assert_eq!(check(point(7), Some(MARK)), Ok(point(7)));
        assert_eq!(check(point(7), None), Err(TooOld));
        assert_eq!(check(point(7), Some("1111111111111111")), Err(TooOld));
    }
}
