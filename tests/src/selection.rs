//! Which of all tests are wanted: by a part of their name, by a share of them, with or without the long ones.
//!
//! Read by the lab for what it runs itself, and by the VM harness for its own: the lab hands it on in environment variables.
//! A share is every N-th test of those that the filter leaves, in the order of the list: neighbours are alike, so shares take
//! about the same time.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

/// Carries [`Selection::shard`], as `I/N`.
pub const SHARD_VARIABLE: &str = "VOLNODE_LAB_SHARD";

/// Set to `1` where the long tests are wanted, too.
pub const LONG_VARIABLE: &str = "VOLNODE_LAB_LONG";

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only tests whose name contains this.
    pub filter: Option<String>,
    /// Only this share of them.
    pub shard: Option<Shard>,
    /// Also those that take longer than a run should.
    pub long: bool,
}

impl Selection {
    /// True if the filter leaves the test, were it not long.
    pub fn wants(&self, test_name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| test_name.contains(filter))
    }

    /// True if the test is in the share, being the one at `position` (from 0) of those that the filter leaves.
    pub fn has(&self, position: usize) -> bool {
        self.shard.is_none_or(|shard| shard.has(position))
    }

    /// True if there may be parts in which nothing is wanted.
    pub fn leaves_out(&self) -> bool {
        self.filter.is_some() || self.shard.is_some()
    }

    /// The selection that the lab has put into this process's environment, with `filter`.
    ///
    /// # Errors
    /// A variable holds what it should not.
    pub fn from_environment(filter: Option<&str>) -> Result<Self> {
        let shard = std::env::var(SHARD_VARIABLE).ok().map(|text| text.parse()).transpose()?;
        let long = std::env::var(LONG_VARIABLE).is_ok_and(|value| value == "1");
        Ok(Self { filter: filter.map(str::to_owned), shard, long })
    }

    /// The variables for [`Selection::from_environment`].
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let shard = self.shard.map(|shard| (SHARD_VARIABLE, shard.to_string()));
        shard.into_iter().chain(self.long.then(|| (LONG_VARIABLE, "1".to_owned()))).collect()
    }
}

/// The `index`-th of `of` shares, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: u32,
    of: u32,
}

impl Shard {
    /// All shares of `of`, in order.
    pub fn all(of: u32) -> impl Iterator<Item = Self> {
        (1..=of).map(move |index| Self { index, of })
    }

    /// True if what stands at `position` belongs to this share; everything belongs to exactly one.
    pub fn has(self, position: usize) -> bool {
        position % self.of as usize == self.index as usize - 1
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.index, self.of)
    }
}

impl FromStr for Shard {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (index, of) = text.split_once('/').with_context(|| format!("{text}: want I/N, such as 1/3"))?;
        let shard = Self { index: index.parse().context("I of I/N")?, of: of.parse().context("N of I/N")? };
        ensure!((1..=shard.of).contains(&shard.index), "{text}: I goes from 1 to N");
        Ok(shard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_is_in_one_share_and_no_share_is_empty() {
        let shares: Vec<Shard> = Shard::all(3).collect();
        assert_eq!(shares[1], "2/3".parse().unwrap());
        for position in 0..200 {
            assert_eq!(shares.iter().filter(|share| share.has(position)).count(), 1, "{position}");
        }
        assert!(shares.iter().all(|share| (0..3).any(|position| share.has(position))));
    }

    #[test]
    fn a_share_that_cannot_be_is_refused() {
        for text in ["", "1", "0/3", "4/3", "a/b", "1/0"] {
            assert!(text.parse::<Shard>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_filter_leaves_what_has_it_in_its_name() {
        let all = Selection::default();
        assert!(all.wants("x::y") && !all.leaves_out());
        let filtered = Selection { filter: Some("y".to_owned()), ..Selection::default() };
        assert!(filtered.wants("x::y") && !filtered.wants("x::z") && filtered.leaves_out());
    }
}
