//! Calls with an id that come again: while what they began goes on, when it has ended, and when what it made is gone.

use super::copies::{finish, in_progress, wait_until};
use super::*;
use crate::catalog::{Carried, RequestKey};
use crate::scope::Scope;
use std::collections::BTreeSet;

/// The calls of a server with `vol-1`, each under an id.
struct Calls {
    bench: Bench,
    plain: Lifecycle<Double>,
}

impl Calls {
    fn new() -> Self {
        let (bench, _) = Bench::with_volume();
        let plain = bench.lifecycle.clone();
        Self { bench, plain }
    }

    /// To make a call by this id.
    fn under(&mut self, number: u128) -> &Bench {
        let (request_id, fingerprint) = (Uuid::from_u128(number), format!("f{number}"));
        self.bench.lifecycle = self.plain.under(RequestKey { request_id, scope: String::new(), fingerprint });
        &self.bench
    }

    /// To make one without an id.
    fn plain(&mut self) -> &Bench {
        self.bench.lifecycle = self.plain.clone();
        &self.bench
    }

    fn is_carried_out(&mut self, number: u128) -> bool {
        matches!(self.under(number).lifecycle.catalog().carried().unwrap(), Carried::Out { .. })
    }
}

#[test]
fn a_repetition_that_waited_through_the_end_and_a_deletion_makes_no_snapshot_anew() {
    let mut calls = Calls::new();
    let first = calls.under(1).snapshot(&["vol-1"], "s").unwrap();
    assert!(calls.plain().delete_snapshot(first[0]).unwrap());
    let again = calls.under(1).start_snapshot(&["vol-1"], "s").unwrap();
    assert!(again.made == first && again.operation.is_none());
    assert_eq!(calls.bench.listed(), [""; 0]);
    assert_ne!(calls.under(2).snapshot(&["vol-1"], "s").unwrap(), first, "another call is another one");
}

#[test]
fn a_repetition_that_waited_through_the_end_and_a_deletion_makes_no_clone_anew() {
    let mut calls = Calls::new();
    let clone = |bench: &Bench| bench.start_clone("c", CloneOf::Volume("vol-1".to_owned()), 0).unwrap();
    let first = finish(clone(calls.under(1))).unwrap();
    assert!(calls.plain().delete("c").unwrap());
    let again = clone(calls.under(1));
    assert!(again.made == first && again.operation.is_none());
    assert!(calls.plain().lifecycle.catalog().volume_in_any_state("c").unwrap().is_none());
    assert_ne!(finish(clone(calls.under(2))).unwrap(), first);
}

#[test]
fn a_restore_is_not_repeated_whatever_has_become_of_its_snapshot() {
    let mut calls = Calls::new();
    let snapshot = calls.plain().snapshot(&["vol-1"], "s").unwrap()[0];
    let volume_uid = calls.under(1).restore("vol-1", snapshot).unwrap();
    assert!(calls.plain().delete_snapshot(snapshot).unwrap());
    let again = calls.under(1).start_restore("vol-1", snapshot).unwrap();
    assert!(again.made == volume_uid && again.operation.is_none());
}

#[test]
fn a_call_that_asks_for_what_another_makes_is_carried_out_with_it() {
    let mut calls = Calls::new();
    calls.bench.hold_copies();
    let first = calls.under(1).start_snapshot(&["vol-1"], "s").unwrap();
    let joined = calls.under(2).start_snapshot(&["vol-1"], "s").unwrap();
    assert!(joined.made == first.made && joined.operation.is_some());
    assert!(!calls.is_carried_out(1) && !calls.is_carried_out(2), "it goes on");
    let clone = |bench: &Bench| bench.start_clone("c", CloneOf::Volume("vol-1".to_owned()), 0).unwrap();
    let (clone, with_it) = (clone(calls.under(3)), clone(calls.under(4)));
    assert_eq!(clone.made, with_it.made);
    calls.bench.end_held(2, Ok(()));
    let made = finish(first).unwrap();
    finish(clone).unwrap();
    assert!((1..=4).all(|number| calls.is_carried_out(number)));
    calls.plain().delete_snapshot(made[0]).unwrap();
    let again = calls.under(2).start_snapshot(&["vol-1"], "s").unwrap();
    assert!(again.made == made && again.operation.is_none());
}

#[test]
fn what_came_to_nothing_leaves_none_of_its_ids() {
    let mut calls = Calls::new();
    calls.bench.hold_copies();
    let first = calls.under(1).start_snapshot(&["vol-1"], "s").unwrap();
    calls.under(2).start_snapshot(&["vol-1"], "s").unwrap();
    calls.bench.end_held(1, Err(CopyError::Failed("no".to_owned())));
    let gone = first.made.clone();
    finish(first).unwrap_err();
    assert!(!calls.is_carried_out(1) && !calls.is_carried_out(2));
    let second = calls.under(2).start_snapshot(&["vol-1"], "s").unwrap();
    calls.bench.end_held(1, Ok(()));
    assert_ne!(finish(second).unwrap(), gone);
}

#[test]
fn a_deletion_that_cancels_is_carried_out() {
    let mut calls = Calls::new();
    calls.bench.hold_copies();
    let started = calls.plain().start_snapshot(&["vol-1"], "s").unwrap();
    let copier = std::thread::spawn({
        let data_side = Arc::clone(&calls.bench.lifecycle.data_side);
        move || {
            let (report, wanted) = data_side.state.lock().unwrap().held.pop().unwrap();
            wait_until(|| report.is_cancelled());
            data_side.change(|state| state.drop_copies(&wanted));
            report.end(Err(CopyError::Cancelled));
        }
    });
    assert!(calls.under(1).delete_snapshot(started.made[0]).unwrap());
    copier.join().unwrap();
    let Carried::Out { subject, .. } = calls.bench.lifecycle.catalog().carried().unwrap() else { panic!() };
    assert_eq!(subject, started.made[0].to_string());
}

#[test]
fn a_snapshot_of_a_group_is_not_cancelled_by_who_does_not_manage_all_of_it() {
    let mut calls = Calls::new();
    let bench = calls.plain();
    for name in ["acme+db", "b+db"] {
        bench.create(name, 4096).unwrap();
    }
    bench.hold_copies();
    let started = bench.start_snapshot(&["acme+db", "b+db"], "s").unwrap();
    let of = |tenants: &[&str]| {
        Scope::Tenants(Arc::new(tenants.iter().map(|&tenant| tenant.to_owned()).collect::<BTreeSet<_>>()))
    };
    for uid in &started.made {
        let refused = |scope: &Scope| in_progress(bench.lifecycle.refuse_to_cancel(scope, *uid));
        assert!(refused(&of(&["acme"])) && refused(&of(&["b"])));
        assert!(!refused(&of(&["acme", "b"])) && !refused(&Scope::All));
    }
    bench.end_held(1, Ok(()));
    let made = finish(started).unwrap();
    bench.lifecycle.refuse_to_cancel(&of(&["acme"]), made[0]).unwrap();
}
