//! From single runs, made in rounds, to one row for each cell and subject.
//!
//! Called by `summary`. Knows neither what was run nor what a row says: it sorts, and sees that nothing is missing.

use anyhow::{Result, ensure};

/// What has to be there.
pub(crate) struct Rounds<C> {
    /// How often each cell was run on each subject.
    pub(crate) rounds: usize,
    pub(crate) cells: Vec<C>,
    /// The subjects' names, for messages.
    pub(crate) subjects: Vec<String>,
}

impl<C: Copy + PartialEq> Rounds<C> {
    /// The row of every subject and cell, by cell, then by subject. `of` says to which subject and cell a sample belongs, `row`
    /// makes one of the samples of all rounds.
    ///
    /// # Errors
    /// A round is missing, or there is one too many.
    pub(crate) fn rows<S, R>(
        &self,
        samples: &[S],
        of: impl Fn(&S) -> (usize, C),
        heading: impl Fn(&C) -> String,
        row: impl Fn(usize, C, &[&S]) -> R,
    ) -> Result<Vec<R>> {
        let mut rows = Vec::new();
        for &cell in &self.cells {
            for (subject, name) in self.subjects.iter().enumerate() {
                let rounds: Vec<&S> = samples.iter().filter(|sample| of(sample) == (subject, cell)).collect();
                let (count, wanted) = (rounds.len(), self.rounds);
                ensure!(count == wanted, "{count} rounds of {wanted} for {name}, {}", heading(&cell));
                rows.push(row(subject, cell, &rounds));
            }
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rounds of the cells 'a' and 'b' on two subjects.
    const ROUNDS: [(usize, char); 8] =
        [(0, 'a'), (1, 'a'), (0, 'b'), (1, 'b'), (1, 'b'), (1, 'a'), (0, 'b'), (0, 'a')];

    fn rows(samples: &[(usize, char)]) -> Result<Vec<(usize, char, usize)>> {
        let subjects = vec!["first".to_owned(), "second".to_owned()];
        let rounds = Rounds { rounds: 2, cells: vec!['a', 'b'], subjects };
        let row = |subject, cell, samples: &[&(usize, char)]| (subject, cell, samples.len());
        rounds.rows(samples, |sample| *sample, |cell| format!("cell {cell}"), row)
    }

    #[test]
    fn rows_are_in_the_plans_order_and_have_the_samples_of_all_rounds() {
        assert_eq!(rows(&ROUNDS).unwrap(), [(0, 'a', 2), (1, 'a', 2), (0, 'b', 2), (1, 'b', 2)]);
    }

    #[test]
    fn a_missing_round_is_an_error_and_so_is_one_too_many() {
        let error = rows(&ROUNDS[..7]).unwrap_err().to_string();
        assert_eq!(error, "1 rounds of 2 for first, cell a");
        assert!(rows(&[&ROUNDS[..], &[(1, 'b')]].concat()).is_err());
    }
}
