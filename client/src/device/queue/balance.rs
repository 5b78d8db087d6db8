//! Which connection of a queue takes the next request.
//!
//! The one with the fewest in flight, so that a slow one gets less; among equals the next in turn, so that all are used.
//! Called by `run.rs`. Pure state; nothing here allocates after construction.

/// The queue's connections and the requests on them.
#[derive(Debug)]
pub struct Balance {
    /// By connection.
    in_flight: Box<[u16]>,
    /// By tag: the connection that its request is on.
    connections: Box<[u16]>,
    /// Took the last request.
    last: usize,
}

impl Balance {
    /// For so many connections, at least one, and tags.
    pub fn new(nr_connections: usize, tags: u16) -> Self {
        assert!(nr_connections > 0, "a queue has a connection");
        Self {
            in_flight: vec![0; nr_connections].into_boxed_slice(),
            connections: vec![0; usize::from(tags)].into_boxed_slice(),
            last: nr_connections - 1,
        }
    }

    /// The connection for the tag's request, which is in flight from now on.
    pub fn choose(&mut self, tag: u16) -> u16 {
        let nr_connections = self.in_flight.len();
        let mut chosen = (self.last + 1) % nr_connections;
        for step in 2..=nr_connections {
            let next = (self.last + step) % nr_connections;
            if self.in_flight[next] < self.in_flight[chosen] {
                chosen = next;
            }
        }
        self.last = chosen;
        self.in_flight[chosen] += 1;
        self.connections[usize::from(tag)] = chosen as u16;
        chosen as u16
    }

    /// The tag's request ended.
    pub fn ended(&mut self, tag: u16) {
        self.in_flight[usize::from(self.connections[usize::from(tag)])] -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_take_turns() {
        let mut balance = Balance::new(3, 8);
        let taken: Vec<u16> = (0..6).map(|tag| balance.choose(tag)).collect();
        assert_eq!(taken, [0, 1, 2, 0, 1, 2]);
        // One request at a time goes around, too.
        let mut balance = Balance::new(2, 8);
        for turn in 0..6 {
            assert_eq!(balance.choose(0), turn % 2);
            balance.ended(0);
        }
    }

    #[test]
    fn a_connection_that_answers_late_gets_less() {
        let mut balance = Balance::new(2, 8);
        assert_eq!((balance.choose(0), balance.choose(1)), (0, 1));
        for tag in [2, 3, 4] {
            balance.ended(if tag == 2 { 1 } else { tag - 1 });
            assert_eq!(balance.choose(tag), 1, "connection 0 has not answered yet");
        }
        balance.ended(0);
        assert_eq!(balance.choose(5), 0);
    }

    #[test]
    fn a_single_connection_takes_all() {
        let mut balance = Balance::new(1, 4);
        assert_eq!((balance.choose(0), balance.choose(1), balance.choose(2)), (0, 0, 0));
    }
}
