//! Which connection of a queue takes the next request.
//!
//! The one with the fewest in flight, so that a slow one gets less; among equals the next in turn, so that all are used.
//! Called by `core.rs`. Pure state; nothing here allocates.

/// Whose turn it is.
#[derive(Debug)]
pub struct Balance {
    nr_connections: u16,
    /// Took the last request.
    last: u16,
}

impl Balance {
    /// For so many connections, at least one.
    pub fn new(nr_connections: u16) -> Self {
        assert!(nr_connections > 0, "a queue has a connection");
        Self { nr_connections, last: nr_connections - 1 }
    }

    /// The connection for the next request; `in_flight`: how many each has, in their order.
    pub fn choose(&mut self, in_flight: impl Iterator<Item = u16>) -> u16 {
        let turn = |connection: u16| {
            let turn = connection + self.nr_connections - 1 - self.last;
            if turn < self.nr_connections { turn } else { turn - self.nr_connections }
        };
        let fewest =
            (0..self.nr_connections).zip(in_flight).min_by_key(|(connection, has)| (*has, turn(*connection)));
        self.last = fewest.map_or(0, |(connection, _)| connection);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests on connections.
    struct InFlight(Balance, Vec<u16>);

    impl InFlight {
        fn new(nr_connections: u16) -> Self {
            Self(Balance::new(nr_connections), vec![0; usize::from(nr_connections)])
        }

        fn choose(&mut self) -> u16 {
            let chosen = self.0.choose(self.1.iter().copied());
            self.1[usize::from(chosen)] += 1;
            chosen
        }
    }

    #[test]
    fn equals_take_turns() {
        let mut three = InFlight::new(3);
        let taken: Vec<u16> = (0..6).map(|_| three.choose()).collect();
        assert_eq!(taken, [0, 1, 2, 0, 1, 2]);
        // One request at a time goes around, too.
        let mut two = InFlight::new(2);
        for turn in 0..6 {
            assert_eq!(two.choose(), turn % 2);
            two.1[usize::from(turn % 2)] -= 1;
        }
    }

    #[test]
    fn a_connection_that_answers_late_gets_less() {
        let mut two = InFlight::new(2);
        assert_eq!((two.choose(), two.choose()), (0, 1));
        for _ in 0..3 {
            two.1[1] -= 1;
            assert_eq!(two.choose(), 1, "connection 0 has not answered yet");
        }
        two.1[0] -= 1;
        assert_eq!(two.choose(), 0);
    }

    #[test]
    fn a_single_connection_takes_all() {
        let mut one = InFlight::new(1);
        assert_eq!((one.choose(), one.choose(), one.choose()), (0, 0, 0));
    }
}
