//! What a watch has told while it told what there is: each change that was made meanwhile is told once, in its object or for itself.
//!
//! What there is is read in pages, so that the catalog is not kept from others; changes go on between two pages. A page has all changes
//! of its objects up to a change that is known. So, of those that come after the beginning, the ones up to there are passed over, and
//! the others are told behind it. Pure; used by `run.rs`.

use std::collections::BTreeMap;

use crate::catalog::WatchedKind;

/// The pages that were told.
#[derive(Debug, Default)]
pub(super) struct Covered {
    /// By kind: up to which identity (`None`: all that follow), and up to which change; in order of both.
    pages: BTreeMap<WatchedKind, Vec<(Option<String>, i64)>>,
}

impl Covered {
    /// A page of that kind, behind the one before, with all objects up to `last` (`None`: it was the last page) as of that change.
    pub(super) fn add(&mut self, kind: WatchedKind, last: Option<String>, as_of: i64) {
        self.pages.entry(kind).or_default().push((last, as_of));
    }

    /// Whether the change of that object was in the page already.
    pub(super) fn has(&self, kind: WatchedKind, uid: &str, seq: i64) -> bool {
        let pages = self.pages.get(&kind).map(Vec::as_slice).unwrap_or_default();
        let page = pages.iter().find(|(last, _)| last.as_deref().is_none_or(|last| uid <= last));
        page.is_some_and(|(_, as_of)| seq <= *as_of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_by_the_page_that_has_it_or_behind_it() {
        let mut covered = Covered::default();
        covered.add(WatchedKind::Volume, Some("m".to_owned()), 10);
        covered.add(WatchedKind::Volume, None, 12);
        covered.add(WatchedKind::Node, None, 14);
        let has = |uid, seq| covered.has(WatchedKind::Volume, uid, seq);
        assert!(has("a", 10) && has("m", 10), "up to the last of the page");
        assert!(!has("a", 11) && !has("m", 11), "after its page was read");
        assert!(has("n", 11) && has("n", 12) && !has("n", 13), "of the next page");
        assert!(covered.has(WatchedKind::Node, "a", 14));
        assert!(!covered.has(WatchedKind::Snapshot, "a", 1), "no page of that kind was told");
    }

    /// A small world in which objects come, change and go between any two pages.
    #[test]
    fn with_changes_between_the_pages_nothing_is_told_twice_or_left_out() {
        let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut choice = move |of: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % of
        };
        for _ in 0..500 {
            let mut world: BTreeMap<String, i64> = BTreeMap::new();
            let mut history: Vec<(String, Option<i64>)> = Vec::new();
            let mut happen = |world: &mut BTreeMap<String, i64>, history: &mut Vec<_>, count: u64| {
                for _ in 0..count {
                    let uid = format!("{}", choice(10));
                    let seq = history.len() as i64 + 1;
                    if world.contains_key(&uid) && choice(2) == 0 {
                        world.remove(&uid);
                        history.push((uid, None));
                    } else {
                        world.insert(uid.clone(), seq);
                        history.push((uid, Some(seq)));
                    }
                }
                choice(4)
            };
            let mut more = happen(&mut world, &mut history, 20);
            let start = history.len();
            let (mut covered, mut told) = (Covered::default(), BTreeMap::new());
            let mut after = String::new();
            loop {
                let page: Vec<_> =
                    world.range(after.clone()..).filter(|(uid, _)| **uid > after).take(2).collect();
                let last = (page.len() == 2).then(|| page[1].0.clone());
                told.extend(page.into_iter().map(|(uid, value)| (uid.clone(), *value)));
                covered.add(WatchedKind::Volume, last.clone(), history.len() as i64);
                let Some(last) = last else { break };
                after = last;
                more = happen(&mut world, &mut history, more);
            }
            happen(&mut world, &mut history, more);
            for (number, (uid, value)) in history.iter().enumerate().skip(start) {
                if covered.has(WatchedKind::Volume, uid, number as i64 + 1) {
                    continue;
                }
                match value {
                    Some(value) => {
                        let before = told.insert(uid.clone(), *value);
                        assert!(before.is_none_or(|before| before < *value), "told twice");
                    }
                    None => assert!(told.remove(uid).is_some(), "what was never told is deleted"),
                }
            }
            assert_eq!(told, world);
        }
    }
}
