//! Locks on names.

use super::*;

#[test]
fn a_locked_name_keeps_others_out_and_other_names_go_on() {
    let locks = Arc::new(NameLocks::default());
    let held = locks.blocking_lock("vol-1");
    let (sender, receiver) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn({
        let locks = Arc::clone(&locks);
        move || {
            drop(locks.blocking_lock("vol-2"));
            sender.send("other name").unwrap();
            drop(locks.blocking_lock("vol-1"));
            sender.send("same name").unwrap();
        }
    });
    let deadline = std::time::Duration::from_secs(10);
    assert_eq!(receiver.recv_timeout(deadline), Ok("other name"));
    assert!(receiver.try_recv().is_err(), "the name is still locked");
    drop(held);
    assert_eq!(receiver.recv_timeout(deadline), Ok("same name"));
    waiting.join().unwrap();
}
