//! Lists in pages: CSI's, which are whole where the caller sets no bound, over the storage server's, which never are.
//!
//! Owns: the loop, and CSI's code for a token that is none. A token is the server's own. Never: keeps one. Called by the lists of
//! volumes, of their health, and of snapshots.

use tonic::Code;

use super::refusal::Refusal;

/// The server's pages have no more.
const PAGE_MAX: u32 = 1000;

/// What a list is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    at_most: Option<usize>,
    token: String,
}

impl Wanted {
    /// # Errors
    /// INVALID_ARGUMENT: a negative number.
    pub(super) fn of(max_entries: i32, starting_token: String) -> Result<Self, Refusal> {
        let entries = usize::try_from(max_entries)
            .map_err(|_| Refusal::invalid(format!("max_entries is negative: {max_entries}")))?;
        Ok(Self { at_most: (entries != 0).then_some(entries), token: starting_token })
    }

    /// Asks for pages, by their size and token, until there are enough; with the token of what follows.
    ///
    /// # Errors
    /// ABORTED: the caller's token is none; what asking for a page failed with.
    pub(super) async fn collect<T, F>(
        self,
        mut page: impl FnMut(u32, String) -> F,
    ) -> Result<(Vec<T>, String), Refusal>
    where
        F: Future<Output = Result<(Vec<T>, String), Refusal>>,
    {
        let Self { at_most, mut token } = self;
        let mut found = Vec::new();
        loop {
            let missing = at_most.map_or(PAGE_MAX as usize, |at_most| at_most - found.len());
            let size = u32::try_from(missing).unwrap_or(PAGE_MAX).min(PAGE_MAX);
            let is_callers = found.is_empty() && !token.is_empty();
            let (entries, next) = page(size, token).await.map_err(|refusal| match refusal.code {
                Code::InvalidArgument if is_callers => {
                    Refusal::pending("starting_token is none of this list; begin anew without one")
                }
                _ => refusal,
            })?;
            found.extend(entries);
            if next.is_empty() || at_most.is_some_and(|at_most| found.len() >= at_most) {
                return Ok((found, next));
            }
            token = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server with so many things, and pages of at most three.
    async fn page(things: u32, size: u32, token: String) -> Result<(Vec<u32>, String), Refusal> {
        let from = match token.as_str() {
            "" => 0,
            token => token.parse().map_err(|_| Refusal::invalid("page_token"))?,
        };
        let to = (from + size.min(3)).min(things);
        let next = if to < things { to.to_string() } else { String::new() };
        Ok(((from..to).collect(), next))
    }

    async fn list(things: u32, max_entries: i32, token: &str) -> Result<(Vec<u32>, String), Refusal> {
        let wanted = Wanted::of(max_entries, token.to_owned())?;
        wanted.collect(|size, token| page(things, size, token)).await
    }

    #[tokio::test]
    async fn without_a_bound_a_list_is_whole() {
        assert_eq!(list(10, 0, "").await, Ok(((0..10).collect(), String::new())));
        let (first, token) = list(10, 2, "").await.unwrap();
        assert_eq!(first, [0, 1]);
        assert_eq!(list(10, 0, &token).await, Ok(((2..10).collect(), String::new())));
        assert_eq!(list(10, 7, "").await, Ok(((0..7).collect(), "7".to_owned())));
        assert_eq!(list(10, 10, "").await.unwrap().1, "");
        assert_eq!(list(0, 0, "").await, Ok((Vec::new(), String::new())));
        assert_eq!(list(3, i32::MAX, "").await.unwrap().0.len(), 3);
    }

    #[tokio::test]
    async fn a_token_that_is_none_aborts() {
        assert_eq!(list(10, 0, "x").await.unwrap_err().code, Code::Aborted);
        assert_eq!(list(10, -1, "").await.unwrap_err().code, Code::InvalidArgument);
        let broken = Wanted::of(0, String::new()).unwrap();
        let page = |_, _| async { Err::<(Vec<u32>, String), _>(Refusal::invalid("another field")) };
        assert_eq!(broken.collect(page).await.unwrap_err().code, Code::InvalidArgument);
    }
}
